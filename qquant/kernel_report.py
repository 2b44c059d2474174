"""What a loaded model runs on: which kernel computes which linear, and why not another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from .kernels import ANY_ROWS, FEW_TOKENS, TRITON_ROWS


@dataclass(frozen=True)
class KernelReport:
    """Which kernel runs which linear, and why not another.

    Attributes:
        requested: the `kernel` argument.
        device, dtype: where and in what the model computes.
        used: kernel by linear; empty for an unquantized directory.
        passed_over: why `auto` gave a linear `dequantize`: what speaks against `torch-int4`
            and `avx2`.
        weight_bytes: bytes of all weights as held in memory, kernels' own packings included.
        compute_dtype: of the products of bitsandbytes' 4-bit linears; None where there are none.
        placed: device by part of the model, where a `device_map` spread it; `device` is then that
            of the embedding.
        few_tokens: rows up to which `torch-int4` runs; more go through `dequantize`.
        avx2_rows, triton_rows: the same of `avx2` and `triton-int4`.
        notes: what is not as one might expect, in words.
        tried: under `auto` on CUDA, by (inputs, outputs, bits, group, whether all zero points are
            the middle): the kernel that was fastest and right, and every candidate's time for one
            row or what is wrong with it.
        without: kernels that `auto` does not try.
        compiled: whether `generate` decodes compiled; then those times are the device's alone.
    """

    requested: str
    device: torch.device
    dtype: torch.dtype
    used: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0
    compute_dtype: torch.dtype | None = None
    placed: dict[str, str] = field(default_factory=dict)
    few_tokens: int = FEW_TOKENS
    avx2_rows: int = ANY_ROWS
    triton_rows: int = TRITON_ROWS
    notes: tuple[str, ...] = ()
    tried: dict[tuple[int, ...], tuple[str, str]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    compiled: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Linears by kernel."""
        return dict(Counter(self.used.values()))

    @property
    def reasons(self) -> dict[str, int]:
        """Linears by the reason `torch-int4` was passed over."""
        return dict(Counter(self.passed_over.values()))

    def __str__(self) -> str:
        places = ", ".join(dict.fromkeys(self.placed.values())) or self.device
        where = f"{_plain(self.dtype)} on {places}"
        if not self.used:
            return f"no quantized linears, {where}"
        parts = [f"{name} for {count} linears" for name, count in sorted(self.counts.items())]
        if "torch-int4" in self.counts:
            parts.append(
                f"int4 inputs in bfloat16 and up to {self.few_tokens} rows, beyond dequantize"
            )
        if "avx2" in self.counts:
            most = "" if self.avx2_rows == ANY_ROWS else f" and up to {self.avx2_rows} rows"
            parts.append(f"avx2 inputs in 16 bits{most}{', beyond dequantize' if most else ''}")
        if "triton-int4" in self.counts:
            parts.append(f"triton-int4 up to {self.triton_rows} rows, beyond dequantize")
        parts += [f"not torch-int4 for {n}: {why}" for why, n in self.reasons.items()]
        if self.compute_dtype is not None:
            parts.append(f"4-bit products in {_plain(self.compute_dtype)}")
        return "; ".join([*parts, where, *self.notes])


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
