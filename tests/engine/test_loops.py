"""Facts about how compiled loops are kept."""

import shutil
from pathlib import Path

import pytest

loops = pytest.importorskip("engine.kernels.loops", reason="needs numba", exc_type=ImportError)


def test_a_change_in_any_file_is_a_reason_to_compile_anew(tmp_path: Path) -> None:
    sources = Path(loops.__file__).parent
    copied = tmp_path / "kernels"
    shutil.copytree(sources, copied, ignore=shutil.ignore_patterns("__pycache__"))
    before = loops.cache_folder(copied)
    assert loops.cache_folder(copied) == before
    with (copied / "vectors.py").open("a") as file:
        file.write("\n")
    assert loops.cache_folder(copied) != before


def test_what_was_compiled_is_kept() -> None:
    folder = Path(loops.numba.config.CACHE_DIR)
    assert list(folder.rglob("*.nbi"))
