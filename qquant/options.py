"""Options and what they are made of: shared by verbs, or with a syntax of their own.

The recipes' defaults in the help are read from `config`, so they cannot go stale; what a value may
be is `config`'s to judge, too, apart from the few spellings that are read here. Nothing heavy is
imported: `--help` does without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .config import RECIPES, OutputSpec, spec_from_recipe
from .console import DEBUG, JSON
from .errors import SpecError

F = TypeVar("F", bound=Callable[..., Any])

_MOST = 1e18  # bytes
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def keep(key: str) -> Callable[[click.Context, click.Parameter, bool], bool]:
    """A callback that notes a flag where `Verbs` finds it when the verb fails."""

    def callback(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        ctx.meta[key] = ctx.meta.get(key, False) or value  # several flags may ask for one thing
        return value

    return callback


def common(function: F) -> F:
    """`--debug`, which every verb has."""
    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=keep(DEBUG),
        help="On an error, show the traceback before the message.",
    )(function)


output_option = click.option(
    "-o",
    "--output",
    "dst",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DST",
    help="The directory to make. It appears when it is complete and verified, not before.",
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace DST if it exists, once the new one is done."
)
log_json_option = click.option(
    "--log-json",
    is_flag=True,
    is_eager=True,
    callback=keep(JSON),
    help="One JSON object per event on stdout; the last line is the summary.",
)
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Show warnings and the result only."
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=keep(JSON),
    help="The whole report as one line of JSON.",
)


def parse_size(_: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """`2GB`, `500MB`, `1GiB` or a plain number of bytes, as bytes; None stays None.

    Raises:
        SpecError: it is no size.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if not match or match[2].upper() not in _UNITS:
        raise SpecError(
            param.opts[0], expected="a size such as 2GB", got=repr(value), cure="Use 2GB"
        )
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > _MOST:
        raise SpecError(param.opts[0], expected="less than 1e18 bytes", got=repr(value))
    return int(size)


shard_size_option = click.option(
    "--shard-size",
    callback=parse_size,
    default=f"{OutputSpec.shard_size // 10**9}GB",
    show_default=True,
    help="Largest safetensors file, such as 500MB or 2GiB.",
)


def widths(text: str) -> tuple[int, ...]:
    """`3,4,8` as numbers.

    Raises:
        SpecError: it is something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SpecError(
            "--bit-choices", expected="widths such as 3,4,8", got=repr(text), cure="Use 3,4,8"
        ) from None


def counts(flag: str) -> Callable[[str], tuple[int, ...]]:
    """What reads `1024,2048` as numbers for the option `flag`; raises SpecError for else."""

    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            raise SpecError(flag, expected="numbers such as 1024,2048", got=repr(text)) from None

    return read


def _shown(value: Any, names: tuple[str, str] | None) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return names[0 if value else 1] if names else str(value).lower()


def by_recipe(key: str, names: tuple[str, str] | None = None) -> str:
    """The default of `key` as the help shows it, with the recipes that differ."""
    values = {recipe: getattr(spec_from_recipe(recipe), key) for recipe in RECIPES}
    text = _shown(values["default"], names)
    for recipe, value in values.items():
        if value != values["default"]:
            text += f"; {recipe}: {_shown(value, names)}"
    return text


def spec_option(
    flag: str, key: str, kind: Callable[[str], Any], text: str, metavar: str | None = None
) -> Callable[[F], F]:
    """An option that overrides one field of the recipe."""
    text = f"{text}  [default: {by_recipe(key)}]"
    return click.option(flag, key, type=kind, default=None, help=text, metavar=metavar)


def checked_device(device: str) -> str:
    """`device` if it is spelled right; whether it is there is found out when it is used.

    Raises:
        SpecError: it is none of auto, cpu, cuda, cuda:N.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise SpecError(
            "--device", expected="auto, cpu, cuda or cuda:N", got=repr(device), cure="Use auto"
        )
    return device
