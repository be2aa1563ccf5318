"""Adapters that come, go and fail under a real engine, on a tiny random Llama."""

import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.errors import AdapterQuarantined
from engine.protocol import SequenceState
from tests.model_lab import FolderSource, open_lab

PROMPT = [(37 * i) % 257 for i in range(9)]
COLD, WARM = "all-linear", "attention"


def test_a_sequence_tells_how_long_it_waited_for_its_adapter(
    model: str, adapters: FolderSource
) -> None:
    comes = threading.Event()
    with open_lab(model, FolderSource(adapters.root, delays={COLD: comes})) as lab:
        cold = lab.submit(PROMPT, adapter=COLD)
        lab.step()
        comes.set()
        lab.run()
        warm, base = lab.submit(PROMPT, adapter=COLD), lab.submit(PROMPT)
        lab.run()
        assert lab.answers[cold].last.adapter_wait_ns > 0
        assert [lab.answers[key].last.adapter_wait_ns for key in (warm, base)] == [0, 0]
        assert len({event.adapter_wait_ns for event in lab.answers[cold].events}) == 1


def test_the_status_counts_what_the_tiers_did(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters, max_loras=1) as lab:
        for name in (COLD, WARM, COLD):
            lab.generate(PROMPT, adapter=name)
        status = lab.core.status()
        assert status.resident_adapters == (COLD,)
        assert set(status.hosted_adapters) == {COLD, WARM}
        tiers = status.tiers
        assert (tiers.num_reads, tiers.num_copies, tiers.num_slot_evictions) == (2, 3, 2)
        assert tiers.disk_bytes > tiers.host_bytes > tiers.device_bytes > 0


def test_a_small_host_tier_changes_no_answer(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters) as lab:
        expected = [lab.generate(PROMPT, adapter=name) for name in (COLD, WARM)]
    with open_lab(model, adapters, max_loras=1, host_memory_bytes=1) as lab:
        for _ in range(2):
            assert [lab.generate(PROMPT, adapter=name) for name in (COLD, WARM)] == expected
        assert lab.core.status().hosted_adapters == ()
        lab.assert_nothing_is_left()


def test_an_adapter_that_gives_no_numbers_three_times_is_quarantined_alone(
    model: str, adapters: FolderSource, tmp_path: Path
) -> None:
    shutil.copytree(adapters.root, tmp_path, dirs_exist_ok=True)
    huge = tmp_path / "huge"
    shutil.copytree(tmp_path / COLD, huge)
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file({k: v * 1e30 for k, v in tensors.items()}, huge / "adapter_model.safetensors")
    with open_lab(model, FolderSource(tmp_path)) as lab:
        keys = [lab.submit(PROMPT, adapter="huge") for _ in range(3)]
        lab.run()
        assert {lab.answers[key].state for key in keys} == {SequenceState.FAILED}
        with pytest.raises(AdapterQuarantined):
            lab.submit(PROMPT, adapter="huge")
        assert lab.core.status().quarantined_adapters == ("huge",)
        assert lab.generate(PROMPT, adapter=WARM)
        lab.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("failure", "is_quarantined"),
    [(OSError("connection reset"), True), (FileNotFoundError("no such file"), False)],
)
def test_loads_that_fail_quarantine_an_adapter_unless_its_files_are_missing(
    model: str, adapters: FolderSource, failure: Exception, is_quarantined: bool
) -> None:
    source = FolderSource(adapters.root, failures={"broken": failure})
    with open_lab(model, source) as lab:
        for _ in range(3):
            lab.generate(PROMPT, adapter="broken")
        status = lab.core.status()
        assert status.tiers.num_load_failures == 3
        assert (status.quarantined_adapters == ("broken",)) is is_quarantined
