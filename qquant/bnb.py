"""bitsandbytes models loaded and saved: from a directory, or from a 16-bit one on the fly.

Loading is transformers' own: its quantizer builds the linears, so what runs here is what runs for
anybody who calls `from_pretrained`. What is added is the choice of dtypes (a GPU without bfloat16
computes in float16; a CPU without native bfloat16 in float32), a word on what stays in 16 bits
unasked (a mixture's experts), and a guard (`bnb_guard.py`) against saving a model that has run.

`save` opens what it wrote before anybody can find it. The usual way to a directory is another
(`bnb_convert.py`): it loads no model, streams, and makes the card and the manifest too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .bnb_check import check_states
from .bnb_guard import bnb_linears, guard, refuse_if_run
from .bnb_layout import BnbLayout, is_bnb, linears_of, quantization_config
from .bnb_spec import HEAD, BnbSpec, nothing_left, refuse_tied_head, skipped
from .bnb_state import left_in_16_bit, need_bitsandbytes
from .checkpoint import Checkpoint
from .complete import missing_tensors
from .devices import native_bfloat16
from .errors import CheckpointError, QQuantError, SpecError, VerifyError
from .findings import VerifyReport, some
from .models import register
from .models.families import FAMILIES, check_config, family_of
from .models.shapes import missing_tensor
from .publish import WorkDir
from .sums import write_sums

log = logging.getLogger(__name__)

# Loaded by transformers alone, and only on the fly.
MIXTURES = tuple(name for name, family in FAMILIES.items() if family.experts)


class BnbLoaded(NamedTuple):
    """What `load_model` gives.

    Attributes:
        model: in eval mode, guarded (`bnb_guard.py`).
        used: method by quantized linear.
        compute_dtype: of the products at 4 bits; None at 8, where bitsandbytes chooses.
        placed: device by part of the model, where it is on more than one.
        notes: what is not as one might expect, in words.
    """

    model: Any
    used: dict[str, str]
    compute_dtype: torch.dtype | None
    placed: dict[str, str]
    notes: tuple[str, ...]


def compute_dtype(spec: BnbSpec, dtype: str, device: torch.device) -> str:
    """What a spec's `auto` comes to where `dtype` would do; what is named stays."""
    if spec.compute_dtype != "auto":
        return spec.compute_dtype
    if device.type == "cuda" and dtype == "bfloat16" and not native_bfloat16(device):
        return "float16"
    return dtype


def compute_notes(spec: BnbSpec, dtype: str, device: torch.device) -> tuple[str, ...]:
    """What there is to say of `compute_dtype`'s answer."""
    found = compute_dtype(spec, dtype, device)
    if spec.bits == 8 or spec.compute_dtype != "auto" or found == dtype:
        return ()
    return (f"4-bit products in {found}: this GPU has no {dtype}",)


def check_loadable(checkpoint: Checkpoint) -> None:
    """Refuses what is no Qwen, or not the one of its config.json. A mixture of experts may be
    loaded: its experts stay in 16 bits and are named.

    Raises:
        CheckpointError: `model_type` is another's, or not supported; as `check_config`.
    """
    check_config(checkpoint.config, family_of(checkpoint.config), checkpoint.tensors)


def load_model(
    checkpoint: Checkpoint,
    spec: BnbSpec | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compute: str = "auto",
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    trust_remote_code: bool = False,
) -> BnbLoaded:
    """A model whose linears are bitsandbytes'.

    Args:
        checkpoint: a bitsandbytes directory with `spec` None, or a 16-bit one to quantize with it.
        device: where all of it goes, unless a `device_map` says otherwise.
        dtype: of everything that is not quantized.
        compute: dtype of the products at 4 bits. `auto` is what the spec or the directory says; a
            spec that says `auto` means `dtype`. A GPU without bfloat16 then takes float16.
        device_map, max_memory: transformers' own.

    Raises:
        MissingDependencyError: bitsandbytes is missing or too old.
        CheckpointError: the directory does not fit `spec`, or transformers cannot load it.
        SpecError: no linear is left to quantize, or 8 bits are given a compute dtype.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    need_bitsandbytes()
    register()
    if spec is None:
        layout = BnbLayout.parse(checkpoint.quantization_config or {})
        wanted, natural = BnbSpec(layout.method, compute_dtype=compute), layout.compute_dtype
    else:
        wanted = spec if compute == "auto" else replace(spec, compute_dtype=compute)
        natural = str(dtype).removeprefix("torch.")
    products = compute_dtype(wanted, natural, device)
    for name in missing_tensors(checkpoint, linears_of(checkpoint.tensors)):
        raise missing_tensor(name, checkpoint.tensors)
    local = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, **local)
        more: dict[str, Any] = {}
        if spec is not None:
            more["quantization_config"] = _transformers_config(checkpoint, spec, products)
        if max_memory is not None:
            more["max_memory"] = dict(max_memory)
            device_map = "auto" if device_map is None else device_map
        with _no_progress():
            model, found = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                config=config,
                dtype=dtype,
                device_map={"": device} if device_map is None else device_map,
                use_safetensors=True,
                output_loading_info=True,
                **local,
                **more,
            )
    except (torch.OutOfMemoryError, QQuantError):
        raise
    except Exception as error:  # whatever transformers raises over files it was not made for
        raise CheckpointError(
            f"{checkpoint.path.name}, loaded by transformers with bitsandbytes",
            expected="a model it can load",
            got=(str(error).splitlines() or [type(error).__name__])[0][:300],
        ) from error
    _refuse_gaps(model, found, checkpoint)
    model.requires_grad_(False).eval()
    linears = dict(bnb_linears(model))
    if not linears:
        _refuse_none(checkpoint, spec)
    if spec is None:
        _compute_in(model, linears, dtype, getattr(torch, products))
    guard(model)
    notes = compute_notes(wanted, natural, device)
    if spec is None and wanted.bits == 4 and compute == "auto" and _slow(products, device):
        notes += (
            "4-bit products in bfloat16, as the directory says, which this CPU has no instructions "
            'for: compute_dtype="float32" is several times as fast on many tokens',
        )
    if stay := stays_in_16_bit(model):
        matrices = f"{len(stay)} matrices stay in 16 bits, bitsandbytes does not quantize them"
        notes += (f"{matrices}: {some(stay)}",)
    for note in notes:
        log.warning("%s", note)
    spread = getattr(model, "hf_device_map", {})
    placed = {part: f"cuda:{p}" if isinstance(p, int) else str(p) for part, p in spread.items()}
    return BnbLoaded(
        model,
        {name: f"bitsandbytes {wanted.method}" for name in linears},
        getattr(torch, products) if wanted.bits == 4 else None,
        placed if len(set(placed.values())) > 1 else {},
        notes,
    )


def _refuse_gaps(model: Any, found: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """transformers fills what a directory lacks with random numbers and only logs it.

    Args:
        found: its loading info.

    Raises:
        CheckpointError: names a tensor that is missing, or a linear without scales.
    """
    head = f"{HEAD}.weight" if getattr(model.config, "tie_word_embeddings", False) else None
    for name in sorted(set(found["missing_keys"]) - {head}):
        raise missing_tensor(name, checkpoint.tensors)
    for name, linear in bnb_linears(model):
        if all(getattr(linear.weight, kind, None) is None for kind in ("quant_state", "SCB")):
            raise CheckpointError(
                f"{name}: scales",
                expected="beside its codes",
                got="none",
                cure="The directory is incomplete: download or quantize it again",
            )


def _slow(dtype: str, device: torch.device) -> bool:
    return dtype == "bfloat16" and device.type == "cpu" and not native_bfloat16(device)


def _refuse_none(checkpoint: Checkpoint, spec: BnbSpec | None) -> None:
    """Where bitsandbytes has found nothing to do.

    Raises:
        SpecError: since the spec leaves all of it out.
        CheckpointError: since the directory holds nothing for it.
    """
    if spec is not None:
        raise nothing_left(spec)
    raise CheckpointError(
        checkpoint.path.name, expected="linears that bitsandbytes quantized", got="none"
    )


def _compute_in(
    model: Any, linears: Mapping[str, Any], dtype: torch.dtype, products: torch.dtype
) -> None:
    """Takes what is not quantized to `dtype`, and 4-bit products to `products`.

    transformers leaves a quantized directory's tensors in the dtype of the file, whatever dtype is
    asked for.
    """
    packed = {id(module.weight) for module in linears.values()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in packed and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    for module in linears.values():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = products
            module.compute_type_is_set = True
    model.config.dtype = dtype
    if hasattr(model.config, "set_precision"):  # original Qwen says it in flags, too
        model.config.set_precision(dtype)


@contextmanager
def _no_progress() -> Iterator[None]:
    """Keeps transformers from drawing, which is the caller's to decide."""
    from transformers.utils import logging as transformers_logging

    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights with the scales and tables of its linears."""
    held = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in held.values())


def _transformers_config(checkpoint: Checkpoint, spec: BnbSpec, products: str) -> Any:
    """The spec as transformers' `BitsAndBytesConfig`; `products` is the compute dtype."""
    from transformers import BitsAndBytesConfig

    if checkpoint.quantization_config is not None:
        raise SpecError(
            "method",
            expected="a 16-bit checkpoint to quantize on the fly",
            got=f"{checkpoint.path.name}, quantized already",
            cure="Leave method out to load it as it is",
        )
    names = [
        info.name.removesuffix(".weight")
        for info in checkpoint.tensors.values()
        if info.name.endswith(".weight") and len(info.shape) == 2
    ]
    refuse_tied_head(checkpoint.config.get("tie_word_embeddings") is True, spec.skip)
    skip = sorted({*skipped(names, spec.skip), *({HEAD} & set(spec.skip))})
    return BitsAndBytesConfig(**quantization_config(spec, products, skip))


def stays_in_16_bit(model: nn.Module) -> list[str]:
    """Matrices of a loaded model that stay in 16 bits without having been left out by name."""
    config: Any = model.config
    quant = config.quantization_config
    named = quant.get("llm_int8_skip_modules") if isinstance(quant, dict) else None
    named = named or getattr(quant, "llm_int8_skip_modules", None) or []
    linears = {name for name, _ in bnb_linears(model)}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    embeddings = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings()  # type: ignore[operator]
    }
    apart = {f"{name}.weight" for name in {*embeddings, *named}}
    return left_in_16_bit(shapes, linears, apart)


def save(
    model: Any,
    dst: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Saves a loaded bitsandbytes model that has not run; the target appears once it is verified.

    For a published directory use `qquant quantize`, which also writes the card and the manifest.

    Args:
        model: loaded with bitsandbytes, by `load` or by `from_pretrained`.
        dst: must not exist, unless `overwrite`.
        tokenizer: saved beside it, if given.

    Raises:
        RunError: the model has run. Load it again and save it first.
        SpecError: it is no bitsandbytes model.
        VerifyError: what was written is not whole; the target is as it was.
    """
    quant = getattr(model.config, "quantization_config", None)
    found = quant if isinstance(quant, dict) or quant is None else quant.to_dict()
    if not is_bnb(found):
        raise SpecError("model", expected="one loaded with bitsandbytes", got="another")
    refuse_if_run(model)
    with WorkDir(dst, need_bytes=stored_bytes(model), overwrite=overwrite) as work:
        # transformers cannot take back what its loader of quantized files did; for dense models
        # there is nothing to take back.
        mixture = getattr(model.config, "model_type", None) in MIXTURES
        with _no_progress():
            model.save_pretrained(work.path, save_original_format=mixture)
        if tokenizer is not None:
            tokenizer.save_pretrained(work.path)
        written = Checkpoint.open(work.path)
        report = VerifyReport(work.path.name)
        rows = check_states(written, BnbLayout.parse(written.quantization_config or {}), report)
        count = sum(1 for _ in bnb_linears(model))
        if len(rows) != count:
            report.problem("quantized linears", count, len(rows))
        if not report.ok:
            raise VerifyError(
                "the written directory",
                expected="whole bitsandbytes states",
                got="; ".join(str(p) for p in report.problems[:3]),
                cure="The target was not touched; load the model again and save it at once",
            )
        write_sums(work.path, {})
        return work.publish()
