"""Which base models `serve` is told to serve: from words of the command line, or from a file.

Knows names, paths and flags of engines by their names, and nothing of what they do.
"""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gateway.engine_room import ServedModel

# Engines' flags that are on or off.
SWITCHES = frozenset({"cuda_graphs"})


def from_words(
    words: Sequence[str], *, served_name: str | None, engine_flags: tuple[str, ...]
) -> list[ServedModel]:
    """`path`, or `name=path`. Raises UsageError."""
    models = [_of_word(word, engine_flags) for word in words]
    if served_name is None:
        return models
    if len(models) != 1:
        raise click.UsageError(
            "--served-model-name names one model: with several, write --model NAME=PATH for each"
        )
    return [ServedModel(served_name, models[0].path, engine_flags)]


def _of_word(word: str, engine_flags: tuple[str, ...]) -> ServedModel:
    name, equals, path = word.partition("=")
    # A path may have one too; names that begin a path have none.
    is_named = bool(equals) and not Path(word).exists()
    if is_named and not (name and path):
        raise click.UsageError(f"--model {word!r} must be PATH or NAME=PATH")
    if is_named:
        return ServedModel(name, path, engine_flags)
    return ServedModel(Path(word.rstrip("/")).name, word, engine_flags)


def from_file(
    path: Path, *, flags: Mapping[str, object], known_flags: Collection[str]
) -> list[ServedModel]:
    """A table for each model, with its path, and flags of its engine before those of all.

        [small]
        path = "/models/small"
        max-model-len = 4096

    `flags` and `known_flags` are spelled `max_model_len`. Raises UsageError.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.UsageError(f"--models {path}: {error}") from None
    return [_of_table(path, name, table, flags, known_flags) for name, table in tables.items()]


def _of_table(
    file: Path,
    name: str,
    table: Any,
    flags: Mapping[str, object],
    known_flags: Collection[str],
) -> ServedModel:
    where = f"--models {file}: [{name}]"
    if not isinstance(table, dict) or not isinstance(table.get("path"), str):
        raise click.UsageError(f"{where} must be a table with the model's path")
    own = {key.replace("-", "_"): value for key, value in table.items() if key != "path"}
    for flag, value in own.items():
        if flag not in known_flags:
            raise click.UsageError(f"{where} {flag.replace('_', '-')} is no flag of engines")
        if isinstance(value, bool) is not (flag in SWITCHES):
            kind = "true or false" if flag in SWITCHES else "a number or a word"
            raise click.UsageError(f"{where} {flag.replace('_', '-')} must be {kind}")
        if not isinstance(value, str | int | float):
            raise click.UsageError(f"{where} {flag.replace('_', '-')} must be a number or a word")
    return ServedModel(name, table["path"], spelled({**flags, **own}))


def spelled(flags: Mapping[str, object]) -> tuple[str, ...]:
    """As an engine's command line; those without a value are left out."""
    given = ((name, value) for name, value in flags.items() if value is not None)
    return tuple(part for name, value in given for part in _words(name.replace("_", "-"), value))


def _words(flag: str, value: object) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (f"--{flag}" if value else f"--no-{flag}",)
    return (f"--{flag}", str(value))


def check(models: Sequence[ServedModel]) -> tuple[ServedModel, ...]:
    """Raises UsageError where there is none, or two have one name."""
    if not models:
        raise click.UsageError("Missing option '--model' (or '--models').")
    by_name: dict[str, ServedModel] = {}
    for model in models:
        other = by_name.setdefault(model.name.lower(), model)
        if other is not model:
            raise click.UsageError(
                f"two models are called {model.name!r} ({other.path} and {model.path}): write"
                " --model NAME=PATH to tell them apart"
            )
    return tuple(models)
