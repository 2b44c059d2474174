"""What stands between a block's linears on a CPU, each in one pass over memory, in machine code.

As plain torch a norm is seven operations and a gate two, each of which reads what the last one
wrote and writes memory that has to be cleared first; a softmax in bfloat16 is three. Measured on
two cores of an AMD EPYC with AVX2: docs/EXPERIMENTS.md.

Results are those of plain torch but for the last bits: exp, the order of sums and products that are
added unrounded are others. They are the same for every number of threads and every width of a
processor's vectors.

Left out on purpose: what is computed (`fused_ir.py`), compiling (`llvm_code.py`), and which modules
of a model do so (`models/fused_blocks.py`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import llvm_code, pool
from .errors import RunError
from .fused_ir import LANES, Writer
from .llvm_code import Program, widest

_NEAR = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # of the norm, of a result that is right
# By the dtypes of what turns and of its angles.
_ROTATES = {
    (torch.float32, torch.float32): "rotate",
    (torch.bfloat16, torch.float32): "rotate16",
    (torch.bfloat16, torch.bfloat16): "rotate1616",
}


@cache
def unavailable() -> str | None:
    """Why nothing of this runs in this process, or None; tried once, on small tensors."""
    return llvm_code.against_results(_trial, 1)


def serves(dtype: str) -> bool:
    """Whether blocks that compute in a dtype, by its name, have it do this."""
    return getattr(torch, dtype, None) in _NEAR and not unavailable()


def takes(*tensors: Tensor) -> bool:
    """Whether these may go to `norm` or `gated`: of one dtype, in one piece, without gradients."""
    first = tensors[0]
    return first.dtype in _NEAR and all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype == first.dtype
        and t.shape[-1:] == first.shape[-1:]
        and t.is_contiguous()
        and not t.is_neg()
        and t.shape[-1] % LANES == 0
        and not (torch.is_grad_enabled() and t.requires_grad)
        for t in tensors
    )


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square, rounded, times the weight: RMSNorm of every Qwen.

    Args:
        x: [..., width]; weight: [width]. Such that it `takes` them.

    Raises:
        RunError: they are not.
    """
    _need(takes(x, weight) and weight.dim() == 1, x, weight)
    out = pool.empty(*x.shape, dtype=x.dtype)
    wide = torch.tensor([eps], dtype=torch.float32, device="cpu")
    given = [t.data_ptr() for t in (x, weight, out, wide)]
    _compiled().run(_name("norm", x), *given, x.numel() // x.shape[-1], x.shape[-1])
    return out


def gated(gate: Tensor, through: Tensor) -> Tensor:
    """silu(gate) * through, where the gate was. Both such that it `takes` them, of one shape.

    Raises:
        RunError: they are not.
    """
    _need(takes(gate, through) and gate.shape == through.shape, gate, through)
    given = gate.data_ptr(), through.data_ptr()
    _compiled().run(_name("gate", gate), *given, gate.numel())
    return gate


def probabilities(scores: Tensor, out: Tensor) -> Tensor:
    """Softmax of causal scores.

    Args:
        scores: [batch, queries, keys] float32 in one piece, used up; the last query sees all keys,
            each before it one less. Keys are a multiple of `LANES`.
        out: of its shape, bfloat16, in one piece.

    Returns:
        `out`, where a query does not see a key 0.

    Raises:
        RunError: they are not.
    """
    _need(
        scores.dim() == 3
        and scores.shape == out.shape
        and scores.shape[1] <= scores.shape[2]
        and scores.shape[2] % LANES == 0
        and scores.is_contiguous()
        and out.is_contiguous()
        and scores.device.type == out.device.type == "cpu"
        and (scores.dtype, out.dtype) == (torch.float32, torch.bfloat16),
        scores,
        out,
    )
    _compiled().run("softmax", scores.data_ptr(), out.data_ptr(), *scores.shape)
    return out


def narrows(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x may go to `narrow`: float32 that is to be bfloat16."""
    return dtype == torch.bfloat16 and x.dtype == torch.float32 and x.dim() > 0 and takes(x)


def narrow(x: Tensor, out: Tensor, wide: Tensor | None = None) -> Tensor:
    """x rounded to bfloat16: in `wide` as float32, and returned in `out`.

    Args:
        x: any shape, such that it `narrows`.
        out: bfloat16 of that size, in one piece.
        wide: as x; x itself if None.

    Raises:
        RunError: they are not such.
    """
    wide = x if wide is None else wide
    fits = all(narrows(t, out.dtype) and t.numel() == out.numel() for t in (x, wide))
    _need(fits and out.is_contiguous() and out.device.type == "cpu", x, wide, out)
    _compiled().run("narrow", *(t.data_ptr() for t in (x, wide, out)), x.numel())
    return out


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these may go to `rotated`: on the CPU, without gradients, of such sizes."""
    return (
        (x.dtype, cos.dtype) in _ROTATES
        and cos.dtype == sin.dtype
        and all(
            type(t) is Tensor
            and t.device.type == "cpu"
            and t.stride(-1) == 1
            and not t.is_neg()
            and not (torch.is_grad_enabled() and t.requires_grad)
            for t in (x, cos, sin)
        )
        and x.dim() == 4
        and cos.dim() == 3
        and (cos.shape, cos.stride()) == (sin.shape, sin.stride())
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape[1] == x.shape[2]
        and 0 < cos.shape[2] <= x.shape[3]
        and cos.shape[2] % (2 * LANES) == x.shape[3] % LANES == 0
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: of a head's first channels each one of the first half turned with one of the second.

    Args:
        x: [batch, heads, tokens, head], float32 or bfloat16. cos, sin: [batch or 1, tokens,
            channels that turn], float32 or as x. Such that it `turns` them.

    Returns:
        As x; tokens before heads in memory.

    Raises:
        RunError: they are not such.
    """
    _need(turns(x, cos, sin), x, cos, sin)
    batch, heads, tokens, width = x.shape
    out = pool.empty(batch, tokens, heads, width, dtype=x.dtype)
    given = [t.data_ptr() for t in (x, cos, sin, out)]
    sizes = batch, tokens, heads, width, cos.shape[2] // 2
    apart = 0 if cos.shape[0] == 1 else cos.stride(0)
    _compiled().run(
        _ROTATES[x.dtype, cos.dtype], *given, *sizes, *x.stride()[:3], apart, cos.stride(1)
    )
    return out.transpose(1, 2)


def _need(right: bool, *given: Tensor) -> None:
    """Addresses are all that the code gets: what lies there has to be what it takes it for."""
    if not right:
        raise RunError(
            "machine code of a block",
            expected="what `fused.py` says, on the CPU, row after row",
            got=", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in given),
        )


def _name(function: str, x: Tensor) -> str:
    return function + ("16" if x.dtype == torch.bfloat16 else "")


@cache
def _compiled() -> Program:
    return Program(Writer().text(), widest())


def _trial() -> list[float]:
    """How far each result is off, in what it may be at the most."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    off = []

    def made(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=draw, device="cpu", dtype=torch.float32)

    for dtype, near in _NEAR.items():
        x, y, weight = (made(*shape).to(dtype) for shape in ((5, 48), (5, 48), (48,)))
        own = F.rms_norm(x.double(), (48,), weight.double(), 1e-6)
        gate = F.silu(x.double()) * y.double()
        for got, want in ((norm(x, weight, 1e-6), own), (gated(x.clone(), y), gate)):
            off.append(float((got - want).norm() / want.norm()) / near)
    x, out = made(5, 48), torch.empty(5, 48, dtype=torch.bfloat16, device="cpu")
    want = x.bfloat16().double()
    off += [2.0 * bool((got != want).any()) for got in (narrow(x, out), x)]
    scores = made(2, 16, 48)
    hidden = scores.masked_fill(torch.ones(16, 48, device="cpu").triu(33) > 0, -torch.inf)
    want = hidden.double().softmax(-1)
    out = torch.empty(scores.shape, dtype=torch.bfloat16, device="cpu")
    got = probabilities(scores, out)
    off.append(float((got - want).norm() / want.norm()) / _NEAR[torch.bfloat16])
    x, cos, sin = made(2, 3, 5, 48), made(1, 5, 32), made(1, 5, 32)
    for kind, angles in _ROTATES:
        given = x.to(kind), cos.to(angles), sin.to(angles)
        a, b, rest = given[0].double().chunk(3, -1)
        (c, d), (s, t) = (angle.double()[:, None].chunk(2, -1) for angle in given[1:])
        want = torch.cat((a * c - b * s, b * d + a * t, rest), -1)
        off.append(float((rotated(*given) - want).norm() / want.norm()) / _NEAR[kind])
    return off
