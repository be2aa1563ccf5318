from typing import Any

import pytest

from engine.config import EngineConfig
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
