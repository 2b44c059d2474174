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
from .config import FORMATS, RECIPES, CalibrationSpec, OutputSpec, spec_from_recipe
from .console import Verbs, library_log, termination, watcher
from .convert_cli import convert
from .directory_cli import inspect, reproduce, serve, verify
from .errors import AlreadyDone, SpecError
from .options import (
    by_recipe,
    checked_device,
    common,
    log_json_option,
    output_option,
    overwrite_option,
    parse_size,
    quiet_option,
    shard_size_option,
    spec_option,
    widths,
)
from .profile_cli import profile
from .progress import dump
from .report import closing_lines, flagged
from .report_cli import card, compare, push, report
from .timings import NOT_FORESEEN, rates, render
from .world import MINUTES, join, launched


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
      qquant profile Qwen-7B-Chat-Int4 --against Qwen-7B-Chat --text mine.txt
      qquant card Qwen-7B-Chat-Int4 --profile profile/profile.json
      qquant push Qwen-7B-Chat-Int4 me/Qwen-7B-Chat-Int4 --dry-run
      qquant reproduce Qwen-7B-Chat-Int4 --source Qwen-7B-Chat
      qquant convert Qwen-7B-Chat-Int4 -o Qwen-7B-Chat-Int4-native --to qwen2

    Each verb has its own --help with examples. Exit codes: 0 done, 2 bad input (nothing was
    written), 1 the run failed, 130 interrupted.
    """


@cli.command(short_help="Turn a checkpoint into a quantized directory.")
@click.argument("src", type=click.Path(path_type=Path), metavar="SRC")
@output_option
@click.option(
    "--recipe",
    default="default",
    show_default=True,
    metavar=f"[{'|'.join(RECIPES)}]",
    help="Named settings, which the options below change one by one. `best` takes a little longer "
    "and is a little nearer to the original; `fast` carries no full-precision stream; `qwen` is "
    "what Qwen's own script used for the published Int4 models.",
)
@spec_option("--bits", "bits", int, "Bits per weight.", "[2|3|4|8]")
@spec_option(
    "--target-bpw",
    "target_bpw",
    float,
    "Bits per weight to stay within, scales and zero points included, instead of --bits: each "
    "linear's bits are chosen by measured loss. Plain transformers reads the result in the format "
    "compressed-tensors only, `qquant.load` and gptqmodel read it in gptq's.",
)
@spec_option(
    "--bit-choices",
    "bit_choices",
    widths,
    "What --target-bpw chooses from, such as 2,3,4,8; vLLM's kernels take 4 and 8 only.",
    "B,B[,...]",
)
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
    help="Zero in the middle of the grid, or placed per group. "
    "vLLM reads asymmetric ones in compressed-tensors only.  "
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
@spec_option(
    "--expert-tokens",
    "expert_tokens",
    float,
    "Tokens per input that an expert needs to be solved by its own alone.",
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
    metavar="[auto|float32|bfloat16|float16|int16]",
    help="Of the forward over the calibration data; `auto` is bfloat16 where the hardware has it, "
    "int16 (float32, with large products of 16-bit integers) on CPUs with AVX2 and no more. "
    "With nf4 and fp4: of the products, written to DST, not int16; `auto` is DST's dtype.",
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
    "--format",
    default=OutputSpec.format,
    show_default=True,
    metavar=f"[{'|'.join(FORMATS)}]",
    help="How GPTQ's codes and scales are laid out: the same numbers for other readers. "
    "compressed-tensors is for vLLM (4 and 8 bits) and for transformers with that package.",
)
@shard_size_option
@overwrite_option
@click.option(
    "--memory",
    callback=parse_size,
    default=None,
    show_default="half of what is free; on a CPU activations up to the checkpoint's size or "
    "768 MiB",
    help="gptq, rtn: most memory of a process, such as 8GiB: of what does not fit, some is made "
    "again (some per cent of the time), and the rest waits in files beside DST.",
)
@click.option(
    "--gpu-memory",
    callback=parse_size,
    default=None,
    show_default="half of what is free",
    help="The same on the GPU; what does not fit waits in host memory.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="gptq, rtn: read headers only and say what the run would take: size, memory, disk, time.",
)
@click.option(
    "--restart",
    is_flag=True,
    help="Begin anew, where an earlier run for DST ended early and its finished blocks are kept.",
)
@click.option(
    "--rank-timeout",
    default=MINUTES,
    show_default=True,
    metavar="MINUTES",
    help="Where torchrun starts several processes: how long they wait for one another.",
)
@log_json_option
@quiet_option
@click.option(
    "--timings",
    is_flag=True,
    help="Show how long each part of the run took, and how fast beside the machine's matmul.",
)
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
    format: str,
    shard_size: int,
    overwrite: bool,
    memory: int | None,
    gpu_memory: int | None,
    dry_run: bool,
    restart: bool,
    rank_timeout: float,
    log_json: bool,
    quiet: bool,
    timings: bool,
    **changes: Any,
) -> None:
    """Turn the checkpoint directory SRC into a quantized directory DST.

    DST holds everything that is needed to load it: weights, config, tokenizer, model code where
    transformers has none, licence, a model card and a manifest of how it was made. It is written
    beside DST, verified, then renamed: until then there is no DST. A run that ended early goes on
    with the same command after its last finished block.

    \b
    Examples:
      qquant quantize Qwen-7B-Chat -o Qwen-7B-Chat-Int4 --bits 4
      qquant quantize Qwen-7B-Chat -o out --recipe qwen        # as Qwen published theirs
      qquant quantize Qwen-7B-Chat -o out --recipe fast --device cuda:0
      qquant quantize Qwen-7B-Chat -o out --calib sft.json=3 --calib builtin
      qquant quantize Qwen-7B-Chat -o out --method rtn         # the baseline
      qquant quantize Qwen-7B-Chat -o out --target-bpw 4.5     # bits chosen per linear
      qquant quantize Qwen-7B-Chat -o out --method nf4 --double-quant
      qquant quantize Qwen-7B-Chat -o out --format compressed-tensors
      qquant quantize Qwen-7B-Chat -o out --dry-run            # what it would take
      qquant quantize Qwen-7B-Chat -o out --memory 8GiB
      qquant quantize Qwen-7B-Chat -o out --log-json | tail -1 # the summary as JSON
      torchrun --nproc-per-node 2 -m qquant quantize Qwen-7B-Chat -o out
    """
    if changes["bits"] is not None and changes["target_bpw"] is not None:
        raise SpecError(
            "--bits and --target-bpw",
            expected="one of them",
            got="both",
            cure="Leave --bits out: --bit-choices says which widths --target-bpw may take",
        )
    bnb = take_bnb_spec(changes, compute_dtype)
    quant = bnb or spec_from_recipe(recipe, **changes)
    more: dict[str, Any] = {"compute_dtype": compute_dtype, "timings": timings}
    if bnb:
        more = {"dtype": asked_dtype(dtype)}
    else:
        more |= {"memory": memory, "gpu_memory": gpu_memory}
    calib = (
        None if bnb else CalibrationSpec(sources=sources, samples=samples, seqlen=seqlen, seed=seed)
    )
    out = OutputSpec(dtype=dtype, shard_size=shard_size, format=format)
    checked_device(device)
    seat = launched()
    if dry_run:
        if seat.rank == 0:
            more |= {} if bnb else {"seat": seat}
            _foresee(src, quant, calib, out, device=device, as_json=log_json, **more)
        return
    progress = watcher(log_json=log_json, quiet=quiet)
    with (
        termination(),
        library_log(quiet=quiet or seat.rank > 0) as hush,
        progress,
        join(device, rank_timeout) as world,
    ):
        from .methods import quantize as convert

        hush()
        result, already = None, ""
        try:
            result = convert(
                src,
                dst,
                quant,
                calib,
                out,
                device=device,
                overwrite=overwrite,
                restart=restart,
                progress=progress,
                world=world,
                **more,
            )
        except AlreadyDone as error:  # an end, not an error
            already = str(error)
    if seat.rank > 0:
        return
    if result is None:
        done = {"event": "done", "path": str(dst.absolute()), "already": True}
        click.echo(dump(done) if log_json else already)
        return
    if log_json:
        click.echo(
            dump(
                {
                    "event": "done",
                    "path": str(result.path),
                    "seconds": result.seconds,
                    "size_bytes": result.size_bytes,
                    "peak_bytes": result.peak_bytes,
                    "resumed_blocks": result.resumed,
                    "linears": len(result.layers),
                    "flagged": flagged(result.layers),
                    "device": result.device,
                    "compute_dtype": result.compute_dtype,
                    "threads": result.threads,
                    "columns": result.columns,
                    "spilled_bytes": result.spilled_bytes,
                    "recomputed": result.recomputed,
                    "device_peak_bytes": result.device_peak_bytes,
                    "processes": seat.size,
                    "timings": dict(result.timings),
                    "gflops": rates(result.timings, result.flops),
                    "matmul_gflops": result.matmul_gflops,
                    "foreseen": result.foreseen.to_dict() if result.foreseen else None,
                    "mixed": result.mixed.to_dict() if result.mixed else None,
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
    if result.mixed:
        notice = result.mixed.notice(out.format == "compressed-tensors")
        click.echo(f"\n{result.mixed.render()}\n\n{notice}")
    if timings:
        click.echo(f"\n{render(result.timings, result.flops, result.matmul_gflops)}\n")
        if result.recomputed:
            click.echo(
                f"{result.recomputed:.0%} of the last linears' inputs were made again instead of "
                "kept; more --memory keeps them"
            )
    if result.foreseen and not result.resumed:  # a run that goes on does a part of it
        apart = sum(result.timings.get(part, 0.0) for part in NOT_FORESEEN)
        click.echo(result.foreseen.compare(result.seconds - apart, result.peak_bytes))


def _foresee(src: Path, *specs: Any, as_json: bool, **more: Any) -> None:
    """A dry run, for a spec that has one: `take_bnb_spec` refuses the option for the others.

    Where torch has to be asked for the rest, what follows from headers is shown before.
    """
    del more["timings"]
    from .estimate import dry_run
    from .place import known_place
    from .sizes import foresee

    told, place = None, known_place(more["device"], more["compute_dtype"])
    with library_log() as hush:
        if place is None or not place.plain:
            told = foresee(src, *specs)
            if not as_json:
                click.echo(told.render())
            hush()
        found = dry_run(src, *specs, **more)
    click.echo(dump({"event": "estimate", **found.to_dict()}) if as_json else found.render(told))


for verb in (verify, reproduce, serve, inspect, convert, profile, report, card, push, compare):
    cli.add_command(verb)


def main() -> None:
    """The console entry point."""
    cli(prog_name="qquant")
