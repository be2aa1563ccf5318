"""Name what a full block holds, so that whoever has the same beginning can use it again.

A block's keys and values depend on all tokens up to its end and on the adapter that computed them.
Its name is a hash chain over both (as in vLLM's automatic prefix caching), begun with a salt: those
with different salts never share, and can't tell by the time they wait what the other has asked.
Knows hashes. Knows nothing of block numbers or of how many use one.
"""

import hashlib
from array import array

from engine.sequence import Sequence

HASH_BYTES = 32


def extend_hashes(sequence: Sequence, num_blocks: int, *, block_size: int) -> list[bytes]:
    """The names of the sequence's first `num_blocks` blocks, all full; computed once and kept."""
    _extend(sequence, num_blocks, block_size=block_size)
    return sequence.block_hashes[:num_blocks]


def block_name(sequence: Sequence, index: int, *, block_size: int) -> bytes:
    """The name of one full block of the sequence."""
    _extend(sequence, index + 1, block_size=block_size)
    return sequence.block_hashes[index]


def _extend(sequence: Sequence, num_blocks: int, *, block_size: int) -> None:
    hashes = sequence.block_hashes
    while len(hashes) < num_blocks:
        parent = hashes[-1] if hashes else _root(sequence)
        start = len(hashes) * block_size
        tokens = array("I", sequence.token_ids[start : start + block_size])
        assert len(tokens) == block_size, "a block that is not full has no name"
        hashes.append(_hash(parent + tokens.tobytes()))


def _root(sequence: Sequence) -> bytes:
    # A digest is hexadecimal, so the zero byte ends it and no salt can pass for a part of it.
    return _hash((sequence.adapter_digest or "").encode() + b"\0" + sequence.cache_salt)


def _hash(data: bytes) -> bytes:
    """Cryptographic, because tenants choose what goes in."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES, person=b"manylora kv").digest()
