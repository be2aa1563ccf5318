"""Tiny tokenizers as the families have them, trained on a few lines, in folders of checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, processors

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Hello, world! Hello again, and again; it's 12:45, I think.",
    "def f(x):\n\treturn {'a': [1, 2.50]}\r\n",
    "naïve café — “quotes” … 价格 ¥100",
    "  leading  double   spaces 12345 67890  ",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a family's tokenizer is made by, and what its model is called."""

    tokenizer: type[Any]
    config: type[transformers.PretrainedConfig]
    # SentencePiece's way: unknown characters are tokens of their bytes.
    has_byte_fallback: bool = False
    # Put before every text.
    start: str | None = None


KINDS = {
    # A space is put before every text, and taken away again.
    "llama": Kind(transformers.LlamaTokenizer, transformers.LlamaConfig, True, "<s>"),
    "gemma": Kind(transformers.GemmaTokenizer, transformers.Gemma2Config, True, "<bos>"),
    "qwen2": Kind(transformers.Qwen2Tokenizer, transformers.Qwen2Config),
    "gpt2": Kind(transformers.GPT2Tokenizer, transformers.GPT2Config),
    "gpt_neox": Kind(transformers.GPTNeoXTokenizer, transformers.GPTNeoXConfig),
}


def save_tokenizer(kind: Kind, folder: Path) -> None:
    """A checkpoint's folder, without weights."""
    trained = kind.tokenizer().train_new_from_iterator(CORPUS * 20, vocab_size=420)
    if kind.has_byte_fallback:
        trained = _with_bytes(kind, trained)
    turn = AddedToken("<|turn|>", rstrip=True, normalized=False)
    trained.add_special_tokens({"additional_special_tokens": [turn, "<|end|>"]})
    if kind.start:
        start = (kind.start, trained.convert_tokens_to_ids(kind.start))
        trained.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{kind.start} $A", special_tokens=[start]
        )
    trained.chat_template = TEMPLATE
    trained.save_pretrained(folder)
    ends = {"bos_token_id": None, "eos_token_id": trained.eos_token_id}
    kind.config(vocab_size=len(trained), **ends).save_pretrained(folder)


def _with_bytes(kind: Kind, trained: Any) -> Any:
    """The same with a token for each byte, as its trainer does not add them."""
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    special = [token.content for token in trained.added_tokens_decoder.values()]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    return kind.tokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])
