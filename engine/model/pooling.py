"""Hand the final hidden states of a step to the prompts that want a vector made of them.

They are what the model's body gives, after its last norm and before the output layer. They are
taken while the step runs, and nothing of them outlives it but one row for each prompt. Knows rows
and modules. Knows nothing of what the vectors are for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.batch import Batch
from engine.pool import Pool
from engine.scheduler import ScheduledSequence


@contextmanager
def watched(model: PreTrainedModel, watch: Callable[[Tensor], None]) -> Iterator[None]:
    """Let `watch` have the final hidden states of each step inside: [num_tokens, hidden_size]."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        watch(output[0][0])

    body: nn.Module = model.base_model
    handle = body.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def pool(states: Tensor, *, batch: Batch, scheduled: list[ScheduledSequence]) -> None:
    """Add to each sequence's pool what its rows of this step tell.

    states: [num_tokens, hidden_size], the rows of `batch`, which was built of `scheduled`.
    """
    sums: list[Tensor] = []
    owners: list[tuple[Pool, int]] = []
    for first_row, item in zip(batch.query_starts[:-1], scheduled, strict=True):
        places = item.pooled_positions
        if places and item.sequence.pool is not None:
            first = first_row + places.start - item.sequence.num_computed_tokens
            sums.append(states[first : first + len(places)].sum(0, dtype=torch.float64))
            owners.append((item.sequence.pool, places.stop))
    if sums:
        # One way to the host for all of them.
        table = torch.stack(sums).cpu().numpy()
        for (owner, end), row in zip(owners, table, strict=True):
            owner.add(row, end=end)
