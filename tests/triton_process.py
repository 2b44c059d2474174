"""Runs Triton's kernels under its interpreter and prints what came out as one line of JSON.

A process of its own, because TRITON_INTERPRET must be set before Triton is imported, and because
Triton should not be seen by tests that have nothing to do with it.

    TRITON_INTERPRET=1 python tests/triton_process.py columns
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qquant import columns, gptq
from qquant.config import QuantSpec

CPU = torch.device("cpu")
ROWS = 13


def problem(seed: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [N, k] and a Hessian of inputs that go together, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, k, generator=generator, dtype=dtype)
    mix = torch.randn(k, k, generator=generator, dtype=dtype) / k**0.5
    x = torch.randn(512, k, generator=generator, dtype=dtype) @ (torch.eye(k, dtype=dtype) + mix)
    return w, 2 / 512 * x.T @ x


def blocks() -> dict[str, list[bool]]:
    """The kernels against `steps` in float32 and float64: all that either loop leaves."""
    found = {}
    for size, rows, dtype in product((57, 128), (1, 37), (torch.float32, torch.float64)):
        found[f"{size} {rows} {dtype}"] = block(size, rows, dtype)
    return found


def block(size: int, rows: int, dtype: torch.dtype) -> list[bool]:
    generator = torch.Generator().manual_seed(size + rows)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    wanted, weights, whole = made(size, rows) * 4, made(size, rows), made(size, 2 * size) * 0.2
    coupling = whole[:, :size]  # a view into a larger matrix, as the solver's are
    scales = made(3, rows).abs_().add_(0.1) * torch.tensor([[1], [-1], [1]])
    zeros = torch.randint(1, 15, (3, rows), generator=generator).to(dtype)
    group = torch.arange(size) % 3
    low, high, outcomes = -zeros[0], 15 - zeros[0], []
    for form in ("steps", "triton"):
        codes = torch.empty(size, rows, dtype=torch.uint8)
        values = wanted.clone()
        rounded = columns.gptq_block(
            values, weights, coupling, scales, zeros, group, 15, codes, form
        )
        about = codes.to(dtype) - zeros[0]
        h = coupling @ coupling.T + torch.eye(size, dtype=dtype)
        moved = columns.descent_block(wanted.clone(), h, about, scales[0], low, high, form)
        outcomes.append((values, codes, rounded, about, moved))
    return [torch.equal(a, b) for a, b in zip(*outcomes, strict=True)]


def solves() -> dict[str, Any]:
    """Whole solves in the three forms, in float64, where the order of a sum changes no code.

    Every width and every group, each symmetric and not; not every pair of them, which takes long.
    """
    found = {}
    pairs = ((2, -1), (3, 32), (4, 128), (8, -1), (2, 128), (4, 32))
    for sym, (bits, group) in product((True, False), pairs):
        spec = QuantSpec(bits=bits, sym=sym, group_size=group, sweeps=int(group == 32))
        if group == 128 and bits == 4:  # grids found on the way, and a block of another size
            spec = dataclasses.replace(spec, act_order=False, scale_search=0, block_size=192)
        k = {-1: 128, 32: 96, 128: 256}[group]  # -1 with a block, 32 less than one, 128 with two
        w, h = problem(bits + group, k, torch.float64)
        outcomes = [solved(w, h, spec, form) for form in ("stretches", "steps", "triton")]
        first = outcomes[0]
        differ = sum(
            int((a != b).sum()) for other in outcomes[1:] for a, b in zip(first, other, strict=True)
        )
        values = int(first[0].unique().numel())
        found[f"{sym} {bits} {group}"] = {"differ": differ, "codes": values}
    return found


def solved(w: Tensor, h: Tensor, spec: QuantSpec, form: str) -> tuple[Tensor, Tensor, Tensor]:
    choose, columns.choose = columns.choose, lambda *_: columns.Choice(form)
    try:
        solution = gptq.solve(w, h, spec)
    finally:
        columns.choose = choose
    return solution.codes, solution.scales, solution.zeros


def trial_of_a_wrong_kernel() -> bool:
    from qquant import columns_triton

    right = columns_triton.descent_block
    columns_triton.descent_block = lambda *args: right(*args) * 1.0000001
    try:
        return columns._is_right("triton", CPU)
    finally:
        columns_triton.descent_block = right


def of_columns() -> dict[str, Any]:
    return {
        "blocks": blocks(),
        "solves": solves(),
        "trial": columns._is_right("triton", CPU),
        "trial of a wrong kernel": trial_of_a_wrong_kernel(),
    }


def of_decode() -> dict[str, float]:
    """The decode kernels against the dequantized float32 product: relative errors, by case."""
    found = {}
    for bits, group, dtype in product((2, 4, 8), (-1, 32, 128), (torch.float16, torch.bfloat16)):
        rows, n, k = {-1: (1, 72, 160), 32: (5, 40, 320), 128: (17, 136, 256)}[group]
        shape = bits, group, dtype
        found[f"{bits} {group} {dtype}"] = decode(*shape, rows, n, k)
        found[f"{bits} {group} {dtype} middle"] = decode(*shape, rows, n, k, bias=True, middle=True)
        found[f"{bits} {group} {dtype} one"] = decode(*shape, 1, n, k, bias=True)
        found[f"{bits} {group} {dtype} one, middle"] = decode(*shape, 1, n, 4 * k, middle=True)
    half = torch.float16
    found["by g_idx"] = decode(4, 32, half, 3, 72, 256, shuffled=True)
    found["one by g_idx"] = decode(8, 32, half, 1, 72, 256, shuffled=True, middle=True, bias=True)
    found["groups of parts of words"] = decode(2, 8, half, 1, 72, 256)
    found["groups too small for a product"] = decode(4, 8, half, 2, 72, 256)
    for bits, rows in product((2, 4, 8), (1, 2)):
        # Codes about the middle: the inputs' mean does not show, and what is to cancel does.
        shape = bits, 128, half, rows, 40, 4096
        found[f"{bits} bits, {rows} rows of one sign"] = decode(*shape, mean=3.0, middle=True)
    found["in the middle of a word"] = decode(4, 128, half, 1, 40, 256, offset=1)
    found["a column"] = decode(4, 128, half, 1, 40, 256, column=True)
    found["a part of a wider row"] = decode(4, 128, half, 1, 40, 256, beside=1)
    found["many programs, bfloat16"] = decode(4, 128, torch.bfloat16, 1, 160, 256)
    return found


def decode(
    bits: int,
    group: int,
    dtype: torch.dtype,
    rows: int,
    n: int,
    k: int,
    *,
    shuffled: bool = False,
    middle: bool = False,
    bias: bool = False,
    mean: float = 0.0,
    offset: int = 0,
    beside: int = 0,
    column: bool = False,
) -> float:
    from qquant.int4_triton import few_rows
    from qquant.pack import pack_codes

    generator = torch.Generator().manual_seed(bits * n + k)
    groups = 1 if group < 0 else k // group
    size = k // groups
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (groups, n), generator=generator, dtype=torch.uint8)
    if middle:
        zeros.fill_(2 ** (bits - 1))
    if mean:
        drawn = 2 ** (bits - 1) + 2 ** (bits - 3) * torch.randn(n, k, generator=generator)
        codes = drawn.round().clamp(0, 2**bits - 1).to(torch.uint8)
    scales = (torch.rand(groups, n, generator=generator) + 0.1).half()
    index = (torch.arange(k) // size).int()
    if shuffled:
        index = index[torch.randperm(k, generator=generator)]
    drawn = torch.randn(rows * (k + beside) + offset, generator=generator) + mean
    x = drawn.to(dtype)[offset:].view(rows, k + beside)[:, :k]
    if column:
        x = x.T.repeat(1, 2)[:, :1].T
    added = 100 * torch.randn(n, generator=generator).half() if bias else None
    scale_of, zero_of = (t.float()[index.long()].T for t in (scales, zeros))
    weight = (codes.float() - zero_of) * scale_of
    got = few_rows(
        x,
        pack_codes(codes, bits),
        scales,
        None if middle else zeros,
        index,
        added,
        bits,
        0 if shuffled else size,
    )
    assert got.dtype == dtype and got.shape == (rows, n)
    want = x.double() @ weight.double().T
    want = want if added is None else want + added
    return float((got.double() - want).norm() / want.norm())


def of_rebuild() -> dict[str, bool]:
    """Rebuilt weights against torch's form: whether bits are the same, by case.

    The interpreter cuts off where a GPU rounds to bfloat16, so that is held to one unit.
    """
    from qquant.pack import pack_codes
    from qquant.rebuild import _kernel_is_right, weights

    found = {"trial": _kernel_is_right(torch.device("cpu"))}
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for bits, shuffled, dtype in product((2, 4, 8), (False, True), dtypes):
        draw = torch.Generator().manual_seed(bits)
        n, k, groups, part = 200, 160, 5, slice(16, 184)
        codes = torch.randint(0, 2**bits, (n, k), generator=draw, dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (n, groups), generator=draw, dtype=torch.uint8)
        scales = torch.rand(groups, n, generator=draw).half()
        index = (torch.arange(k) // (k // groups)).int()
        if shuffled:
            index = index[torch.randperm(k, generator=draw)]
        given = pack_codes(codes, bits)[:, part], scales[:, part], zeros[part], index, bits
        group = 0 if shuffled else k // groups
        want, got = (weights(*given, group, dtype, form) for form in ("torch", "triton"))
        same = torch.equal(want, got)
        if dtype == torch.bfloat16:
            same = bool(((want - got).abs() <= want.abs() / 128).all())
        found[f"{bits} {shuffled} {dtype}"] = same and got.shape == (k, 168) and got.dtype == dtype
    return found


if __name__ == "__main__":
    cases = {"columns": of_columns, "decode": of_decode, "rebuild": of_rebuild}
    print(json.dumps(cases[sys.argv[1]]()))
