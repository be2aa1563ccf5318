"""See whether the engine computes an adapter as its files say.

Fixed prompts run through the serving path; beside it each module that the adapter changes is
computed again, alone, in float32, with whole weights such as x(W + dW)ᵀ, from the files, with code
that shares nothing with the serving path. Knows one adapter. Knows nothing of scheduling.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from engine import batch as batches
from engine.claims import Claim, read_claims
from engine.model.loader import LoadedModel
from engine.model.memory import DeviceMemory
from engine.model.targets import Target
from engine.protocol import ProbeCoverage, ProbeReport
from engine.runner import Runner
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence

PROMPT_LENGTHS = (6, 11, 16)
# Of the tokens that an adapter has trained or added, so many are looked at.
MAX_OWN_TOKENS = 8
BLOCK_SIZE = 8
# |found - expected| / |expected| of one module. Measured on SmolLM2-135M: 5e-7, 4e-4 and 3e-3.
ERROR_BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# An adapter must move the logits by this many times what another batch order does.
MIN_SHIFT_OVER_NOISE = 10
# Rows of a weight that are built at a time.
TILE_SIZE = 512


@dataclass(slots=True)
class _Findings:
    """Filled by the hooks while the prompts run."""

    errors: dict[str, float] = field(default_factory=dict)
    # |W' - W| / |W| of what is in the place of the base model's W, where that is another
    relative_norms: dict[str, float] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)


def examine(
    folder: Path, weights_digest: str, *, slot: int, loaded: LoadedModel, runner: Runner
) -> ProbeReport:
    """Probe the adapter in `folder`, which is installed in `slot`."""
    claims = read_claims(folder, loaded.targets)
    prompts, added = _prompts(loaded.vocab_size, _own_ids(claims, loaded))
    findings = _Findings()
    with _watched(claims, [*prompts, *added], findings, loaded):
        watched = _logits([*prompts, *added], slot=slot, loaded=loaded, runner=runner)
    # Kernels may take several modules at once where nobody watches one of them.
    adapted = _logits([*prompts, *added], slot=slot, loaded=loaded, runner=runner)
    base = _logits(prompts, slot=NO_ADAPTER, loaded=loaded, runner=runner)
    alone = [_logits([p], slot=NO_ADAPTER, loaded=loaded, runner=runner) for p in prompts]
    noise = max(_largest(torch.cat(alone) - base), _rounding(base))
    untouched = sorted(findings.unchanged | (claims.keys() - findings.errors.keys()))
    own, own_watched = (each[: len(prompts), : base.shape[1]] for each in (adapted, watched))
    shift = _largest(own - base)
    error = max(findings.errors.values(), default=math.inf)
    if _largest(own - own_watched) > max(shift / MIN_SHIFT_OVER_NOISE, noise):
        # What was found right is not what is served.
        error = math.inf
    bound = ERROR_BOUNDS[loaded.dtype]
    has_effect = shift > MIN_SHIFT_OVER_NOISE * noise or bool(added)
    return ProbeReport(
        weights_digest=weights_digest,
        num_modules=len(claims),
        largest_relative_error=error,
        error_bound=bound,
        logit_shift=shift,
        noise=noise,
        untouched_modules=untouched,
        is_passed=error <= bound and has_effect and not untouched,
        coverage=_coverage(claims, findings),
    )


def _coverage(claims: dict[str, Claim], findings: _Findings) -> ProbeCoverage:
    ranks = [claim.rank for claim in claims.values() if claim.rank]
    norms = list(findings.relative_norms.values())
    return ProbeCoverage(
        num_modules_by_kind=dict(Counter(k for claim in claims.values() for k in claim.kinds)),
        num_parameters=sum(claim.num_parameters for claim in claims.values()),
        min_rank=min(ranks, default=0),
        max_rank=max(ranks, default=0),
        largest_relative_norm=max(norms, default=0.0),
        median_relative_norm=median(norms) if norms else 0.0,
    )


# Running


def _own_ids(claims: dict[str, Claim], loaded: LoadedModel) -> list[int]:
    """Tokens whose embedding the adapter has trained or added."""
    name = loaded.targets.input_embedding
    claim = claims.get(name or "")
    if claim is None or name is None:
        return []
    return _changed_ids(claim, loaded.targets.by_name[name])


def _changed_ids(claim: Claim, target: Target) -> list[int]:
    ids = set() if claim.tokens is None else set(claim.tokens[0])
    own, base = claim.parameters.get("weight"), target.rows
    if own is not None:
        ids |= set(range(len(base), len(own)))
        for first in range(0, len(base), TILE_SIZE):
            tile = base[first : first + TILE_SIZE]
            is_other = (own[first : first + len(tile)].to(tile) != tile).any(dim=1)
            ids |= set((first + is_other.nonzero()[:, 0]).tolist())
    return sorted(ids)


def _prompts(vocab_size: int, own_ids: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Those that the base model can read too, and those that only the adapter can."""
    fixed = [[(31 + 7919 * i + 104729 * n) % vocab_size for i in range(n)] for n in PROMPT_LENGTHS]
    known = _some([token_id for token_id in own_ids if token_id < vocab_size])
    added = _some([token_id for token_id in own_ids if token_id >= vocab_size])
    first = fixed[0]
    return [*fixed, *([known + first] if known else [])], [first + added] if added else []


def _some(ids: list[int]) -> list[int]:
    return ids[:: max(1, len(ids) // MAX_OWN_TOKENS)]


@contextmanager
def _watched(
    claims: dict[str, Claim],
    prompts: list[list[int]],
    findings: _Findings,
    loaded: LoadedModel,
) -> Iterator[None]:
    """While `prompts` run in one step, compare each module that the adapter should change."""
    targets, handles = loaded.targets, []
    token_ids = torch.tensor([i for prompt in prompts for i in prompt], device=loaded.device)
    for name in claims.keys() & targets.by_name.keys():
        own_ids = token_ids if name == targets.input_embedding else None
        watch = _Watch(_Twin(targets.by_name[name]), claims[name], findings, own_ids)
        handles.append(loaded.bank.module(name).register_forward_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(prompts: list[list[int]], *, slot: int, loaded: LoadedModel, runner: Runner) -> Tensor:
    """[num_prompts, vocab_size] of the last tokens, over memory that is thrown away."""
    scheduled, num_blocks = [], 0
    for prompt in prompts:
        table = [num_blocks + 1 + i for i in range(-(-len(prompt) // BLOCK_SIZE))]
        num_blocks += len(table)
        sequence = Sequence.unowned(prompt, block_table=table, slot=slot)
        scheduled.append(ScheduledSequence(sequence, len(prompt), is_sampled=True))
    memory = DeviceMemory(
        loaded.layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=loaded.device
    )
    batch = batches.build(scheduled, block_size=BLOCK_SIZE, device=loaded.device)
    return runner.run(batch, memory=memory)


class _Twin:
    """A module of the base model as nobody has hooked it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.module = copy.deepcopy(target.module, {id(p): p for p in target.module.parameters()})


@dataclass(frozen=True, slots=True)
class _Watch:
    """Compares what a module gave with what it should have given."""

    twin: _Twin
    claim: Claim
    findings: _Findings
    # In place of the module's input: ids that the base model does not know were taken out of it.
    token_ids: Tensor | None

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = self.twin.target.name
        x = inputs[0] if self.token_ids is None else self.token_ids.view(inputs[0].shape)
        expected, relative_norm = _recompute(x, self.twin, self.claim)
        found = output[..., : expected.shape[-1]].float()
        difference = torch.linalg.vector_norm(found - expected)
        self.findings.errors[name] = float(difference / torch.linalg.vector_norm(expected))
        if relative_norm:
            self.findings.relative_norms[name] = relative_norm
        base = self.twin.module(inputs[0])
        is_wider = expected.shape[-1] > base.shape[-1]
        if torch.equal(base, output[..., : base.shape[-1]]) and not is_wider:
            self.findings.unchanged.add(name)


# Computing again


def _recompute(x: Tensor, twin: _Twin, claim: Claim) -> tuple[Tensor, float]:
    """A module's output in float32, and how far what it is computed with is from the base's."""
    target = twin.target
    if target.is_linear:
        return _linear(x.float(), target, claim)
    if target.is_embedding:
        return _embedding(x, target, claim)
    own = copy.deepcopy(twin.module).float()
    for name, parameter in claim.parameters.items():
        value = parameter.to(x.device, torch.float32)
        setattr(own, name, nn.Parameter(value, requires_grad=False))
    norms = _Norms()
    for name, parameter in target.module.named_parameters():
        if name != "bias":
            norms.add(getattr(own, name), parameter)
    result: Tensor = own(x.float())
    return result, norms.relative


@dataclass(slots=True)
class _Norms:
    """Adds up squares, tile by tile."""

    difference: float = 0.0
    base: float = 0.0

    def add(self, own: Tensor, base: Tensor) -> None:
        """Rows that the base does not have are left out."""
        own, base = own[: len(base)].float(), base.float()
        self.difference += float((own - base).square().sum())
        self.base += float(base.square().sum())

    @property
    def relative(self) -> float:
        return math.sqrt(self.difference / self.base) if self.base else math.inf


def _linear(x: Tensor, target: Target, claim: Claim) -> tuple[Tensor, float]:
    """x W'ᵀ + b, a tile of output features at a time.

    Where the base model's layer rounds its input, what it adds to x meets the base's W alone.
    """
    norms, columns = _Norms(), []
    rounding = None if "weight" in claim.parameters else target.rounding(x)
    for first, weight in _tiles(target, claim):
        base, gain = target.tile(first, first + len(weight)), None
        if claim.lora is not None:
            lora_A, lora_B = (part.to(x.device, torch.float32) for part in claim.lora)
            weight = weight + claim.scaling * (lora_B[first : first + len(weight)] @ lora_A)
        if claim.magnitude is not None:
            own = claim.magnitude[first : first + len(weight)].to(x.device, torch.float32)
            gain = own / torch.linalg.vector_norm(weight, dim=1)
            weight = gain[:, None] * weight
        norms.add(weight, base)
        column = x @ weight.T
        if rounding is not None:
            added = rounding @ base.float().T
            column += added if gain is None else added * gain
        columns.append(column)
    result = torch.cat(columns, dim=-1)
    bias = claim.parameters.get("bias", getattr(target.module, "bias", None))
    return (result if bias is None else result + bias.to(x.device, torch.float32)), norms.relative


def _embedding(ids: Tensor, target: Target, claim: Claim) -> tuple[Tensor, float]:
    """Rows of the whole W', which is built tile by tile."""
    norms, gain = _Norms(), _embedding_gain(target, claim)
    out = torch.zeros(*ids.shape, target.features[1], device=ids.device)
    for first, weight in _embedding_tiles(target, claim):
        weight = gain * weight
        norms.add(weight, target.tile(first, first + len(weight)))
        is_here = (ids >= first) & (ids < first + len(weight))
        out[is_here] = weight[ids[is_here] - first]
    return out * target.embed_scale, norms.relative


def _embedding_gain(target: Target, claim: Claim) -> Tensor | float:
    """[dim]: DoRA's norms are those of columns here."""
    if claim.magnitude is None:
        return 1.0
    squares = torch.zeros(target.features[1], device=target.rows.device)
    for _, weight in _embedding_tiles(target, claim):
        squares += weight.square().sum(dim=0)
    return claim.magnitude.to(squares) / squares.sqrt()


def _embedding_tiles(target: Target, claim: Claim) -> Iterator[tuple[int, Tensor]]:
    for first, weight in _tiles(target, claim):
        if claim.lora is not None:
            lora_A, lora_B = (part.to(weight.device, torch.float32) for part in claim.lora)
            own = lora_A[:, first : first + len(weight)].T @ lora_B.T
            weight = weight + claim.scaling * own
        yield first, weight


def _tiles(target: Target, claim: Claim) -> Iterator[tuple[int, Tensor]]:
    """First row and float32 rows of the weight, with the adapter's own in place of the base's."""
    own = claim.parameters.get("weight")
    rows = None if own is None else target.rows_of(own)
    token_ids, token_rows = claim.tokens or ([], ())
    device = next(target.module.parameters()).device
    num_known, width = target.shape if rows is None else rows.shape
    num_rows = max(num_known, *(token_id + 1 for token_id in token_ids), 0)
    for first in range(0, num_rows, TILE_SIZE):
        end = min(first + TILE_SIZE, num_rows)
        known = target.tile(first, end) if rows is None else rows[first:end]
        tile = torch.zeros(end - first, width, device=device)
        known = known.to(device, torch.float32)
        tile[: len(known)] = known
        for place, token_id in enumerate(token_ids):
            if first <= token_id < end:
                tile[token_id - first] = token_rows[place].to(device, torch.float32)
        yield first, tile


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rounding(logits: Tensor) -> float:
    """What float32 alone leaves open, where two orders happen to agree to the last bit."""
    return _largest(logits) * torch.finfo(torch.float32).eps
