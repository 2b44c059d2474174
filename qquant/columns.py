"""The solver's two loops over columns, one block at a time, in the forms that machines are fast at.

GPTQ's pass and the descent of `gptq.refine` visit columns in order, and each visit changes the
columns after it. Rows never meet, so a block of columns is a small problem of its own. Blocks are
held transposed, [B, N]. Four forms do it:

- `steps`: plain torch, every change rank one, every product rounded before it is subtracted. The
  form of an accelerator without Triton, and the definition of what the kernels compute.
- `triton`: `columns_triton.py`, one kernel per block, bit for bit what `steps` gives.
- `llvm`: `solver_code.py`, the same in machine code for a CPU, in float32.
- `stretches`: `columns_cpu.py`. Changes go rank one inside a stretch of sixteen columns and by
  matmul beyond it. The form of a CPU without such code, and of float64 there.

`stretches` adds up in another order, so it may differ from the others in the last bit of a value
and, seldom, in a code. In float64 that does not happen on any matrix of the tests.

`choose` says which form a device gets. A kernel is tried there before it is used: where it does
not compile or does not give exactly what `steps` gives, another form runs, and the reason is told.
Triton's has not yet been run on a GPU.

Left out on purpose: what is between blocks, a matmul (`gptq.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import columns_cpu, llvm_code
from .devices import against_triton

Form = Literal["stretches", "steps", "triton", "llvm"]
WIDEST = 128  # columns of a block that Triton's kernel takes


class Choice(NamedTuple):
    """The form that runs, and why it is not a faster one ("" where this machine has none)."""

    form: Form
    reason: str = ""


def choose(device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """The form for matrices there; compiles and tries the kernel where it might be used."""
    return _choose(device, dtype)


@cache
def _choose(device: torch.device, dtype: torch.dtype) -> Choice:
    if device.type == "cuda":
        slow = against_triton(lambda: _is_right("triton", device))
        return Choice("steps", slow) if slow else Choice("triton")
    if device.type != "cpu" or dtype != torch.float32:
        return Choice("stretches")
    if why := llvm_code.against(_wrong_in_llvm):
        return Choice("stretches", why if llvm_code.curable() else "")
    return Choice("llvm")


def _wrong_in_llvm() -> str | None:
    """What is not right with the machine code, or None; the search for scales goes by it too."""
    from .solver_code import searches_right

    right = _is_right("llvm", torch.device("cpu")) and searches_right()
    return None if right else "its results are not those of plain torch"


def gptq_block(
    wanted: Tensor,
    weights: Tensor,
    coupling: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    maxq: int,
    codes: Tensor,
    form: Form,
) -> Tensor:
    """Rounds a block's columns one after the other, carrying each change on to the later ones.

    Column i becomes q_i, of its group's grid the value nearest to v_i, and d_i = q_i - w_i; then
    v_j -= c_ij d_i for all later j (arXiv 2210.17323, Algorithm 1, with c_ij = r_ij / r_jj of the
    Hessian's own factor; see `gptq.py`).

    Args:
        wanted: [B, N], the v_i, changed to what they are when each is rounded. weights: [B, N], the
            w_i. coupling: [B, B], read above its diagonal. scales, zeros: [G, N]. group: [B] int64,
            each column's row of them. maxq: the largest code. codes: [B, N] uint8, filled.
        form: which of them; `triton` takes at most `WIDEST` columns, `llvm` float32 on a CPU.

    Returns:
        All d_i, [B, N].
    """
    if form == "triton":
        from .columns_triton import gptq_block as run

        return run(wanted, weights, coupling, scales, zeros, group, maxq, codes)
    if form == "llvm":
        from .solver_code import gptq_block as run

        return run(wanted, weights, coupling, scales, zeros, group, maxq, codes)
    if form == "stretches":
        return columns_cpu.gptq_block(wanted, weights, coupling, scales, zeros, group, maxq, codes)
    group_of, code_rows = group.tolist(), codes.unbind()

    def visit(i: int, col: Tensor) -> Tensor:
        scale, zero = scales[group_of[i]], zeros[group_of[i]]
        q = (col / scale).round_().add_(zero).clamp_(0, maxq)
        code_rows[i].copy_(q)
        return q.sub_(zero).mul_(scale).sub_(weights[i])

    return _loop(wanted, coupling, visit)


def descent_block(
    pull: Tensor,
    h: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    form: Form,
) -> Tensor:
    """Gives each column of a block its best code, all others given, one after the other.

    Args:
        pull: [B, N], minus half the gradient, changed. h: [B, B] symmetric. codes: [B, N] floating,
            about their zero, changed. scale: [N]. low, high: [N] or one for all, the least and the
            largest code.
        form: as for `gptq_block`.

    Returns:
        The changes of the weights, [B, N].
    """
    # In float64 and rounded once, as a Python number is.
    factors = (1.0 / h.diagonal().double()).to(pull.dtype)
    inverse = scale.reciprocal()
    if form == "triton":
        from .columns_triton import descent_block as run

        return run(pull, h, factors, codes, scale, inverse, low, high)
    if form == "llvm":
        from .solver_code import descent_block as run

        return run(pull, h, factors, codes, scale, inverse, low, high)
    if form == "stretches":
        return columns_cpu.descent_block(pull, h, factors, codes, scale, inverse, low, high)
    rows, factor = codes.unbind(), factors.tolist()

    def visit(i: int, gradient: Tensor) -> Tensor:
        code = rows[i]
        wanted = (gradient * factor[i]).mul_(inverse).add_(code)
        wanted.round_().clamp_(low, high)
        change = torch.sub(wanted, code).mul_(scale)
        code.copy_(wanted)
        return change

    return _loop(pull, h, visit)


def _loop(values: Tensor, coupling: Tensor, visit: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Visits rows in order, carrying each row's change on to the later ones.

    `visit(i, values[i])` gives d_i [N]; then values[j] -= coupling[i, j] d_i for all j > i.
    Returns all d_i, [B, N].
    """
    out = torch.empty_like(values)
    for i in range(values.shape[0]):
        out[i] = visit(i, values[i])
        values[i + 1 :].sub_(coupling[i, i + 1 :, None] * out[i])
    return out


def _is_right(kernel: Form, device: torch.device) -> bool:
    """Whether a kernel gives what `steps` gives: all that a block leaves, bit for bit."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(
            device
        )

    size, rows = WIDEST - 3, 77
    wanted, weights, coupling = made(size, rows), made(size, rows), 0.1 * made(size, size)
    h = coupling.T @ coupling + torch.eye(size, device=device, dtype=torch.float32)
    scales = made(4, rows).abs_().add_(0.1)
    zeros = torch.full_like(scales, 8.0)
    group = torch.arange(size, device=device) % 4
    found: list[tuple[Tensor, ...]] = []
    forms: tuple[Form, Form] = ("steps", kernel)
    for form in forms:
        codes = torch.empty(size, rows, dtype=torch.uint8, device=device)
        values = wanted.clone()
        rounded = gptq_block(values, weights, coupling, scales, zeros, group, 15, codes, form)
        about = codes.float() - 8
        moved = descent_block(
            wanted.clone(), h, about, scales[0], -zeros[0], 15 - zeros[0], form=form
        )
        found.append((values, codes, rounded, about, moved))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))
