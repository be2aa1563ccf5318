"""A fingerprint tells adapters apart, wherever they lie, and who is to be believed."""

import pytest
import torch

from engine.errors import AdapterCorrupted
from engine.fingerprints import WORDS_PER_ROW, Fingerprints, fingerprint_of

ONE, OTHER = "1-float32-aa", "1-float32-bb"
IN_BFLOAT16, PREPARED_ELSEWHERE = "1-bfloat16-aa", "2-float32-bb"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_elements", [3, 64, 5000, 2**17 + 64])
def test_equal_values_have_one_fingerprint_and_a_changed_bit_another(
    dtype: torch.dtype, num_elements: int
) -> None:
    values = torch.randn(num_elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = fingerprint_of(values)
    window = torch.zeros(num_elements + 100, dtype=dtype)[:num_elements]
    window.copy_(values)
    assert fingerprint_of(window) == found
    for place in (0, num_elements // 2, num_elements - 1):
        changed = values.clone()
        changed.view(torch.uint8)[place * values.element_size()] ^= 1
        assert fingerprint_of(changed) != found


def test_pieces_that_changed_places_are_seen() -> None:
    values = torch.arange(8 * WORDS_PER_ROW, dtype=torch.float32)
    first, second = values.chunk(2)
    assert fingerprint_of(torch.cat([second, first])) != fingerprint_of(values)


def test_a_fingerprint_names_the_dtype_of_its_values() -> None:
    assert fingerprint_of(torch.zeros(64, dtype=torch.bfloat16)).startswith("1-bfloat16-")


def test_what_a_probe_found_is_what_loads_must_find() -> None:
    fingerprints = Fingerprints()
    fingerprints.certify("a", ONE)
    fingerprints.check("a", ONE)
    with pytest.raises(AdapterCorrupted, match=r"a .*bb.*aa"):
        fingerprints.check("a", OTHER)
    fingerprints.check("b", OTHER)


def test_without_a_probe_the_first_load_is_believed_until_another_differs() -> None:
    fingerprints = Fingerprints()
    fingerprints.check("a", ONE)
    fingerprints.check("a", ONE)
    with pytest.raises(AdapterCorrupted):
        fingerprints.check("a", OTHER)
    fingerprints.check("a", OTHER)


def test_a_probe_is_believed_more_than_a_load_before_it() -> None:
    fingerprints = Fingerprints()
    fingerprints.check("a", OTHER)
    with pytest.raises(AdapterCorrupted):
        fingerprints.certify("a", ONE)
    fingerprints.certify("a", ONE)
    fingerprints.check("a", ONE)


@pytest.mark.parametrize("certified", [IN_BFLOAT16, PREPARED_ELSEWHERE])
def test_what_was_prepared_otherwise_is_not_compared(certified: str) -> None:
    fingerprints = Fingerprints()
    fingerprints.certify("a", certified)
    fingerprints.check("a", ONE)
    fingerprints.certify("a", certified)
    fingerprints.check("a", ONE)


def test_no_more_is_remembered_than_was_said() -> None:
    fingerprints = Fingerprints(max_digests=2)
    for digest in "abc":
        fingerprints.certify(digest, ONE)
    fingerprints.check("a", OTHER)
    with pytest.raises(AdapterCorrupted):
        fingerprints.check("c", OTHER)
