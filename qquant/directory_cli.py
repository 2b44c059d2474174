"""What is done with a directory that is there: `verify`, `reproduce`, `serve`, `inspect`.

Light, like all verbs: what is heavy is imported inside.
"""

from __future__ import annotations

from pathlib import Path

import click

from .console import library_log, termination, watcher
from .errors import SpecError
from .options import common, json_option
from .progress import dump

_directory = click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")


@click.command(short_help="Reopen a quantized directory and check it.")
@_directory
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    default=None,
    show_default="no comparison",
    metavar="SRC",
    help="The checkpoint it was made from: compares every weight, which reads all of both.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=None,
    show_default="all",
    help="With --against, compare only so many linears, evenly spread.",
)
@json_option
@common
def verify(directory: Path, against: Path | None, sample: int | None, as_json: bool) -> None:
    """Check the GPTQ or bitsandbytes directory DIR, qquant's or another tool's.

    Names, shapes and dtypes of the tensors, index, file hashes (where there is a manifest), zero
    points against the format the config claims, finite scales; with --against also the error of
    every dequantized weight. Exit code 1 if anything is wrong.

    \b
    Examples:
      qquant verify Qwen-7B-Chat-Int4
      qquant verify Qwen-7B-Chat-Int4 --against Qwen-7B-Chat
      qquant verify Qwen-7B-Chat-Int4 --json | python -m json.tool
    """
    if sample is not None and against is None:
        cure = "Give the source with --against, or leave --sample out."
        raise SpecError("--sample", expected="--against beside it", got="none", cure=cure)
    with library_log() as hush:
        from .verify import verify as check

        hush()
        report = check(directory, against=against, sample=sample)
    click.echo(dump(report.to_dict()) if as_json else report.render())
    if not report.ok:
        click.echo(f"error: {directory}: {len(report.problems)} problems", err=True)
        click.get_current_context().exit(1)


@click.command(short_help="Make a directory again by its manifest and compare.")
@_directory
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    required=True,
    metavar="SRC",
    help="The checkpoint that DIR was made from; its hash has to be the one in DIR's manifest.",
)
@click.option(
    "--calib-dir",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FOLDER",
    help="Where the calibration files are that the manifest names.",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default=None,
    show_default="removed after the comparison",
    metavar="DST",
    help="Keep what was made.",
)
@json_option
@common
def reproduce(
    directory: Path, source: Path, calib_dir: Path | None, out: Path | None, as_json: bool
) -> None:
    """Make the directory DIR again from SRC by its manifest, and compare every file.

    Exit code 0 where all files are the same, 1 where one is not. Bytes depend on versions and
    processor: what is not as the manifest says is named beside the result.

    \b
    Example:
      qquant reproduce Qwen-7B-Chat-Int4 --source Qwen-7B-Chat
    """
    progress = watcher(log_json=False, quiet=as_json)
    with termination(), library_log() as hush, progress:
        from .reproduce import reproduce as make_again

        hush()
        found = make_again(directory, source, calib_dir=calib_dir, out=out, progress=progress)
    click.echo(dump(found.to_dict()) if as_json else found.render())
    if not found.ok:
        click.get_current_context().exit(1)


@click.command(
    short_help="Serve a directory with an OpenAI-compatible API.",
    context_settings={"ignore_unknown_options": True},
)
@_directory
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF THE SERVER]")
@common
def serve(directory: Path, arguments: tuple[str, ...]) -> None:
    """Serve the directory DIR: `transformers serve`, which also knows original Qwen here.

    Clients name DIR as their model, spelled as it is here. The further options are those of
    `transformers serve` (`transformers serve --help`). Needs `pip install 'qquant[serve]'`.

    \b
    Examples:
      qquant serve Qwen-7B-Chat-Int4 --port 8000
      transformers chat Qwen-7B-Chat-Int4 http://localhost:8000
    """
    with library_log() as hush:
        from .serving import serve as run

        hush()
        run(directory, arguments)


@click.command(short_help="Show what is in a checkpoint directory.")
@_directory
@click.option(
    "--readers",
    is_flag=True,
    help="Also say which reader takes the directory, and why not, by rules.",
)
@json_option
@common
def inspect(directory: Path, readers: bool, as_json: bool) -> None:
    """Show what is in the directory DIR, quantized or not; only headers are read.

    \b
    Examples:
      qquant inspect Qwen-7B-Chat-Int4
      qquant inspect Qwen-7B-Chat --json
      qquant inspect Qwen-7B-Chat-Int4 --readers
    """
    with library_log() as hush:
        from .readers import render as render_readers
        from .readers import verdicts
        from .verify import inspect as look

        hush()
        report = look(directory)
        found = verdicts(directory) if readers else []
    more = {"readers": [verdict.to_dict() for verdict in found]} if readers else {}
    click.echo(dump(report.to_dict() | more) if as_json else report.render())
    if readers and not as_json:
        click.echo(render_readers(found))
