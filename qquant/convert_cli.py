"""`qquant convert`: the same weights for other readers.

A thin layer over `native.py` and `relayout.py`, in the way of `cli.py`'s verbs.
"""

from __future__ import annotations

from pathlib import Path

import click

from .console import library_log, termination, watcher
from .options import (
    common,
    log_json_option,
    output_option,
    overwrite_option,
    quiet_option,
    shard_size_option,
)
from .progress import dump
from .report import human_bytes

TARGETS = ("qwen2", "compressed-tensors")


@click.command(short_help="Turn a directory into another layout, weights unchanged.")
@click.argument("src", type=click.Path(path_type=Path), metavar="SRC")
@output_option
@click.option(
    "--to",
    type=click.Choice(TARGETS),
    required=True,
    help="`qwen2`: original Qwen, unquantized or GPTQ, as the native architecture that needs no "
    "remote code. `compressed-tensors`: a GPTQ directory as vLLM's other format.",
)
@shard_size_option
@overwrite_option
@log_json_option
@quiet_option
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
      qquant convert Qwen2.5-7B-Int4 -o Qwen2.5-7B-CT --to compressed-tensors
    """
    progress = watcher(log_json=log_json, quiet=quiet)
    with termination(), library_log(quiet=quiet) as hush, progress:
        from .native import convert_to_native
        from .relayout import convert_to_compressed

        hush()
        run = convert_to_native if to == TARGETS[0] else convert_to_compressed
        found = run(src, dst, shard_size=shard_size, overwrite=overwrite, progress=progress)
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
