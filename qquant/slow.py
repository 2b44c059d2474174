"""Whether the kernel that ran is a slow fallback, and why: what a speed table has to say with it.

A quantized model that runs slower than its original has usually not been given the kernel that its
format is for. Each case here is one where the same directory runs faster elsewhere, or under other
settings; the reason names them. Conditions of bitsandbytes are those of its 0.50.2.
"""

from __future__ import annotations

from collections import Counter

import torch

from .devices import native_bfloat16
from .kernel_choice import faster_missing
from .kernel_report import KernelReport


def slow_kernel(report: KernelReport, rows: int = 1) -> str | None:
    """Why what ran is slow, in words; None where it is no fallback.

    Args:
        report: of the loaded model.
        rows: sequences decoded side by side.
    """
    why = [*_gptq(report, rows), *_bitsandbytes(report), *_emulated(report)]
    return "; ".join(why) or None


def _gptq(report: KernelReport, rows: int) -> list[str]:
    counts = report.counts
    found = []
    if count := counts.get("dequantize", 0):
        reasons = Counter(report.passed_over.values())
        because = ", ".join(reasons) or "asked for by name"
        found.append(
            f"dequantize for {count} linears, which unpacks every weight at every product: not "
            f"torch-int4: {because}"
        )
    if report.device.type == "cpu" and report.requested == "auto" and counts.get("torch-int4"):
        found += filter(None, [faster_missing()])
    for kernel, most in (
        ("torch-int4", report.few_tokens),
        ("avx2", report.avx2_rows),
        ("triton-int4", report.triton_rows),
    ):
        if counts.get(kernel) and rows > most:
            found.append(
                f"dequantize for {counts[kernel]} linears: {kernel} runs up to {most} rows, "
                f"{rows} were decoded side by side"
            )
    return found


def _bitsandbytes(report: KernelReport) -> list[str]:
    if report.device.type != "cpu":
        return []
    methods = {used.removeprefix("bitsandbytes ") for used in report.used.values()}
    found = []
    if four := sorted(methods & {"nf4", "fp4"}):
        from bitsandbytes.functional import has_avx512bf16

        if not has_avx512bf16():
            found.append(
                f"bitsandbytes multiplies {four[0]} by itself only on CPUs with AVX512-BF16: here "
                "every product unpacks its weight"
            )
    if "int8" in methods and torch.backends.cpu.get_cpu_capability() != "AVX512":
        found.append(
            "bitsandbytes multiplies int8 as integers only on CPUs with AVX512: here every product "
            "casts its weight to float32"
        )
    return found


def _emulated(report: KernelReport) -> list[str]:
    """Arithmetic that the device has no instructions for."""
    narrow = {report.dtype, report.compute_dtype} & {torch.bfloat16, torch.float16}
    if report.device.type == "cpu" and torch.float16 in narrow:
        return ["float16 products are emulated on a CPU"]
    if torch.bfloat16 in narrow and not native_bfloat16(report.device):
        return [f"bfloat16 products are emulated: this {_kind(report)} has none"]
    return []


def _kind(report: KernelReport) -> str:
    return "GPU" if report.device.type == "cuda" else "CPU"
