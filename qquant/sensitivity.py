"""What each linear's rounding costs, measured once, so that bits can be shared out (`mixed.py`).

Losses of different linears can only be added if they mean the same. The loss that a solver sees,
tr(D H Dᵀ), does not: an error of one square unit in a query means something else than in an output
projection, in the first block something else than in the last. What is wanted is its effect on the
model's output, KL(full precision || quantized) per token. To second order that is a quadratic form
in the error of a linear's output, with the Fisher information of that output as its matrix. Of the
matrix the diagonal is kept, one number per output row, and rows' errors are taken as uncorrelated
with the gradients (as in K-FAC):

    KL per token  ~  1/2 sum_r E[g_r^2] E[(D x)_r^2]  =  1/4 sum_r E[g_r^2] (D H D^T)_rr

with `g` the gradient of log p(y) by the linear's output and `y` drawn from the model's own
prediction (with the text's next token it would be the empirical Fisher, which is another thing).
The result is in nats, the same for every linear, and can be checked against the KL of the finished
model. The cheaper choices, the loss relative to the linear's output or to the residual stream, say
nothing about how much the rest of the model listens to that output.

Two passes, one block (and the Hessians of its inputs) in memory at a time. Forward, through the
original weights: each input's Hessian, and from it the row losses of every width by GPTQ without
refinement (refinement and corrections lower all widths alike, so they do not change who needs bits
most). Backward, on fewer tokens: from the head through the blocks in reverse, each block computed
again from its stored input. Stored inputs go where suspended activations go (`hold.py`).

Left out on purpose: the choice (`mixed.py`), and that errors made early change the inputs of later
linears (the full-precision stream is measured).

What this takes is summed up in `budget.py` before the run: nothing here may be alive at one time
that is not counted there. So what waits between blocks waits in the holder, products with the head
are made for some tokens at a time, and scores of attention that is not fused for one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from . import gptq, pool
from .calibration.hold import Held, Holder
from .calibration.probe import shared_inputs
from .calibration.walk import linear_of
from .config import QuantSpec
from .errors import NumericsError
from .factor import factorize
from .finite import all_finite
from .grid import dequantize, find_scales, round_to_nearest
from .heap import Tidy, heap_slack, trim_heap
from .hessian import Hessian
from .mixed import Unit, storage_bits
from .models.skeleton import Skeleton, need_finite

TOKENS = 16384  # that the Hessians see
GRADIENT_TOKENS = 4096
_ROWS = 4096  # of the head at a time
_TOGETHER = 256  # tokens that are multiplied with them together, on a CPU; a GPU takes all
_PROBE = 16
_BACK = 512  # tokens that go backward through a block together, on a CPU; a GPU takes a sequence
_STRIP = 256  # rows of a matrix that are multiplied in float64 together


@dataclass(frozen=True)
class _Group:
    """Linears of a block that share an input; losses by width, per linear [rows]."""

    block: int
    names: tuple[str, ...]
    inputs: int
    losses: Mapping[int, Sequence[Tensor]]

    def unit(self, weights: Mapping[str, Tensor], spec: QuantSpec) -> Unit:
        """With E[g²] of each linear's rows: the estimate of the module's opening."""
        outputs = [weights[name].numel() for name in self.names]
        groups = self.inputs // spec.group_of(self.inputs)
        return Unit(
            block=self.block,
            names=self.names,
            weights=sum(outputs) * self.inputs,
            size={
                b: sum(storage_bits(n, self.inputs, groups, b) for n in outputs)
                for b in self.losses
            },
            loss={
                b: sum(
                    float((weights[name].double() * loss).sum()) / 4
                    for name, loss in zip(self.names, losses, strict=True)
                )
                for b, losses in self.losses.items()
            },
        )


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        units: of the whole model, in its order.
        tokens, gradient_tokens: that the Hessians and the gradients saw.
    """

    units: tuple[Unit, ...]
    tokens: int
    gradient_tokens: int


def measure(
    skeleton: Skeleton,
    ids: Tensor,
    spec: QuantSpec,
    *,
    batch_tokens: int,
    holder: Holder,
    hold_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Measured:
    """The loss of every unit at every width of `spec.bit_choices`.

    Args:
        skeleton: of the source, in a dtype that gradients fit (not float16).
        ids: [samples, seqlen] int64 calibration ids; a part of them is read.
        batch_tokens: tokens per forward.
        holder: where block inputs wait for the backward pass.
        hold_dtype: that block outputs are rounded to, as in the run.
        progress: called with the number of blocks done, forward and backward counted apart.

    Raises:
        NumericsError: a Hessian or gradient is not finite.
    """
    picked, few = _pick(ids)
    blocks, seqlen = len(skeleton.blocks), int(ids.shape[1])
    per_batch = max(1, batch_tokens // seqlen)
    with_gradient = -(-few // per_batch)
    own = Holder(  # for as long as this lasts: nothing of it may stay beside the run's
        holder.host_budget, holder.device_budget, spill_dir=holder.spill_dir
    )
    keep = hold_dtype or skeleton.dtype
    stream = _embedded(skeleton, picked, few, per_batch, keep, own)
    probe = stream[0].tensor[:1, :_PROBE].to(skeleton.device, skeleton.dtype, copy=True)
    tidy = Tidy()
    waiting: list[list[Held]] = []
    measured: list[list[_Group]] = []
    for index in range(blocks):
        block = skeleton.load(index)
        try:
            short = skeleton.block_kwargs(*probe.shape[:2])[index]
            groups = shared_inputs(block, skeleton.linears[index], probe, short)
            stats, inputs = _forward(skeleton, block, index, groups, stream, with_gradient, own)
            waiting.append(inputs)
            measured.append([])
            tidy(heap_slack())
            for names in groups:
                h, _, _ = stats.pop(names[0]).result()
                measured[-1].append(_solve(skeleton, block, index, names, h, spec))
                del h
                tidy(heap_slack())
        finally:
            skeleton.drop(index)
        progress(index + 1)
    gradients = _head_gradient(skeleton, [held.restore() for held in stream])
    del stream
    own.trim()
    pool.trim()
    tidy(heap_slack())
    units: list[Unit] = []
    for index in reversed(range(blocks)):
        block = skeleton.load(index)
        try:
            weights = _backward(skeleton, block, index, waiting.pop(), gradients)
        finally:
            skeleton.drop(index)
        units += [group.unit(weights, spec) for group in reversed(measured.pop())]
        own.trim()
        tidy(heap_slack())
        progress(2 * blocks - index)
    del gradients
    pool.trim()
    trim_heap()  # none of it stands beside the walk
    holder.spilled_bytes = max(holder.spilled_bytes, own.spilled_bytes)
    holder.peak_bytes = max(holder.peak_bytes, own.peak_bytes)
    return Measured(tuple(reversed(units)), picked.numel(), few * seqlen)


def _embedded(
    skeleton: Skeleton, ids: Tensor, few: int, per_batch: int, keep: torch.dtype, holder: Holder
) -> list[Held]:
    """What the first block is given, in batches; those of the gradients' sequences, `few`, come
    first and are not mixed with others."""
    parts = [*torch.split(ids[:few], per_batch), *torch.split(ids[few:], per_batch)]
    parts = [part for part in parts if part.numel()]
    width = skeleton.config.hidden_size
    outs = [torch.empty(*part.shape, width, dtype=keep) for part in parts]
    skeleton.embed_into(parts, outs)
    held: list[Held] = []
    while outs:
        kind = _kind(len(held), -(-few // per_batch), 0)
        held.append(holder.hold(outs.pop(0).to(skeleton.device), kind=kind))
    return held


def _kind(batch: int, with_gradient: int, index: int) -> object:
    """What is given up together: inputs that wait for the backward pass, or those of a block."""
    return "gradient" if batch < with_gradient else index % 2


def _pick(ids: Tensor) -> tuple[Tensor, int]:
    """Evenly spread sequences, those of the gradients (evenly spread, too) first, and how many."""
    count, seqlen = ids.shape
    some = torch.arange(count)[:: -(-count * seqlen // TOKENS)]
    few = some[:: max(1, -(-some.numel() * seqlen // GRADIENT_TOKENS))]
    rest = some[~torch.isin(some, few)]
    return ids[torch.cat([few, rest])], few.numel()


def _forward(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    groups: Sequence[tuple[str, ...]],
    stream: list[Held],
    with_gradient: int,
    holder: Holder,
) -> tuple[dict[str, Hessian], list[Held]]:
    """Every batch through the block, in place.

    Args:
        stream: the block's inputs, that its outputs take the place of; of the last block those
            with a gradient alone.
        with_gradient: how many of them come back, the first ones.

    Returns:
        The Hessian of each group's input by its leader, and the inputs that come back.
    """
    stats = {}
    hooks = []
    for leader, *_ in groups:
        linear = linear_of(block, leader)
        stats[leader] = Hessian(int(linear.weight.shape[1]), linear.weight.device)

        def gather(_: nn.Module, args: tuple[Tensor, ...], to: Hessian = stats[leader]) -> None:
            to.add(args[0])

        hooks.append(linear.register_forward_pre_hook(gather))
    last = index == len(skeleton.blocks) - 1
    waiting: list[Held] = []
    outputs: list[Held] = []
    try:
        with torch.no_grad():
            for b in range(len(stream)):
                x = stream[b].restore()
                kwargs = skeleton.block_kwargs(*x.shape[:2])[index]
                out = block(x.to(skeleton.dtype), **kwargs)
                out = (out[0] if isinstance(out, tuple) else out).to(x.dtype)
                if b < with_gradient:
                    waiting.append(holder.hold(x))
                else:
                    x.data = x.new_empty(0)
                if not last or b < with_gradient:
                    outputs.append(holder.hold(out, kind=_kind(b, with_gradient, index + 1)))
                del x, out
    finally:
        for hook in hooks:
            hook.remove()
    stream[:] = outputs
    return stats, waiting


def _solve(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    names: tuple[str, ...],
    h: Tensor,
    spec: QuantSpec,
) -> _Group:
    linears = [linear_of(block, name) for name in names]
    rows = [int(m.weight.shape[0]) for m in linears]
    w = torch.cat([m.weight for m in linears]).float()
    full = f"{skeleton.family.blocks}.{index}.{names[0]}"
    _need_finite(f"{full} (Hessian)", h)
    losses = row_losses(w, h, spec, spec.bit_choices, full)
    split = {b: torch.split(t.cpu(), rows) for b, t in losses.items()}
    return _Group(index, names, w.shape[1], split)


def _need_finite(what: str, t: Tensor) -> None:
    if not all_finite(t):
        raise NumericsError(
            what,
            expected="finite numbers",
            got="infinities or NaN",
            cure="Run the forward in float32 (--compute-dtype)",
        )


def row_losses(
    w: Tensor, h: Tensor, spec: QuantSpec, choices: Sequence[int], name: str = "the matrix"
) -> dict[int, Tensor]:
    """d H dᵀ of each row after a plain GPTQ pass, by width; one factorization for all widths.

    Args:
        w: [N, K] float32. h: [K, K] float32, not damped; not changed.
        spec: group size, symmetry, scale search, damping, order.
        choices: widths.

    Returns:
        By width, [N] float64.
    """
    k = w.shape[1]
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    if bool(dead.any()):  # an input that is always zero: any code is free, the factor needs a value
        h = h.clone()
        h[dead, :] = 0
        h[:, dead] = 0
        h.diagonal()[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    r, _ = factorize(h, spec.damp, order)
    group = order // spec.group_of(k)
    found = {}
    for bits in choices:
        own = replace(spec, bits=bits, target_bpw=None)
        scales, zeros = find_scales(w, own, h.diagonal(), name)
        if r is None:
            codes = round_to_nearest(w, scales, zeros, bits)
        else:
            visited = gptq.gptq_pass(w[:, order], r, own, scales, zeros, group).codes
            codes = torch.empty_like(visited)
            codes[:, order] = visited
            del visited
        d = dequantize(codes, scales, zeros)
        del codes
        torch.sub(w, d, out=d)
        d[:, dead] = 0
        dh = d @ h
        pairs = zip(torch.split(dh, _STRIP), torch.split(d, _STRIP), strict=True)
        rows = [(a.double() * b.double()).sum(1) for a, b in pairs]  # few in float64 at a time
        found[bits] = torch.cat(rows).clamp_(min=0)
        del d, dh, pairs
    return found


def _head_gradient(skeleton: Skeleton, hidden: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Of log p(y) by the last block's output, y drawn from the model: one per batch, in float32.

    The head is read in slices of rows, twice: for the normaliser and the draw (the largest of
    logit plus Gumbel noise is one from the softmax), then for the gradient.
    """
    family, source = skeleton.family, skeleton.checkpoint
    norm = skeleton.model.get_submodule(family.norm.rpartition(".")[0])
    weight = source.read(family.norm)
    need_finite(family.norm, weight)
    norm.load_state_dict({"weight": weight.to(skeleton.device, torch.float32)}, assign=True)
    norm.requires_grad_(False)
    head = family.embedding if skeleton.tied else family.head
    count = source.info(head).shape[0]
    generator = torch.Generator(device=skeleton.device).manual_seed(seed)

    with torch.no_grad():
        flat = torch.cat([norm(h.float()).reshape(-1, h.shape[-1]) for h in hidden])
    tokens = flat.shape[0]
    total = flat.new_full((tokens,), -torch.inf)
    highest, drawn = total.clone(), torch.zeros(tokens, dtype=torch.int64, device=flat.device)
    together = tokens if flat.is_cuda else _TOGETHER
    room = flat.new_empty(2, min(together, tokens) * min(_ROWS, count))

    def rows(start: int) -> Tensor:
        part = source.read_rows(head, start, min(start + _ROWS, count))
        need_finite(head, part)
        return part.to(skeleton.device, torch.float32)

    slices = [slice(a, min(a + together, tokens)) for a in range(0, tokens, together)]
    for start in range(0, count, _ROWS):
        part = rows(start)
        for some in slices:  # in order: so the noise is the same, whatever the slices of a CPU
            logits, noise = _logits(flat[some], part, room)
            total[some] = torch.logaddexp(total[some], logits.logsumexp(1))
            noise.exponential_(generator=generator).log_()
            value, at = logits.sub_(noise).max(1)
            higher = value > highest[some]
            drawn[some] = torch.where(higher, at + start, drawn[some])
            highest[some] = torch.maximum(highest[some], value)
    slope = torch.zeros_like(flat)
    for start in range(0, count, _ROWS):
        part = rows(start)
        for some in slices:
            pull, _ = _logits(flat[some], part, room)
            pull.sub_(total[some, None]).exp_().neg_()
            own = drawn[some] - start
            here = (own >= 0) & (own < part.shape[0])
            pull[here, own[here]] += 1
            slope[some].addmm_(pull, part)
    del flat, room, part, logits, noise, pull
    sizes = [h.shape[0] * h.shape[1] for h in hidden]
    result = []
    for h, behind in zip(hidden, torch.split(slope, sizes), strict=True):
        leaf = h.detach().float().requires_grad_(True)
        with torch.enable_grad():
            output = norm(leaf)
        (gradient,) = torch.autograd.grad(output, leaf, behind.view(output.shape))
        result.append(gradient)
    norm.to_empty(device="meta")
    return result


def _logits(x: Tensor, rows: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, hidden] times rows [m, hidden] of the head, [n, m], and as much room beside it.

    Args:
        room: [2, n m or more], where both are.
    """
    shape = x.shape[0], rows.shape[0]
    logits, beside = (r[: shape[0] * shape[1]].view(shape) for r in room)
    return torch.mm(x, rows.T, out=logits), beside


def _backward(
    skeleton: Skeleton, block: nn.Module, index: int, waiting: list[Held], gradients: list[Tensor]
) -> dict[str, Tensor]:
    """The block's gradients, replacing those of its output in place; E[g²] per row by linear."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    hooks = []
    for name in skeleton.linears[index]:

        def add(gradient: Tensor, name: str = name) -> None:
            square = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)
            sums[name] = sums[name] + square if name in sums else square

        def watch(_m: nn.Module, _i: object, out: Tensor, add: Callable[..., None] = add) -> None:
            out.register_hook(add)  # type: ignore[no-untyped-call]

        hooks.append(linear_of(block, name).register_forward_hook(watch))
    try:
        for b, held in enumerate(waiting):
            x = held.restore().detach().to(skeleton.dtype)
            # As few sequences as keep a processor busy: autograd keeps several times what a forward
            # does, and on a GPU a head's scores are held in full (`_repeatable`).
            rows = 1 if x.is_cuda else max(1, _BACK // x.shape[1])
            slopes = []
            pairs = zip(torch.split(x, rows), torch.split(gradients[b], rows), strict=True)
            for part, gradient in pairs:
                part = part.requires_grad_(True)
                kwargs = skeleton.block_kwargs(*part.shape[:2])[index]
                with torch.enable_grad(), _repeatable(skeleton.device):
                    out = block(part, **kwargs)
                    out = out[0] if isinstance(out, tuple) else out
                    (slope,) = torch.autograd.grad(out, part, gradient.to(out.dtype))
                slopes.append(slope.float())
            gradients[b] = torch.cat(slopes) if len(slopes) > 1 else slopes[0]
            tokens += x.shape[0] * x.shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        _need_finite(f"{skeleton.family.blocks}.{index}.{name} (gradient)", total)
    return {name: (total / tokens).cpu() for name, total in sums.items()}


class _HeadByHead(TorchFunctionMode):
    """Attention whose scores are in memory for one head at a time, made again for the gradient."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _ATTEND or len(args) < 3 or args[0].shape[1] == 1:
            return func(*args, **kwargs)
        (query, key, value), rest = args[:3], list(args[3:])
        more = {k: v for k, v in kwargs.items() if k != "enable_gqa"}
        mask = rest.pop(0) if rest else more.pop("attn_mask", None)
        heads = query.shape[1]
        shared = heads // key.shape[1]
        outs = []
        for head in range(heads):
            its = slice(head // shared, head // shared + 1)
            same = mask is None or mask.dim() < 4 or mask.shape[1] == 1
            own = mask if same else mask[:, head : head + 1]
            parts = query[:, head : head + 1], key[:, its], value[:, its], own, *rest
            outs.append(
                checkpoint(func, *parts, use_reentrant=False, preserve_rng_state=False, **more)
            )
        return torch.cat(outs, 1)


_ATTEND = torch.nn.functional.scaled_dot_product_attention


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Attention whose gradients are the same every time."""
    if device.type != "cuda":
        yield
        return
    # Torch's fused kernels add up gradients in the order that a GPU's blocks happen to finish in.
    with sdpa_kernel(SDPBackend.MATH), _HeadByHead():
        yield
