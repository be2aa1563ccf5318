"""Adapters that come, go and fail under a real engine, on a tiny random Llama."""

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import (
    AdapterCorrupted,
    AdapterMissing,
    AdapterQuarantined,
    SequenceError,
    TooManyPins,
)
from engine.protocol import AdapterPlace, SequenceState, Tier
from engine.wishes import Wish
from tests.model_lab import FolderSource, Lab, open_lab

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


# What operators want


@dataclass
class Ended:
    """How a wish ended."""

    faults: list[SequenceError | None] = field(default_factory=list)


def wish_for(lab: Lab, name: str, *, to: Tier = "device", fingerprint: str | None = None) -> Ended:
    ended = Ended()
    lab.core.warm(Wish(name, to, on_end=ended.faults.append), fingerprint=fingerprint)
    return ended


def run_until_ended(lab: Lab, *wishes: Ended) -> None:
    lab.run_while(lambda: not all(wish.faults for wish in wishes))


def test_an_adapter_is_warmed_without_a_sequence(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters) as lab:
        run_until_ended(lab, near := wish_for(lab, COLD, to="host"))
        assert lab.core.place_of(COLD) == place(COLD, is_hosted=True)
        run_until_ended(lab, there := wish_for(lab, COLD), again := wish_for(lab, COLD))
        assert near.faults == there.faults == again.faults == [None]
        assert lab.core.place_of(COLD) == place(COLD, is_hosted=True, is_resident=True)
        key = lab.submit(PROMPT, adapter=COLD)
        lab.run()
        assert lab.answers[key].last.adapter_wait_ns == 0
        lab.assert_nothing_is_left()


def test_a_warm_up_waits_for_a_sequence_to_end_and_takes_its_slot(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters, max_loras=1) as lab:
        key = lab.submit(PROMPT, adapter=WARM, max_tokens=30)
        lab.run_while(lambda: not lab.answers[key].events)
        wish = wish_for(lab, COLD)
        lab.run()
        assert wish.faults == []
        run_until_ended(lab, wish)
        assert lab.core.status().resident_adapters == (COLD,)
        assert len(lab.answers[key].token_ids) == 30


def test_a_warm_up_that_fails_says_why_and_is_over(model: str, adapters: FolderSource) -> None:
    source = FolderSource(adapters.root, failures={"gone": FileNotFoundError("no such file")})
    with open_lab(model, source) as lab:
        lab.core.pin("gone")
        run_until_ended(lab, wish := wish_for(lab, "gone"))
        assert isinstance(wish.faults[0], AdapterMissing)
        assert lab.core.status().pinned_adapters == ()
        assert not lab.core.has_work()


def test_a_pinned_adapter_comes_and_stays_and_no_answer_changes(
    model: str, adapters: FolderSource
) -> None:
    names = [COLD, WARM, "rank-stabilised", "one-layer"]
    with open_lab(model, adapters) as lab:
        expected = [lab.generate(PROMPT, adapter=name) for name in names]
    with open_lab(model, adapters, max_loras=2) as lab:
        lab.core.pin(COLD)
        lab.run_while(lambda: COLD not in lab.core.status().resident_adapters)
        assert [lab.generate(PROMPT, adapter=name) for name in names[1:]] == expected[1:]
        assert COLD in lab.core.status().resident_adapters
        assert lab.generate(PROMPT, adapter=COLD) == expected[0]
        with pytest.raises(TooManyPins):
            lab.core.pin(WARM)
        lab.core.unpin(COLD)
        for name in names[1:3]:
            lab.generate(PROMPT, adapter=name)
        assert COLD not in lab.core.status().resident_adapters
        lab.assert_nothing_is_left()


def test_a_forgotten_adapter_leaves_when_its_sequences_end(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters) as lab:
        alone = lab.generate(PROMPT, adapter=COLD, max_tokens=20)
        key = lab.submit(PROMPT, adapter=COLD, max_tokens=20)
        lab.run_while(lambda: not lab.answers[key].events)
        freed = lab.core.forget(COLD)
        assert (freed.is_in_use, freed.device_bytes) == (True, 0)
        assert freed.host_bytes > 0
        later = lab.submit(PROMPT, adapter=COLD, max_tokens=20)
        lab.run()
        assert lab.answers[key].token_ids == lab.answers[later].token_ids == alone
        assert lab.core.status().tiers.num_reads == 2
        assert lab.core.forget(COLD).device_bytes > 0
        assert lab.core.place_of(COLD) == place(COLD)
        lab.assert_nothing_is_left()


def place(name: str, *, is_resident: bool = False, is_hosted: bool = False) -> AdapterPlace:
    return AdapterPlace(
        adapter_digest=name, is_resident=is_resident, is_hosted=is_hosted, is_pinned=False
    )


# What was probed is what is served


def test_the_probe_certifies_what_every_load_finds(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters, max_loras=1) as lab:
        certified = {name: lab.core.probe(name).fingerprint for name in (COLD, WARM)}
        assert len(set(certified.values())) == 2
        for name in (COLD, WARM, COLD):
            assert lab.generate(PROMPT, adapter=name, fingerprint=certified[name])
        assert lab.core.status().tiers.num_fingerprint_mismatches == 0


def test_an_adapter_that_is_not_what_its_probe_found_serves_nobody(
    model: str, adapters: FolderSource, tmp_path: Path
) -> None:
    shutil.copytree(adapters.root, tmp_path, dirs_exist_ok=True)
    source = FolderSource(tmp_path)
    with open_lab(model, source) as lab:
        certified = lab.core.probe(COLD).fingerprint
        damage(tmp_path / COLD)
        key = lab.submit(PROMPT, adapter=COLD, fingerprint=certified)
        other = lab.submit(PROMPT, adapter=WARM)
        lab.run()
        fault = lab.answers[key].last.fault
        assert fault is not None
        assert (fault.code, fault.is_retryable) == ("adapter_corrupted", True)
        assert lab.answers[other].state is SequenceState.LENGTH
        with pytest.raises(AdapterQuarantined, match="is not what its probe found"):
            lab.submit(PROMPT, adapter=COLD, fingerprint=certified)
        with pytest.raises(AdapterQuarantined):
            wish_for(lab, COLD)
        assert source.forgotten == [COLD], "the damaged files are read again"
        status = lab.core.status()
        assert status.quarantined_adapters == (COLD,)
        assert status.tiers.num_fingerprint_mismatches == 1
        assert COLD not in status.hosted_adapters + status.resident_adapters
        lab.assert_nothing_is_left()


def test_what_changed_in_host_memory_does_not_reach_a_slot(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters) as lab:
        run_until_ended(lab, wish_for(lab, COLD, to="host"))
        hosted = lab.core._slots._host.get(COLD)
        assert hosted is not None
        hosted.values.view(torch.uint8)[17] ^= 1
        run_until_ended(lab, wish := wish_for(lab, COLD))
        assert isinstance(wish.faults[0], AdapterCorrupted)
        assert lab.core.status().hosted_adapters == ()
        assert lab.core.status().quarantined_adapters == (COLD,)
        lab.assert_nothing_is_left()


def test_what_turns_out_not_to_be_certified_leaves_the_engine(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters) as lab:
        lab.generate(PROMPT, adapter=COLD)
        with pytest.raises(AdapterCorrupted):
            lab.submit(PROMPT, adapter=COLD, fingerprint="1-float32-0000000000000000")
        assert lab.core.place_of(COLD) == place(COLD)
        lab.assert_nothing_is_left()


def damage(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
