"""See whether an adapter in memory is the one that was probed.

A fingerprint is a short checksum of an adapter's flat values as they were prepared for this model,
the same in host memory and in a window of the device. Knows digests, bytes and checksums. What an
adapter is, and what becomes of one that differs, others know.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import AdapterCorrupted

# Raise it when adapters are prepared in another way: fingerprints of before are not compared then.
PREPARATION = 1
# A row is summed up, the sums are hashed: rows that change places are seen, at the speed of memory.
WORDS_PER_ROW = 256
WORD_BYTES = 8
# A few hundred bytes each.
MAX_DIGESTS = 10_000


def fingerprint_of(values: Tensor) -> str:
    """Of a flat tensor: how it was prepared and its dtype, then 64 bits over all of its bytes."""
    content = values.view(torch.uint8)
    num_summed = len(content) - len(content) % (WORDS_PER_ROW * WORD_BYTES)
    digest = hashlib.blake2b(str(len(content)).encode(), digest_size=8)
    digest.update(_row_sums(content[:num_summed]))
    digest.update(bytes(content[num_summed:].cpu().numpy()))
    return f"{PREPARATION}-{str(values.dtype).removeprefix('torch.')}-{digest.hexdigest()}"


def _row_sums(content: Tensor) -> bytes:
    """Sums modulo 2^64, where the bytes are."""
    rows = content.view(torch.int64).view(-1, WORDS_PER_ROW)
    if rows.device.type == "cpu":
        # torch would start threads of its own for it.
        return bytes(rows.numpy().sum(axis=1, dtype=np.int64))
    return bytes(rows.sum(dim=1).cpu().numpy())


@dataclass(frozen=True, slots=True)
class _Expected:
    fingerprint: str
    # By a probe; otherwise it is what the first load found.
    is_certified: bool


class Fingerprints:
    """What each adapter's values must be, by weights digest. Threads call it."""

    def __init__(self, *, max_digests: int = MAX_DIGESTS) -> None:
        self._max_digests = max_digests
        self._lock = threading.Lock()
        # The longest not asked for first.
        self._expected: OrderedDict[str, _Expected] = OrderedDict()

    def certify(self, digest: str, fingerprint: str) -> None:
        """Take over what a probe found. Raises AdapterCorrupted where a load found another."""
        with self._lock:
            expected = self._expected.get(digest)
            if expected is None:
                self._expect(digest, _Expected(fingerprint, is_certified=True))
            elif _are_comparable(expected.fingerprint, fingerprint):
                self._expect(digest, _Expected(fingerprint, is_certified=True))
                if expected.fingerprint != fingerprint:
                    raise _corrupted(digest, expected.fingerprint, expected=fingerprint)

    def check(self, digest: str, found: str) -> None:
        """Compare what was loaded; the first load of all is believed. Raises AdapterCorrupted."""
        with self._lock:
            expected = self._expected.get(digest)
            if expected is None or not _are_comparable(expected.fingerprint, found):
                self._expect(digest, _Expected(found, is_certified=False))
                return
            self._expected.move_to_end(digest)
            if expected.fingerprint == found:
                return
            if not expected.is_certified:
                # Either may be the wrong one.
                del self._expected[digest]
            raise _corrupted(digest, found, expected=expected.fingerprint)

    def _expect(self, digest: str, expected: _Expected) -> None:
        self._expected[digest] = expected
        self._expected.move_to_end(digest)
        if len(self._expected) > self._max_digests:
            self._expected.popitem(last=False)


def _are_comparable(one: str, other: str) -> bool:
    """Whether both were prepared alike, in the same dtype."""
    return one.rpartition("-")[0] == other.rpartition("-")[0]


def _corrupted(digest: str, found: str, *, expected: str) -> AdapterCorrupted:
    return AdapterCorrupted(
        f"The adapter {digest} was loaded with the fingerprint {found}, where {expected} was "
        "expected. It is read anew from the store before it is used again."
    )
