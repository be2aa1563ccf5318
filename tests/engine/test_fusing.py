"""Kernels take over what a model's own code does, where they do the same."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from engine.kernels.choice import RowKernels, on_gpu
from engine.model import attention
from engine.model.attention import Recorder
from engine.model.fusing import fuse
from tests.engine.test_loader import only_eager
from tests.model_lab import tiny_llama_config

PROMPT = torch.tensor([[(7 + 61 * i) % 257 for i in range(10)]])
EVERYWHERE = {"self_attn": 2, "mlp": 2, "input_layernorm": 2, "post_attention_layernorm": 2}
SIZES: dict[str, Any] = {
    name: getattr(tiny_llama_config(), name)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
} | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
LAYERS = {"0": 1, "1": 1}
FAMILIES = {
    "llama": (tiny_llama_config(), EVERYWHERE | LAYERS),
    "phi3": (transformers.Phi3Config(**SIZES), EVERYWHERE | LAYERS),
    # Its norms multiply by what is kept and one, its gate is no SiLU, its layers have more norms.
    "gemma2": (
        transformers.Gemma2Config(**SIZES, head_dim=12),
        {"self_attn": 2, "input_layernorm": 2, "post_attention_layernorm": 2}
        | {"pre_feedforward_layernorm": 2, "post_feedforward_layernorm": 2},
    ),
    # Its layers scale what they add.
    "granite": (transformers.GraniteConfig(**SIZES, residual_multiplier=0.5), EVERYWHERE),
    # It turns neighbours, not halves, and its norms take the mean away.
    "cohere": (transformers.CohereConfig(**SIZES), {"mlp": 2}),
}
