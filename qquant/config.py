"""What a run is asked to do, as frozen values: the whole of them goes into the manifest.

Three dataclasses, one for each thing that a result depends on: how weights are rounded
(`QuantSpec`), what the model reads meanwhile (`CalibrationSpec`), how the directory is written
(`OutputSpec`). Recipes are named `QuantSpec` settings and nothing else. Values are checked when
they are made, so a spec that exists is a valid one. Standard library only: `qquant --help` imports
this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any

from .errors import SpecError, shown

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128, 256, 512, 1024)
METHODS = ("gptq", "rtn")
DTYPES = ("float16", "bfloat16")
FORMATS = ("gptq", "compressed-tensors")


# By the annotation of a field: what its value may be, and how that is called.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float, type(None)), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
    "tuple[int, ...]": ((tuple,), "whole numbers"),
    "tuple[str, ...]": ((tuple,), "names"),
}


def check_kinds(spec: Any) -> None:
    """Refuses values of the wrong kind, which come from JSON and from callers without a checker.

    Args:
        spec: a dataclass whose fields are annotated with keys of `_KINDS`; lists become tuples.

    Raises:
        SpecError: names the field.
    """
    for field in fields(spec):
        kinds, expected = _KINDS[str(field.type)]
        value = getattr(spec, field.name)
        if tuple in kinds and isinstance(value, list):
            value = tuple(value)
            object.__setattr__(spec, field.name, value)
        inner = value if tuple in kinds and isinstance(value, tuple) else ()
        of = int if "int" in str(field.type) else str
        if (
            not isinstance(value, kinds)
            or (isinstance(value, bool) and bool not in kinds)
            or (isinstance(value, int) and abs(value) >= 1 << 63)
            or any(not isinstance(item, of) or isinstance(item, bool) for item in inner)
        ):
            raise SpecError(field.name, expected=expected, got=shown(repr(value)))


@dataclass(frozen=True)
class QuantSpec:
    """How each linear's weight is rounded.

    Attributes:
        bits: 2, 3, 4 or 8 per weight.
        group_size: input columns that share one scale; -1 for one scale per output channel.
        sym: symmetric grid with the zero fixed in the middle (what vLLM's fast kernels read).
        method: `gptq` or `rtn` (round to nearest, the baseline: no calibration).
        act_order: quantize columns by falling Hessian diagonal, with the groups fixed beforehand,
            so that `g_idx` stays trivial and every reader keeps its fast path.
        damp: added to the Hessian's diagonal, as a share of the diagonal's mean.
        scale_search: candidate clippings tried per group, by error weighted with the Hessian's
            diagonal; 0 takes the plain maximum.
        negative_scales: let the search also turn a symmetric group's grid round. The grid reaches
            one step further on one side (-8 to 7 at 4 bits); a negative scale puts that side where
            the group needs it. Readers multiply by the scale whatever its sign.
        sweeps: rounds of scale refit and coordinate descent after the GPTQ pass; 0 for none.
        correct: strength of the input correction from a full-precision stream (0 = one stream
            only).
        correct_residual: share of the stream's own accumulated error taken back at the linears
            that write to the residual stream.
        correct_damp: damping of the correction's inverse, as a share of the mean diagonal.
        correct_share: share of the calibration batches that run in the full-precision stream too.
            Half costs 4% of KL on the demo checkpoint and saves a quarter of the time; a quarter
            is too few there (KL doubles): the correction then fits noise.
        expert_tokens: tokens that an expert of a mixture needs, per input of its gate, to be solved
            by what is routed to it alone. One with fewer is named, is given other tokens of the
            same calibration text to make up the number, evenly spread over those that went to other
            experts, and goes without the input correction; so does one to which both streams send
            fewer tokens. 0 leaves every expert to its own tokens, and one without any to rounding.
        block_size: columns per lazy update; changes speed, not the codes.
        target_bpw: bits per weight to stay within, codes, scales and zero points of the quantized
            linears together (see `mixed`); each linear's bits are then chosen by measured loss, and
            `bits` becomes the most common width. None for `bits` everywhere.
        bit_choices: the widths to choose from.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    method: str = "gptq"
    act_order: bool = True
    damp: float = 0.1
    scale_search: int = 20
    negative_scales: bool = True
    sweeps: int = 3
    correct: float = 1.0
    correct_residual: float = 1.0
    correct_damp: float = 0.1
    correct_share: float = 0.5
    expert_tokens: float = 1.0
    block_size: int = 128
    target_bpw: float | None = None
    bit_choices: tuple[int, ...] = (3, 4, 8)

    def __post_init__(self) -> None:
        check_kinds(self)

        def need(ok: bool, key: str, expected: str, cure: str) -> None:
            if not ok:
                raise SpecError(key, expected=expected, got=repr(getattr(self, key)), cure=cure)

        need(self.bits in BITS, "bits", f"one of {BITS}", "Use --bits 4 or --bits 8.")
        need(
            self.group_size in GROUP_SIZES,
            "group_size",
            f"-1 (per channel) or one of {GROUP_SIZES[1:]}, which readers know",
            "Use --group-size 128, which every reader's fast kernel supports.",
        )
        need(self.method in METHODS, "method", f"one of {METHODS}", "Use --method gptq.")
        need(0 <= self.damp < 1, "damp", "at least 0, below 1", "Use --damp 0.1.")
        need(0 <= self.scale_search <= 1000, "scale_search", "0 to 1000", "Use 20.")
        need(0 <= self.sweeps <= 100, "sweeps", "0 to 100", "Use 3.")
        need(0 <= self.correct <= 1, "correct", "0 to 1", "Use 1, or 0 for one stream.")
        need(0 <= self.correct_residual <= 1, "correct_residual", "0 to 1", "Use 1.")
        need(0 < self.correct_damp <= 10, "correct_damp", "above 0, up to 10", "Use 0.1.")
        need(0 < self.correct_share <= 1, "correct_share", "above 0, up to 1", "Use 0.5.")
        need(0 <= self.expert_tokens <= 1000, "expert_tokens", "0 to 1000", "Use 1.")
        need(self.block_size >= 1, "block_size", "at least 1", "Use 128.")
        choices = self.bit_choices
        need(
            len(choices) > 1 and choices == tuple(b for b in BITS if b in choices),
            "bit_choices",
            f"two or more of {BITS}, rising",
            "Use --bit-choices 3,4,8, or 4,8 for vLLM.",
        )
        if self.target_bpw is not None:
            need(
                isfinite(self.target_bpw) and 0 < self.target_bpw <= 16,
                "target_bpw",
                "bits per weight, above 0",
                "Use --target-bpw 4.5.",
            )
            need(
                self.method == "gptq",
                "method",
                "gptq, since bits are chosen by loss on calibration data",
                "Leave --method out, or use --bits without --target-bpw.",
            )

    @property
    def streams(self) -> int:
        """Streams the walk carries: 2 where a correction needs the full-precision one."""
        return 2 if self.method == "gptq" and self.correct > 0 else 1

    def group_of(self, inputs: int) -> int:
        """Input columns per group of a linear with that many inputs."""
        return inputs if self.group_size == -1 else self.group_size

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bit_choices": list(self.bit_choices)}


# Named settings. `qwen` is what Qwen's own run_gptq.py used for the published checkpoints
# (QwenLM/Qwen, run_gptq.py: damp_percent 0.01, desc_act False, static_groups False, sym True).
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"correct_share": 1.0, "correct_damp": 0.05, "sweeps": 8},
    "fast": {"scale_search": 10, "sweeps": 1, "correct": 0.0, "correct_residual": 0.0},
    "qwen": {
        "act_order": False,
        "damp": 0.01,
        "scale_search": 0,
        "negative_scales": False,
        "sweeps": 0,
        "correct": 0.0,
        "correct_residual": 0.0,
        "expert_tokens": 0.0,
    },
}


def spec_from_recipe(recipe: str, **changes: Any) -> QuantSpec:
    """The recipe's `QuantSpec` with `changes` (those not None) applied.

    Raises:
        SpecError: the recipe or a key is unknown, or a value is out of range.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise SpecError(
            "recipe",
            expected=f"one of {', '.join(RECIPES)}",
            got=repr(recipe),
            cure="Leave --recipe out for the default.",
        )
    known = {f.name for f in fields(QuantSpec)}
    given = {k: v for k, v in changes.items() if v is not None}
    if extra := sorted(set(given) - known):
        raise SpecError(extra[0], expected=f"one of {sorted(known)}", got="an unknown key")
    return replace(QuantSpec(**RECIPES[recipe]), **given)


@dataclass(frozen=True)
class CalibrationSpec:
    """What the model reads while it is measured.

    Attributes:
        sources: `builtin`, `self`, `hf:NAME`, or a path, each optionally followed by `=WEIGHT`.
        samples: sequences.
        seqlen: tokens per sequence.
        seed: seeds the order of the documents and the sampling of `self`.
    """

    sources: tuple[str, ...] = ("builtin",)
    samples: int = 128
    seqlen: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.sources:
            raise SpecError("calibration sources", expected="at least one", got="none")
        for key in ("samples", "seqlen"):
            value = getattr(self, key)
            if value < 1:
                raise SpecError(key, expected="at least 1", got=value, cure=f"Use --{key} 128.")


@dataclass(frozen=True)
class OutputSpec:
    """How the directory is written.

    Attributes:
        dtype: of everything that is not quantized, and of the scales' reader (`torch_dtype`).
        shard_size: bytes per safetensors file at the most.
        format: of GPTQ's codes and scales: `gptq`, or `compressed-tensors` (the same numbers laid
            out otherwise, see `compressed`).
    """

    dtype: str = "float16"
    shard_size: int = 2_000_000_000
    format: str = "gptq"

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.dtype not in DTYPES:
            raise SpecError(
                "dtype", expected=f"one of {DTYPES}", got=repr(self.dtype), cure="Use float16."
            )
        if self.format not in FORMATS:
            raise SpecError(
                "format", expected=f"one of {FORMATS}", got=repr(self.format), cure="Use gptq."
            )
        if self.shard_size < 1_000_000:
            raise SpecError(
                "shard_size", expected="at least 1 MB", got=self.shard_size, cure="Use 2GB."
            )
