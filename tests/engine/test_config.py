from typing import Any

import pytest

from engine.config import THREADS_VARIABLE, EngineConfig, threads_from_environment
from engine.errors import ConfigurationError


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"dtype": "float8"}, "dtype"),
        ({"quantization": "awq"}, "quantization"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"max_num_batched_tokens": 3, "max_num_seqs": 4}, "max_num_batched_tokens"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        EngineConfig(model="model", served_name="base", **changes)


@pytest.mark.parametrize(
    ("said", "num_threads"),
    [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), ("0", None), ("many", None)],
)
def test_an_engine_keeps_to_the_threads_that_all_of_openmp_is_told(
    monkeypatch: pytest.MonkeyPatch, said: str, num_threads: int | None
) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, said)
    assert threads_from_environment() == num_threads
