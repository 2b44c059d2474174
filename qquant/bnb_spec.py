"""What a bitsandbytes run is asked to do: NF4, FP4 or Int8, and the settings that each of them has.

A spec of its own beside `config.QuantSpec`, because nothing is shared: bitsandbytes rounds every
weight by itself, so there is no calibration, no group size to choose and no solver to set. Its
blocks are fixed (64 weights share a scale at 4 bits, a whole row at 8): transformers offers no
other, and a directory that its loader cannot describe would be of no use.

Also here is how a method is named on the command line: `nf4`, `fp4`, `int8`, or `bnb` with a
number of bits. Standard library only: `qquant --help` imports this.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from .config import METHODS as PLAIN_METHODS
from .config import check_kinds
from .errors import CheckpointError, SpecError

METHODS = ("nf4", "fp4", "int8")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32")
BLOCK = 64  # weights that share a scale at 4 bits
NESTED_BLOCK = 256  # scales that share one, where they are quantized themselves
HEAD = "lm_head"


@dataclass(frozen=True)
class BnbSpec:
    """How bitsandbytes rounds each linear's weight, and what is left alone.

    Attributes:
        method: `nf4` (16 levels at the quantiles of a normal distribution), `fp4` (4-bit floats) or
            `int8` (LLM.int8(): rows of integers, outlying inputs in 16 bits).
        compute_dtype: of the products at 4 bits, written to the directory; `auto` is the
            directory's own dtype, or float16 where a GPU without bfloat16 quantizes or loads.
        double_quant: quantize the 4-bit scales too (0.37 bits per weight less).
        quant_storage: dtype that the 4-bit codes are stored as; FSDP wants the dtype of the rest.
        int8_threshold: inputs of that magnitude or more go through 16 bits; 0 for none.
        skip: linears that stay in 16 bits: names, or ends or beginnings of names (`mlp.c_proj`,
            `transformer.h.0`), cut at a dot.
    """

    method: str = "nf4"
    compute_dtype: str = "auto"
    double_quant: bool = False
    quant_storage: str = "uint8"
    int8_threshold: float = 6.0
    skip: tuple[str, ...] = (HEAD,)

    def __post_init__(self) -> None:
        check_kinds(self)

        def need(ok: bool, key: str, expected: object, cure: str) -> None:
            if not ok:
                got = repr(getattr(self, key))
                raise SpecError(_flags(key), expected=expected, got=got, cure=cure)

        need(self.method in METHODS, "method", f"one of {METHODS}", "Use --method nf4.")
        need(
            self.compute_dtype in COMPUTE_DTYPES,
            "compute_dtype",
            f"one of {COMPUTE_DTYPES}",
            "Use --compute-dtype auto.",
        )
        need(
            self.quant_storage in STORAGES,
            "quant_storage",
            f"one of {STORAGES}",
            "Use --quant-storage uint8, unless FSDP needs another.",
        )
        need(0 <= self.int8_threshold <= 1e6, "int8_threshold", "0 to 1e6", "Use 6, the usual one.")
        need(all(self.skip), "skip", "names of linears", "Leave the empty name out.")
        plain = BnbSpec.__dataclass_fields__
        for key in ("double_quant", "quant_storage", "compute_dtype"):
            if self.bits == 8:
                need(
                    getattr(self, key) == plain[key].default,
                    key,
                    "nothing given with int8, which has no such setting",
                    "Leave it out, or use --method nf4.",
                )
        if self.bits == 4:
            need(
                self.int8_threshold == plain["int8_threshold"].default,
                "int8_threshold",
                f"nothing given with {self.method}, which has no such setting",
                "Leave it out, or use --method int8.",
            )

    @property
    def bits(self) -> int:
        """Bits per weight, without scales."""
        return 8 if self.method == "int8" else 4

    def to_dict(self) -> dict[str, Any]:
        """As in the manifest."""
        return {"method": self.method, "bits": self.bits, **asdict(self)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> BnbSpec:
        """The inverse of `to_dict`, also after a way through JSON."""
        values = {key: value for key, value in found.items() if key != "bits"}
        return cls(**{**values, "skip": tuple(values["skip"])})


def _flags(key: str) -> str:
    """A field as users of either kind know it: `--skip-module (skip)`."""
    flag = "skip-module" if key == "skip" else key.replace("_", "-")
    return f"--{flag} ({key})"


def method_of(method: str | None, bits: int | None) -> str | None:
    """The bitsandbytes method that `--method` and `--bits` mean together; None for another's.

    Raises:
        SpecError: they contradict each other, `bnb` is given without 4 or 8 bits, or there is no
            such method.
    """
    if method == "bnb":
        if bits not in (4, 8):
            raise SpecError(
                "--method bnb",
                expected="--bits 4 (NF4) or --bits 8 (Int8)",
                got="no --bits" if bits is None else f"--bits {bits}",
                cure="Use --bits 4 --method bnb, or name it: --method nf4",
            )
        return "nf4" if bits == 4 else "int8"
    if method not in METHODS:
        if method not in (None, *PLAIN_METHODS):
            raise SpecError(
                "--method",
                expected=f"one of {', '.join((*PLAIN_METHODS, *METHODS, 'bnb'))}",
                got=repr(method),
                cure="Use --method gptq.",
            )
        return None
    own = 8 if method == "int8" else 4
    if bits not in (None, own):
        raise SpecError(
            f"--bits with --method {method}",
            expected=own,
            got=bits,
            cure="Leave --bits out, or use --method gptq, which has 2, 3, 4 and 8",
        )
    return method


def skipped(names: list[str], skip: tuple[str, ...]) -> list[str]:
    """Those of the linears `names` that `skip` leaves in 16 bits, in their order.

    Matching is by whole parts between dots, and what goes into a directory is the full names found:
    transformers' own matching differs between its versions (5.17 takes `h.1` for `h.11` too).

    Raises:
        SpecError: an entry matches nothing. `lm_head` may: a tied head is no linear of its own.
    """
    found: set[str] = set()
    for entry in skip:
        hit = {
            name
            for name in names
            if f".{name}.".startswith(f".{entry}.") or f".{name}.".endswith(f".{entry}.")
        }
        if not hit and entry != HEAD:
            raise SpecError(
                f"{_flags('skip')} {entry!r}",
                expected="a linear, or the beginning or end of the name of some",
                got=f"none of {len(names)} linears, such as {names[0]}" if names else "no linears",
                cure="Give it as the checkpoint names it",
            )
        found |= hit
    return [name for name in names if name in found]


def refuse_tied_head(tied: bool, skip: Collection[str]) -> None:
    """A head that is the embedding is no linear to quantize.

    Args:
        skip: names that are left out.

    Raises:
        CheckpointError: it is not among them.
    """
    if tied and HEAD not in skip:
        raise CheckpointError(
            "config.json: tie_word_embeddings",
            expected=f"{HEAD} left in 16 bits, since it is the embedding",
            got=f"skip {sorted(skip)}",
            cure=f"Use --skip-module {HEAD} too",
        )


def nothing_left(spec: BnbSpec) -> SpecError:
    """The error of a spec that leaves every linear in 16 bits."""
    return SpecError(
        f"{_flags('skip')} {', '.join(spec.skip)}",
        expected="some linear left to quantize",
        got="every one left out",
        cure=f"Leave out fewer: --skip-module {HEAD} is the default",
    )
