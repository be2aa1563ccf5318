"""Which files an adapter's folder may hold: what is read, what is left aside, what is refused.

Trainers leave much beside an adapter. Their files are known by name and left aside; a name that
nobody knows is told, because whoever packed it may believe that it is served. Knows names and
sizes alone.
"""

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from adapters.examples import FILE_NAME as EXAMPLES_FILE
from adapters.examples import MAX_SIZE_BYTES as MAX_EXAMPLES_BYTES
from adapters.lora_config import MAX_SIZE_BYTES as MAX_CONFIG_BYTES
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# The tokenizer and what belongs to it, with the most bytes each may have: the largest vocabularies
# in use, of 262,144 tokens, take 33 MB as tokenizer.json.
TEXT_FILES = {
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 8 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 4 << 20,
    "chat_template.jinja": 1 << 20,
    "chat_template.json": 1 << 20,
    "generation_config.json": 1 << 20,
}
OPTIONAL_FILES = (*TEXT_FILES, EXAMPLES_FILE)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
ARCHIVE_SUFFIXES = (".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")
# Other spellings of what tokenizer.json says, so nothing is lost beside it.
OLD_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")

# What Trainer, TRL, Axolotl, LLaMA-Factory, Unsloth, DeepSpeed and file managers leave.
_LEFT_BY_TRAINERS = (
    *("README.md", "README.txt", "LICENSE", "LICENSE.*", "NOTICE", "USE_POLICY.md"),
    *(".gitattributes", ".gitignore", ".DS_Store", "._*", "Thumbs.db", "desktop.ini"),
    *("config.json", "preprocessor_config.json", "processor_config.json", "Modelfile"),
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin"),
    *("scaler.pt", "rng_state*.pth", "random_states_*.pkl", "latest", "zero_to_fp32.py"),
    *("trainer_state.json", "trainer_log.jsonl", "training_args.json", "training_args.yaml"),
    *("all_results.json", "train_results.json", "eval_results.json", "predict_results.json"),
    *("training_*.png", "events.out.tfevents.*", "debug.log", "running_log.txt", "*.yaml", "*.yml"),
)


def max_bytes_of(name: str) -> int | None:
    """The most bytes that a file of this name may have; None where only the whole is limited."""
    limits = {**TEXT_FILES, EXAMPLES_FILE: MAX_EXAMPLES_BYTES, CONFIG_FILE: MAX_CONFIG_BYTES}
    return limits.get(name)


def is_left_by_trainers(name: str) -> bool:
    """Whether a file of this name is known, and known not to be part of the adapter."""
    return any(fnmatchcase(name, pattern) for pattern in _LEFT_BY_TRAINERS)


def is_pickle(name: str) -> bool:
    """Whether a file of this name would be unpickled by whoever loads it."""
    return PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES


def is_archive(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ARCHIVE_SUFFIXES
