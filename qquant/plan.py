"""What a run will write, decided from headers alone, and the refusals that need no more than that.

Owns the list of tensors of an exported GPTQ directory (names, dtypes and shapes as in `pack.py` and
docs of the format) and the checks of a source against a spec. Nothing here reads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import compressed_layout
from .checkpoint import Checkpoint
from .config import OutputSpec, QuantSpec
from .errors import CheckpointError, SpecError
from .headers import TensorPlan, dtype_name
from .mixed import bits_range, budget_bits
from .models.families import Family, check_config


def check_unquantized(source: Checkpoint, names: Sequence[str]) -> None:
    """Refuses, before any work, a source whose linears `names` are no matrices of floats.

    Raises:
        CheckpointError: already quantized, or a linear is missing.
    """
    if quantized := source.quantization_config:
        raise CheckpointError(
            f"{source.path.name}",
            expected="a BF16, FP16 or FP32 checkpoint",
            got=f"one already quantized ({quantized.get('quant_method', 'unknown method')})",
            cure="Give the checkpoint it was made from",
        )
    for name in names:
        if len(shape := source.info(f"{name}.weight").shape) != 2 or 0 in shape:
            raise CheckpointError(
                f"{name}.weight",
                expected="a matrix with outputs and inputs",
                got=f"shape {list(shape)}",
                cure="The checkpoint is damaged: download or save it again",
            )
    for name in names:
        info = source.info(f"{name}.weight")
        if info.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(
                f"{name}.weight",
                expected="BF16, F16 or F32",
                got=info.dtype,
                cure="Give the unquantized checkpoint",
            )


def check_source(source: Checkpoint, family: Family, spec: QuantSpec) -> None:
    """Refuses, before any work, what cannot be quantized to GPTQ.

    Raises:
        CheckpointError: as in `check_unquantized` and `check_config`.
        SpecError: a linear's shape does not divide.
    """
    check_config(source.config, family, source.tensors)
    if family.varied and spec.target_bpw is not None:
        raise SpecError(
            "target_bpw",
            expected=f"none for {family.model_type}, where the loss of a width is not measured: "
            "its blocks have experts or two kinds of attention",
            got=spec.target_bpw,
            cure="Use --bits 4, or another uniform width",
        )
    names = family.linear_names(source.tensors)
    check_unquantized(source, names)
    family.first_linear(source.tensors)
    inputs = {source.info(f"{name}.weight").shape[-1] for name in names}
    for name in names:
        n, k = source.info(f"{name}.weight").shape
        size = spec.group_of(k)
        if k % size or k % 32:
            fit = [g for g in (128, 64, 32) if all(other % g == 0 for other in inputs)]
            raise SpecError(
                f"{name}.weight: {k} inputs",
                expected=f"a multiple of the group size {size}" if k % size else "a multiple of 32",
                got=k,
                cure=f"Use --group-size {fit[0]}" if fit else "Its shape cannot be packed",
            )
        if n % 32:
            raise SpecError(
                f"{name}.weight: {n} outputs",
                expected="a multiple of 32 (the packing of zero points)",
                got=n,
                cure="Its shape cannot be packed",
            )


def check_format(spec: QuantSpec, out: OutputSpec, family: Family) -> None:
    """Refuses families and widths that the format, or those who read it, do not know.

    Raises:
        SpecError: names the family or the width.
    """
    if out.format == compressed_layout.METHOD:
        compressed_layout.check_family(family)
        for bits in (spec.bits,) if spec.target_bpw is None else spec.bit_choices:
            compressed_layout.check_bits(bits)


def tensor_plan(
    source: Checkpoint,
    family: Family,
    parameters: Sequence[str],
    spec: QuantSpec,
    out: OutputSpec,
    bits: Mapping[str, int] | None = None,
) -> tuple[list[TensorPlan], list[str]]:
    """Every tensor of the exported directory in the order of the model.

    Args:
        parameters: the float model's tensors, in order (`Skeleton.parameters`).
        bits: of the linears that do not have the spec's.

    Returns:
        (the plan, the names that stay in 16 bits). Tensors of the source that are not the model's
        (old rotary tables, say) are in neither.
    """
    dtype = dtype_name(out.dtype)
    linears = set(family.linear_names(source.tensors))
    plan: list[TensorPlan] = []
    kept: list[str] = []
    for parameter in parameters:
        name, _, kind = parameter.rpartition(".")
        shape = source.info(parameter).shape
        if name not in linears:
            plan.append(TensorPlan(parameter, dtype, shape))
            kept.append(parameter)
        elif kind == "weight":
            n, k = shape
            g, b = k // spec.group_of(k), (bits or {}).get(name, spec.bits)
            if out.format == compressed_layout.METHOD:
                parts = compressed_layout.shapes_of(n, k, g, b, spec.sym)
                plan += [TensorPlan(f"{name}.{kind}", *parts[kind]) for kind in parts]
                if f"{name}.bias" in source.tensors:
                    plan.append(TensorPlan(f"{name}.bias", dtype, (n,)))
                continue
            plan += [
                TensorPlan(f"{name}.qweight", "I32", (k * b // 32, n)),
                TensorPlan(f"{name}.qzeros", "I32", (g, n * b // 32)),
                TensorPlan(f"{name}.scales", "F16", (g, n)),
                TensorPlan(f"{name}.g_idx", "I32", (k,)),
            ]
            if family.all_biases or f"{name}.bias" in source.tensors:
                plan.append(TensorPlan(f"{name}.bias", dtype, (n,)))
    return plan, kept


def bytes_needed(
    source: Checkpoint, family: Family, parameters: Sequence[str], spec: QuantSpec, out: OutputSpec
) -> int:
    """Bytes of all tensors of the exported directory; with a target, the most that it allows.

    Args:
        parameters: as for `tensor_plan`.

    Raises:
        SpecError: no choice of bits meets `target_bpw`.
    """
    least, more = spec.bits, 0
    if spec.target_bpw is not None:
        names = family.linear_names(source.tensors)
        shapes = [source.info(f"{name}.weight").shape for name in names]
        weights, sizes = bits_range([(n, k) for n, k in shapes], spec)
        least = spec.bit_choices[0]
        more = budget_bits(spec.target_bpw, weights) - sizes[least]
    plan, _ = tensor_plan(source, family, parameters, replace(spec, bits=least), out)
    return sum(p.nbytes for p in plan) + -(-more // 8)
