"""The `qquant` command: verbs, each a thin layer of click over a function of the library.

A verb says what its options are, calls the library and prints the result on stdout (`report` words
it). What verbs share is elsewhere: options in `options`, errors, signals and what is shown
meanwhile in `console`. Heavy imports happen inside the verbs, so that `--help` answers without
loading torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import __version__
from .bnb_cli import asked_dtype, bnb_options, take_bnb_spec
from .config import RECIPES, CalibrationSpec, OutputSpec, spec_from_recipe
from .console import JSON, Verbs, library_log, termination, watcher
from .options import (
    by_recipe,
    checked_device,
    common,
    json_option,
    keep,
    parse_size,
    spec_option,
)
from .progress import dump
from .report import closing_lines, flagged, human_seconds


@click.group(
    cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="qquant")
def cli() -> None:
    """Quantize a Qwen checkpoint to a directory that loads with from_pretrained.

    \b
    The usual way:
      qquant quantize Qwen-7B-Chat -o Qwen-7B-Chat-Int4 --bits 4
      qquant verify Qwen-7B-Chat-Int4 --against Qwen-7B-Chat
      qquant inspect Qwen-7B-Chat-Int4

    Each verb has its own --help with examples. Exit codes: 0 done, 2 bad input (nothing was
    written), 1 the run failed, 130 interrupted.
    """


@cli.command(short_help="Turn a checkpoint into a quantized directory.")
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
    "--recipe",
    default="default",
    show_default=True,
    metavar=f"[{'|'.join(RECIPES)}]",
    help="Named settings, which the options below change one by one. `fast` carries no "
    "full-precision stream; `qwen` is what Qwen's own script used for the published Int4 models.",
)
@spec_option("--bits", "bits", int, "Bits per weight.", "[2|3|4|8]")
@spec_option(
    "--group-size",
    "group_size",
    int,
    "Input columns that share a scale (32, 64, 128, 256, ...), or -1 for one per channel.",
)
@spec_option(
    "--method",
    "method",
    str,
    "`rtn` rounds to nearest; `nf4`, `fp4` and `int8` are bitsandbytes' (`bnb` with --bits 4 or 8 "
    "is nf4 or int8). All but gptq read no calibration data.",
    "[gptq|rtn|nf4|fp4|int8|bnb]",
)
@bnb_options
@click.option(
    "--sym/--asym",
    "sym",
    default=None,
    help="Zero in the middle of the grid, or placed per group. vLLM reads symmetric only.  "
    f"[default: {by_recipe('sym', ('sym', 'asym'))}]",
)
@click.option(
    "--act-order/--no-act-order",
    "act_order",
    default=None,
    help="Solve columns by falling activation; the order on disk stays the natural one.  "
    f"[default: {by_recipe('act_order', ('act-order', 'no-act-order'))}]",
)
@spec_option("--damp", "damp", float, "Damping, as a share of the Hessian's mean diagonal.")
@spec_option(
    "--scale-search", "scale_search", int, "Scales tried per group; 0 takes the group's maximum."
)
@click.option(
    "--negative-scales/--no-negative-scales",
    "negative_scales",
    default=None,
    help="Let a symmetric group's grid be turned round by a negative scale.  "
    f"[default: {by_recipe('negative_scales', ('yes', 'no'))}]",
)
@spec_option("--sweeps", "sweeps", int, "Rounds of scale refit and coordinate descent; 0 for none.")
@spec_option(
    "--correct", "correct", float, "Strength of the input correction, 0 to 1; 0 carries one stream."
)
@spec_option(
    "--correct-residual", "correct_residual", float, "Share of the stream's own error taken back."
)
@spec_option("--correct-damp", "correct_damp", float, "Damping of the correction.")
@spec_option(
    "--correct-share", "correct_share", float, "Share of the batches that the corrections see."
)
@spec_option("--block-size", "block_size", int, "Columns per lazy update: speed, not the result.")
@click.option(
    "--calib",
    "sources",
    multiple=True,
    default=CalibrationSpec.sources,
    show_default=True,
    metavar="SOURCE[=WEIGHT]",
    help="What the model reads while it is measured, repeatable: `builtin` (comes with qquant, "
    "needs no network), a json, jsonl or text file, `self` (sampled from the model), `hf:NAME`.",
)
@click.option(
    "--samples", default=CalibrationSpec.samples, show_default=True, help="Calibration sequences."
)
@click.option(
    "--seqlen", default=CalibrationSpec.seqlen, show_default=True, help="Tokens per sequence."
)
@click.option(
    "--seed", default=CalibrationSpec.seed, show_default=True, help="Seeds the choice of documents."
)
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.", metavar="NAME"
)
@click.option(
    "--compute-dtype",
    default="auto",
    show_default=True,
    metavar="[auto|float32|bfloat16|float16]",
    help="Of the forward over the calibration data; `auto` is bfloat16 where the hardware has it. "
    "With nf4 and fp4: of the products, written to DST; `auto` is DST's dtype.",
)
@click.option(
    "--dtype",
    default=OutputSpec.dtype,
    show_default=True,
    metavar="[float16|bfloat16]",
    help="Of everything that is not quantized. Original Qwen Int4 is float16. nf4, fp4 and int8 "
    "keep SRC's unless this is given.",
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
@click.option("--timings", is_flag=True, help="Show how long each part of the run took.")
@common
def quantize(
    src: Path,
    dst: Path,
    recipe: str,
    sources: tuple[str, ...],
    samples: int,
    seqlen: int,
    seed: int,
    device: str,
    compute_dtype: str,
    dtype: str,
    shard_size: int,
    overwrite: bool,
    log_json: bool,
    quiet: bool,
    timings: bool,
    **changes: Any,
) -> None:
    """Turn the checkpoint directory SRC into a quantized directory DST.

    DST holds everything that is needed to load it: weights, config, tokenizer, model code where
    transformers has none, licence, a model card and a manifest of how it was made. It is written
    beside DST, verified, then renamed: an interrupted or failed run leaves nothing.

    \b
    Examples:
      qquant quantize Qwen-7B-Chat -o Qwen-7B-Chat-Int4 --bits 4
      qquant quantize Qwen-7B-Chat -o out --recipe qwen        # as Qwen published theirs
      qquant quantize Qwen-7B-Chat -o out --recipe fast --device cuda:0
      qquant quantize Qwen-7B-Chat -o out --calib sft.json=3 --calib builtin
      qquant quantize Qwen-7B-Chat -o out --method rtn         # the baseline
      qquant quantize Qwen-7B-Chat -o out --method nf4 --double-quant
      qquant quantize Qwen-7B-Chat -o out --log-json | tail -1 # the summary as JSON
    """
    bnb = take_bnb_spec(changes, compute_dtype)
    quant = bnb or spec_from_recipe(recipe, **changes)
    more = {"dtype": asked_dtype(dtype)} if bnb else {"compute_dtype": compute_dtype}
    calib = (
        None if bnb else CalibrationSpec(sources=sources, samples=samples, seqlen=seqlen, seed=seed)
    )
    out = OutputSpec(dtype=dtype, shard_size=shard_size)
    checked_device(device)
    progress = watcher(log_json=log_json, quiet=quiet)
    with termination(), library_log(quiet=quiet) as hush, progress:
        from .methods import quantize as convert

        hush()
        result = convert(
            src,
            dst,
            quant,
            calib,
            out,
            device=device,
            overwrite=overwrite,
            progress=progress,
            **more,
        )
    if log_json:
        click.echo(
            dump(
                {
                    "event": "done",
                    "path": str(result.path),
                    "seconds": result.seconds,
                    "size_bytes": result.size_bytes,
                    "peak_bytes": result.peak_bytes,
                    "linears": len(result.layers),
                    "flagged": [name for name, _ in flagged(result.layers)],
                    "device": result.device,
                    "compute_dtype": result.compute_dtype,
                    "threads": result.threads,
                    "timings": dict(result.timings),
                }
            )
        )
        return
    for line in closing_lines(
        target=str(result.path),
        size_bytes=result.size_bytes,
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
        layers=result.layers,
    ):
        click.echo(line)
    if timings:
        for name, seconds in result.timings.items():
            click.echo(f"  {name}: {human_seconds(seconds)}")


@cli.command(short_help="Reopen a quantized directory and check it.")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
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
    with library_log() as hush:
        from .verify import verify as check

        hush()
        report = check(directory, against=against, sample=sample)
    click.echo(dump(report.to_dict()) if as_json else report.render())
    if not report.ok:
        click.echo(f"error: {directory}: {len(report.problems)} problems", err=True)
        click.get_current_context().exit(1)


@cli.command(short_help="Show what is in a checkpoint directory.")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@json_option
@common
def inspect(directory: Path, as_json: bool) -> None:
    """Show what is in the directory DIR, quantized or not; only headers are read.

    \b
    Examples:
      qquant inspect Qwen-7B-Chat-Int4
      qquant inspect Qwen-7B-Chat --json
    """
    with library_log() as hush:
        from .verify import inspect as look

        hush()
        report = look(directory)
    click.echo(dump(report.to_dict()) if as_json else report.render())


def main() -> None:
    """The console entry point."""
    cli(prog_name="qquant")
