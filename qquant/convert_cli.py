"""`qquant convert`: the same weights for other readers.

A thin layer over `native.py` and `compressed.py`, in the way of `cli.py`'s verbs.
"""

from __future__ import annotations

from pathlib import Path

import click

from .config import OutputSpec
from .console import JSON, library_log, termination, watcher
from .options import common, keep, parse_size
from .progress import dump
from .report import human_bytes

TARGETS = ("qwen2",)


@click.command(short_help="Turn a directory into another layout, weights unchanged.")
@click.argument("src", type=click.Path(path_type=Path), metavar="SRC")
@click.option(
    "-o",
    "--output",
    "dst",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DST",
    help="The directory to make. It appears when it is complete and verified, not before.",
)
@click.option(
    "--to",
    type=click.Choice(TARGETS),
    required=True,
    help="`qwen2`: original Qwen, unquantized or GPTQ, as the native architecture that needs no "
    "remote code.",
)
@click.option(
    "--shard-size",
    callback=parse_size,
    default=f"{OutputSpec.shard_size // 10**9}GB",
    show_default=True,
    help="Largest safetensors file, such as 500MB or 2GiB.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace DST if it exists, once the new one is done."
)
@click.option(
    "--log-json",
    is_flag=True,
    is_eager=True,
    callback=keep(JSON),
    help="One JSON object per event on stdout; the last line is the summary.",
)
@click.option("-q", "--quiet", is_flag=True, help="Show warnings and the result only.")
@common
def convert(
    src: Path, dst: Path, to: str, shard_size: int, overwrite: bool, log_json: bool, quiet: bool
) -> None:
    """Turn the directory SRC into the directory DST of another layout.

    No weight changes: DST has the very numbers of SRC under other names. What a reader of DST does
    otherwise than SRC's own code is said at the end, and in DST's card.

    \b
    Examples:
      qquant convert Qwen-7B-Chat -o Qwen-7B-Chat-native --to qwen2
      qquant convert Qwen-7B-Chat-Int4 -o Qwen-7B-Chat-Int4-native --to qwen2
    """
    progress = watcher(log_json=log_json, quiet=quiet)
    with termination(), library_log(quiet=quiet) as hush, progress:
        from .native import convert_to_native

        hush()
        found = convert_to_native(
            src, dst, shard_size=shard_size, overwrite=overwrite, progress=progress
        )
    if log_json:
        summary = {
            "event": "done",
            "path": str(found.path),
            "seconds": found.seconds,
            "size_bytes": found.size_bytes,
            "tensors": found.tensors,
            "notes": list(found.notes),
        }
        click.echo(dump(summary))
        return
    size, seconds = human_bytes(found.size_bytes), found.seconds
    click.echo(f"{found.path}: {size}, {found.tensors} tensors, as they were, in {seconds:.0f} s")
