"""Reopens a quantized directory, ours or another's, and says whether it is what it claims to be.

A reader trusts the config: it finds tensors by name, shapes by `bits` and `group_size`, zero points
by `checkpoint_format`. Where the files say otherwise most readers fail late or, worse, load and are
wrong. So everything that can be compared is: index with headers, config with shapes, zero words
with the format, `g_idx` with `desc_act`, hashes with the manifest, the two copies of the config
with each other; and a Qwen has to be there whole (`complete.py`). With the source at hand each
linear's dequantized weight is compared with the weight it came from, and everything that was not
quantized must equal the source in the stored dtype. What of this differs for bitsandbytes is in
`bnb_verify.py`.

`verify` raises only if there is nothing to look at; what is wrong with a directory is a list. The
report's types are in `findings.py`, the comparison in `compare.py`, `inspect` in `inspection.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import compressed, compressed_layout
from .bnb_layout import is_bnb
from .bnb_layout import linears_of as bnb_linears
from .bnb_verify import verify_bnb
from .checkpoint import QUANTIZE_CONFIGS, Checkpoint
from .compare import compare_linear, compare_rest, slices
from .complete import check_alike, check_complete, known_family
from .directory import CONFIG, INDEX, contained, read_json, sha256_file, sha256_files
from .errors import CheckpointError
from .findings import LayerRow, Problem, VerifyReport, some
from .finite import all_finite
from .inspection import InspectReport, inspect
from .layout import KINDS, Layout, block_of, linears_of, within_block
from .manifest import CARD
from .manifest import NAME as MANIFEST
from .pack import symmetric_zero, trivial_g_idx, unpack_zeros
from .sums import NAME as SUMS
from .sums import read_sums

__all__ = ["InspectReport", "LayerRow", "Problem", "VerifyReport", "inspect", "verify"]

_SAME_KEYS = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic")


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    sample: int | None = None,
) -> VerifyReport:
    """Checks a GPTQ or bitsandbytes directory; with `against`, compares it with its source.

    Args:
        path: the directory.
        against: the unquantized source; reads all of it.
        sample: compare only so many linears, evenly spread; all by default.

    Raises:
        CheckpointError: the directory, or the source, cannot be opened at all.
    """
    return examine(path, against, sample)


def examine(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    sample: int | None = None,
    hashes: Mapping[Path, str] | None = None,
) -> VerifyReport:
    """As `verify`, with hashes of files that need not be taken again, by resolved path."""
    checkpoint, broken = Checkpoint.examine(path)
    source = None if against is None else Checkpoint.open(against)
    report = VerifyReport(os.fspath(path), None if against is None else os.fspath(against))
    report.problems += [Problem.of(error) for error in broken]
    _check_index(checkpoint, report)
    _check_hashes(checkpoint, report, hashes or {})
    try:
        if packed := compressed_layout.is_compressed(checkpoint.quantization_config):
            _check_no_gptq_config(checkpoint, report)
            if not broken:
                checkpoint = compressed.view(checkpoint)
        bnb = is_bnb(checkpoint.quantization_config)
        layout = (
            None if bnb or (packed and broken) else Layout.parse(checkpoint.quantization_config)
        )
        if layout is not None and not packed:
            _check_configs(checkpoint, report)
        if broken:
            report.warn("weights", "all shards readable", "broken ones; looked no further")
        elif layout is None:
            verify_bnb(checkpoint, source, sample, report)
        else:
            _check_weights(checkpoint, layout, source, sample, report)
        if not broken:
            names = (bnb_linears if bnb else linears_of)(checkpoint.tensors)
            check_complete(checkpoint, names, report)
    except CheckpointError as error:
        report.problems.append(Problem.of(error))
    return report


def _check_index(checkpoint: Checkpoint, report: VerifyReport) -> None:
    for file, header in checkpoint.headers.items():
        if header.metadata.get("format") != "pt":
            report.problem(
                f"{file}: metadata",
                "format: pt",
                header.metadata.get("format"),
                "transformers refuses such a file: write it again with that metadata.",
            )
    if checkpoint.index is None:
        return
    extra = [
        info.name
        for file, header in checkpoint.headers.items()
        for info in header.tensors
        if checkpoint.tensors.get(info.name) is not info
    ]
    if extra:
        report.problem(f"{INDEX}: weight_map", "every tensor of the shards", f"not {some(extra)}")
    metadata = checkpoint.index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(i.nbytes for h in checkpoint.headers.values() for i in h.tensors)
    files = sum((checkpoint.path / file).stat().st_size for file in checkpoint.headers)
    if total is None:
        report.warn(f"{INDEX}: metadata.total_size", found, "none")
    elif total not in (found, files) and not report.problems:  # gptqmodel's is that of the files
        report.problem(f"{INDEX}: metadata.total_size", found, total, "Write the index again.")


def _check_hashes(checkpoint: Checkpoint, report: VerifyReport, hashes: Mapping[Path, str]) -> None:
    """Every file against `SHA256SUMS` and the manifest, as far as they are there."""
    expected: dict[str, dict[str, object]] = {}  # by file, then by who says so
    for said in (SUMS, MANIFEST):
        if not os.path.lexists(checkpoint.path / said):
            continue
        try:
            files: object = (
                read_sums(checkpoint.path)
                if said == SUMS
                else read_json(checkpoint.path, MANIFEST).get("files")
            )
        except CheckpointError as error:
            report.problems.append(Problem.of(error))
            continue
        if not isinstance(files, dict):
            report.problem(f"{said}: files", "an object", type(files).__name__)
            continue
        # Others list in SHA256SUMS what they think large.
        ours = said == MANIFEST or os.path.lexists(checkpoint.path / MANIFEST)
        for name in sorted(set(checkpoint.files) - set(files)):
            (report.problem if ours else report.warn)(
                f"{said}: files",
                f"a hash of {name}",
                "none",
                "It is not of this directory, or was changed.",
            )
        for name, digest in files.items():
            expected.setdefault(name, {})[said] = digest
    known = dict(hashes)  # a large file may be listed by a thousand spellings of its name
    with contextlib.suppress(CheckpointError, OSError):  # told below, of the file itself
        listed = [name for name in checkpoint.headers if name in expected]
        shards = [contained(checkpoint.path, name).resolve() for name in listed]
        known |= sha256_files([path for path in shards if path not in known])
    for name, digests in sorted(expected.items()):
        said = " and ".join(digests)
        try:
            path = contained(checkpoint.path, name).resolve()
            got = known[path] if path in known else sha256_file(path)
            known[path] = got
        except (CheckpointError, OSError) as error:
            report.problem(f"{said}: {name}", "a file as it was written", error)
            continue
        if wrong := [d for d in digests.values() if d != got]:
            tell = report.warn if name == CARD else report.problem  # people edit their cards
            tell(
                f"{name}: SHA-256 by {said}",
                wrong[0],
                got,
                "The file was changed or damaged after it was written.",
            )


def _check_no_gptq_config(checkpoint: Checkpoint, report: VerifyReport) -> None:
    """Servers would read it as a GPTQ directory's."""
    for name in QUANTIZE_CONFIGS:
        if os.path.lexists(checkpoint.path / name):
            cure = "Remove it: servers read it as a GPTQ directory's."
            report.problem(name, f"not in a {compressed_layout.METHOD} directory", "there", cure)


def _check_configs(checkpoint: Checkpoint, report: VerifyReport) -> None:
    """`quantize_config.json` is what auto-gptq and older servers read instead of config.json."""
    inside = checkpoint.config.get("quantization_config")
    name = next((n for n in QUANTIZE_CONFIGS if os.path.lexists(checkpoint.path / n)), None)
    if inside is None:
        report.problem(
            f"{CONFIG}: quantization_config",
            f"what {name} says",
            "none",
            "transformers reads config.json only: copy it there, with quant_method gptq.",
        )
    if name is None:
        report.warn(QUANTIZE_CONFIGS[0], "a copy of quantization_config", "none")
    if inside is None or name is None:
        return
    beside = read_json(checkpoint.path, name)
    if inside.get("quant_method") != "gptq":
        report.problem(f"{CONFIG}: quantization_config", "quant_method: gptq", "none")
    usual = {"checkpoint_format": "gptq", "sym": True, "desc_act": False}
    normal = [usual | {k: v for k, v in d.items() if v is not None} for d in (inside, beside)]
    for key in sorted(set(inside) | set(beside) | set(_SAME_KEYS)):
        one, two = (d.get(key) for d in normal)
        if one == two or (key == "quant_method" and two is None):
            continue
        tell = report.problem if key in _SAME_KEYS else report.warn
        tell(f"{name}: {key}", f"{one!r}, as in {CONFIG}", repr(two), "Readers read either file.")


def _check_weights(
    checkpoint: Checkpoint,
    layout: Layout,
    source: Checkpoint | None,
    sample: int | None,
    report: VerifyReport,
) -> None:
    linears = linears_of(checkpoint.tensors)
    if not linears:
        report.problem("tensors", "quantized linears (NAME.qweight and so on)", "none")
    _check_coverage(checkpoint, linears, layout, report)
    _check_rules(checkpoint, linears, layout, report)
    names = list(linears)
    if sample is not None and sample < len(names):
        chosen = {names[i * len(names) // sample] for i in range(sample)}
    else:
        chosen = set(names)
    off: dict[str, str] = {}
    for name, kinds in linears.items():
        own = layout.of(name)
        if own is None:
            report.problem(name, "unquantized, as `dynamic` says", "quantized tensors")
            continue
        if not _check_shapes(checkpoint, name, kinds, own, report):
            continue
        row = _check_values(checkpoint, name, own, off, report)
        if source is not None and name in chosen:
            row = compare_linear(checkpoint, source, name, own, row, report)
        report.layers.append(row)
    if off:
        other = "gptq_v2" if layout.checkpoint_format == "gptq" else "gptq"
        whole = len(off) == len(report.layers)
        cure = f"Set checkpoint_format to {other}, or convert" if whole else "Convert"
        report.problem(
            f"zero points of {some(list(off))}",
            f"as {layout.checkpoint_format} stores them",
            f"as {other} stores them: {next(iter(off.values()))}",
            "Readers do not notice: they load it, wrong by one step in every weight. "
            f"{cure} the zero points.",
        )
    _check_finite(checkpoint, {n for n in checkpoint.tensors if not n.endswith(KINDS)}, report)
    if source is not None:
        compare_rest(checkpoint, source, linears, report)


def _check_coverage(
    checkpoint: Checkpoint, linears: dict[str, set[str]], layout: Layout, report: VerifyReport
) -> None:
    """Blocks all there and alike: transformers makes every linear of a block a quantized one."""

    def left_out(stack: str, index: int, name: str) -> bool:
        return layout.of(f"{stack}.{index}.{name}") is None

    check_alike(checkpoint, linears, left_out, report)
    family = known_family(checkpoint)
    if family is not None and family.experts is not None:
        _check_experts(checkpoint, family.experts, report)
    if layout.dynamic or "modules_in_block_to_quantize" in (checkpoint.quantization_config or {}):
        return
    plain = [
        info.name
        for info in checkpoint.tensors.values()
        if block_of(info.name)
        and info.name.endswith(".weight")
        and len(info.shape) == 2
        and (family is None or family.linear_names([info.name]))  # not routers and such
    ]
    if plain:
        report.warn(f"matrices of blocks: {some(plain)}", "quantized like the others", "plain")


def _check_experts(checkpoint: Checkpoint, experts: str, report: VerifyReport) -> None:
    """Each block that has experts apart has as many as config.json says, quantized or not."""
    said = (checkpoint.config.get(key) for key in ("num_experts", "num_local_experts"))
    count = next((value for value in said if value is not None), None)
    found: dict[tuple[str, int], set[str]] = {}
    for name in checkpoint.tensors:
        inner = within_block(name)
        if (place := block_of(name)) and inner.startswith(f"{experts}."):
            number = inner.removeprefix(f"{experts}.").partition(".")[0]
            found.setdefault(place, set()).update({number} if number.isdigit() else ())
    for (prefix, index), numbers in sorted(found.items()):
        if numbers and isinstance(count, int) and numbers != {str(i) for i in range(count)}:
            report.problem(f"{prefix}.{index}.{experts}", f"{count} experts", len(numbers))


def _check_rules(
    checkpoint: Checkpoint, linears: dict[str, set[str]], layout: Layout, report: VerifyReport
) -> None:
    """`dynamic`: rules that mean nothing, and matrices that readers load as one with two widths."""
    if not layout.dynamic:
        return
    family = known_family(checkpoint)
    modules = {n.rpartition(".")[0] for n in checkpoint.tensors}
    deciding = {layout.rule_of(name) for name in modules}
    for rule in layout.dynamic:
        if rule not in deciding:
            report.warn(f"dynamic: {rule}", "a rule that decides for some module", "none")
    if family is None:
        return
    split: list[str] = []
    unseen: list[str] = []
    for whole, parts in family.fused:
        ends = tuple(f".{part}" for part in parts)
        stems = {n.removesuffix(e) + "." for n in linears for e in ends if n.endswith(e)}
        for stem in sorted(stems):
            alike = [layout.of(stem + part) for part in parts]
            if any(own != alike[0] for own in alike):
                split.append(stem + whole)
            elif layout.of(stem + whole) != alike[0]:
                unseen.append(stem + whole)
    cure = "gptqmodel and qquant.load read it; vLLM and SGLang load these linears as one."
    if split:
        report.warn(f"dynamic: {some(split)}", "one setting for all parts", "several", cure)
    if unseen:
        cure = "Readers that look the fused name up (SGLang, older vLLM) take the base settings."
        report.warn(f"dynamic: {some(unseen)}", "rules that match this name too", "none", cure)


def _check_shapes(
    checkpoint: Checkpoint, name: str, kinds: set[str], own: Layout, report: VerifyReport
) -> bool:
    """Whether a linear has its tensors, in the shapes and dtypes that its layout gives them."""
    before = len(report.problems)
    if missing := [kind for kind in KINDS if kind not in kinds]:
        report.problem(f"{name}", ", ".join(KINDS), f"no {', '.join(missing)}")
        return False
    if "weight" in kinds:
        report.problem(name, "quantized tensors only", "a plain weight beside them")
    infos = {kind: checkpoint.tensors[f"{name}.{kind}"] for kind in KINDS}
    if len(infos["g_idx"].shape) != 1 or len(infos["qweight"].shape) != 2:
        report.problem(name, "qweight a matrix, g_idx a vector", infos["qweight"].shape)
        return False
    k, n, b = infos["g_idx"].shape[0], infos["qweight"].shape[1], own.bits
    size = k if own.group_size == -1 else own.group_size
    groups = -(-k // size) if k else 0
    shapes = {
        "qweight": (k * b // 32, n),
        "qzeros": (groups, n * b // 32),
        "scales": (groups, n),
        "g_idx": (k,),
    }
    if (k * b) % 32 or (n * b) % 32 or not k or not n:
        report.problem(name, f"sizes that fill words at {b} bits", f"{k} inputs, {n} outputs")
    for kind, shape in shapes.items():
        if infos[kind].shape != shape:
            report.problem(
                f"shape of {name}.{kind}",
                f"{list(shape)} ({k} inputs, {n} outputs, {b} bits, groups of {own.group_size})",
                list(infos[kind].shape),
                "bits or group_size in the config are not those of the files.",
            )
        if kind != "scales" and infos[kind].dtype != "I32":
            report.problem(f"dtype of {name}.{kind}", "I32", infos[kind].dtype)
    if infos["scales"].dtype not in ("F16", "BF16", "F32"):
        report.problem(f"dtype of {name}.scales", "F16", infos["scales"].dtype)
    elif infos["scales"].dtype != "F16":
        report.warn(f"dtype of {name}.scales", "F16", infos["scales"].dtype)
    if "bias" in kinds and (shape := checkpoint.tensors[f"{name}.bias"].shape) != (n,):
        report.problem(f"shape of {name}.bias", [n], list(shape))
    return len(report.problems) == before


def _check_values(
    checkpoint: Checkpoint, name: str, own: Layout, off: dict[str, str], report: VerifyReport
) -> LayerRow:
    """Zeros, scales and g_idx of one linear; the word of the other format's zeros goes to `off`."""
    qzeros, scales = checkpoint.read(f"{name}.qzeros"), checkpoint.read(f"{name}.scales")
    g_idx = checkpoint.read(f"{name}.g_idx")
    k, (groups, n) = g_idx.numel(), scales.shape
    stored = unpack_zeros(qzeros, own.bits, 0)
    low, high = int(stored.min()), int(stored.max())
    word = "varied"
    if low == high:  # 3-bit words repeat only every third
        word = f"{low} each" if own.bits == 3 else f"0x{int(qzeros[0, 0]) & 0xFFFFFFFF:08X}"
    if own.sym:
        right = symmetric_zero(own.bits) - own.zero_offset
        if low == high == symmetric_zero(own.bits) - (1 - own.zero_offset):
            off[name] = word
        elif not low == high == right:
            report.problem(
                f"zero points of {name}",
                f"all stored as {right} (sym, {own.checkpoint_format})",
                f"{low} to {high}",
                "The config says sym: true and the files are asymmetric, or damaged.",
            )
    elif own.zero_offset and high == 2**own.bits - 1:
        report.warn(
            f"zero points of {name}",
            "1 or more",
            f"{int((stored == high).sum())} of {stored.numel()} wrapped round from 0",
            "Some readers spoil their neighbours too: quantize again with zeros of at least 1.",
        )
    if bad := int((~torch.isfinite(scales)).sum()):
        report.problem(f"{name}.scales", "finite numbers", f"{bad} of {scales.numel()} not")
    elif no_scales := int((scales == 0).sum()):  # negative ones are fine: readers multiply
        report.warn(f"{name}.scales", "other than zero", f"{no_scales} of {scales.numel()} zero")
    _check_g_idx(name, g_idx, own, groups, report)
    return LayerRow(name, k, n, own.bits, own.group_size, word)


def _check_g_idx(name: str, g_idx: Tensor, own: Layout, groups: int, report: VerifyReport) -> None:
    trivial = trivial_g_idx(g_idx.numel(), own.group_size)
    if torch.equal(g_idx, trivial):
        return
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        got = f"{int(g_idx.min())} to {int(g_idx.max())}"
        report.problem(f"{name}.g_idx", f"groups 0 to {groups - 1}", got)
    elif not own.desc_act:
        report.problem(
            f"{name}.g_idx",
            "input // group_size, since desc_act is false",
            "another order",
            "Fast readers look at desc_act and not at g_idx: set desc_act to true.",
        )
    elif not torch.equal(g_idx.sort().values, trivial):
        report.problem(f"{name}.g_idx", "every group with its share of inputs", "other shares")


def _check_finite(checkpoint: Checkpoint, names: set[str], report: VerifyReport) -> None:
    for name in sorted(names):
        for _, part in slices(checkpoint, name):
            if not all_finite(part):
                report.problem(name, "finite numbers", "infinities or NaN")
                break
