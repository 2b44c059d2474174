"""bitsandbytes' options of `qquant quantize`, and what they mean together with the others.

An option that the chosen method does not have is refused by name, not passed over: `--group-size`
says nothing to NF4, nor `--double-quant` to GPTQ. Light: `qquant --help` imports this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from .bnb_spec import HEAD, BnbSpec, method_of
from .errors import SpecError

F = TypeVar("F", bound=Callable[..., Any])

_OWN = ("double_quant", "quant_storage", "int8_threshold", "skip_modules")
# Options of `quantize` that say something to every method.
_SHARED = (
    *("src", "dst", "method", "bits", "device", "dtype", "compute_dtype", "shard_size"),
    *("overwrite", "restart", "log_json", "quiet", "timings"),
)
_NO_SKIP = "none"


def bnb_options(function: F) -> F:
    """The options that only nf4, fp4 and int8 have."""
    plain = BnbSpec()
    for option in (
        click.option(
            "--skip-module",
            "skip_modules",
            multiple=True,
            metavar="NAME",
            help="nf4, fp4, int8: a linear to leave in 16 bits, by its name or the beginning or "
            "end of it (`mlp.c_proj`); repeatable.  "
            f"`{_NO_SKIP}` leaves none out.  [default: {HEAD}, which has to be given again]",
        ),
        click.option(
            "--int8-threshold",
            type=float,
            default=None,
            help="int8: inputs of this magnitude or more are multiplied in 16 bits; 0 for none.  "
            f"[default: {plain.int8_threshold:g}]",
        ),
        click.option(
            "--quant-storage",
            default=None,
            metavar="[uint8|bfloat16|...]",
            help="nf4, fp4: dtype that codes are stored as. FSDP wants that of the rest.  "
            f"[default: {plain.quant_storage}]",
        ),
        click.option(
            "--double-quant",
            is_flag=True,
            default=None,
            help="nf4, fp4: quantize the scales too, 4.13 bits per weight instead of 4.5.",
        ),
    ):
        function = option(function)
    return function


def take_bnb_spec(changes: dict[str, Any], compute_dtype: str) -> BnbSpec | None:
    """The spec that the command line asks for; None for GPTQ and rtn.

    Args:
        changes: the verb's options by name; those of `bnb_options` are taken out.
        compute_dtype: `--compute-dtype`.

    Raises:
        SpecError: options contradict each other, or belong to another method.
    """
    own: dict[str, Any] = {
        key: value for key in _OWN if (value := changes.pop(key, None)) not in (None, ())
    }
    method = method_of(changes.get("method"), changes.get("bits"))
    if method is None:
        if own:
            raise SpecError(
                _flag(next(iter(own))),
                expected="--method nf4, fp4, int8 or bnb with it",
                got=f"--method {changes.get('method') or 'gptq'}",
                cure="Leave it out, or name one of these methods",
            )
        return None
    context = click.get_current_context()
    for name in context.params:
        if name in (*_SHARED, *_OWN):
            continue
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise SpecError(
                _flag(name),
                expected=f"no such option with --method {method}",
                got="it",
                cure=f"Leave it out: {method} reads no calibration data and solves nothing",
            )
    if "skip_modules" in own:
        names = tuple(own.pop("skip_modules"))
        own["skip"] = () if names == (_NO_SKIP,) else names
    return BnbSpec(method=method, compute_dtype=compute_dtype, **own)


def asked_dtype(dtype: str) -> str:
    """`--dtype` where it was given, else `auto`: the source's own."""
    source = click.get_current_context().get_parameter_source("dtype")
    return dtype if source is ParameterSource.COMMANDLINE else "auto"


def _flag(name: str) -> str:
    """The option that fills the parameter `name`."""
    for parameter in click.get_current_context().command.params:
        if parameter.name == name:
            return parameter.opts[0]
    return name
