"""`qquant profile`: its options, and what it shows. Light: `qquant --help` imports this.

Options are named like the fields of the kinds' options (see `protocol`), and handed on by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .console import ENDED_EARLY, JSON, command_line, library_log, termination, watcher
from .events import Event, Measured
from .options import checked_device, common, counts, json_option, keep
from .profile_progress import ProfileBar, ProfileLines
from .progress import dump
from .tasks.options import PRESETS

F = TypeVar("F", bound=Callable[..., Any])


def accuracy_options(function: F) -> F:
    """Those of `parts.accuracy.AccuracyOptions`."""
    for option in (
        click.option(
            "--max-tokens", default=40960, show_default=True, help="Of each file, at the most."
        ),
        click.option("--seqlen", default=512, show_default=True, help="Tokens of a row of text."),
        click.option(
            "--text",
            "texts",
            multiple=True,
            metavar="FILE",
            help="Text to measure accuracy on, as --calib reads it; repeatable: each file is a "
            "domain of its own.",
        ),
        click.option(
            "--chat",
            "chats",
            multiple=True,
            metavar="FILE",
            help="Conversations (json or jsonl, as --calib reads them) in the model's chat format, "
            "likewise.",
        ),
    ):
        function = option(function)
    return function


def long_context_options(function: F) -> F:
    """Those of `parts.long_context.LongContextOptions`."""
    for option in (
        click.option(
            "--long-tokens",
            type=int,
            default=None,
            show_default="twice the longest length",
            help="Of that text, at the most, for each length.",
        ),
        click.option(
            "--lengths",
            type=counts("--lengths"),
            default="1024,2048,4096,8192,16384,32768",
            show_default=True,
            metavar="N,N,...",
            help="Tokens of a row.",
        ),
        click.option(
            "--long-context",
            "long_text",
            default=None,
            metavar="FILE",
            help="Text to measure perplexity on over context lengths, with original Qwen's dynamic "
            "NTK and logn on and off.",
        ),
    ):
        function = option(function)
    return function


def task_options(function: F) -> F:
    """Those of `parts.tasks.TaskOptions`."""
    for option in (
        click.option(
            "--task-batch", default=1, show_default=True, help="Questions asked at a time."
        ),
        click.option(
            "--run-code",
            is_flag=True,
            help="Let HumanEval run what the model wrote, in a sandbox without network that can "
            "read your files and write none.",
        ),
        click.option(
            "--data-dir",
            default=None,
            show_default="the hub",
            metavar="DIR",
            help="The benchmarks' original files: mmlu.zip, ceval.zip, cmmlu.zip, gsm8k/, "
            "HumanEval.jsonl.gz.",
        ),
        click.option(
            "--preset",
            type=click.Choice(PRESETS),
            default=None,
            help="qwen-chat: Qwen's zero-shot chat protocol, for mmlu, ceval-valid, gsm8k, "
            "humaneval.",
        ),
        click.option("--chat-template", is_flag=True, help="Ask in the model's chat template."),
        click.option(
            "--shots",
            type=int,
            default=None,
            show_default="the task's own",
            help="Examples before each question.",
        ),
        click.option(
            "--limit",
            type=int,
            default=None,
            show_default="all",
            help="Questions of each task (of each subject), at the most.",
        ),
        click.option(
            "--task",
            "tasks",
            multiple=True,
            metavar="NAME",
            help="A benchmark of lm-eval's, or the yaml file of one; repeatable.",
        ),
    ):
        function = option(function)
    return function


def speed_options(function: F) -> F:
    """Those of `parts.speed.SpeedOptions`."""
    for option in (
        click.option(
            "--qwen-context",
            default=2048,
            show_default=True,
            metavar="N",
            help="Of --speed qwen: tokens read to generate one.",
        ),
        click.option(
            "--qwen-new-tokens",
            multiple=True,
            type=int,
            default=(2048, 8192),
            show_default=True,
            metavar="N",
            help="Of --speed qwen: generated from one token, repeatable. Other numbers than Qwen's "
            "are named in the report.",
        ),
        click.option(
            "--kv-cache",
            "kv_caches",
            multiple=True,
            type=click.Choice(("int8", "int4", "fp8")),
            help="Also with a quantized cache, repeatable: speed, memory, and what it costs in "
            "accuracy. int8 and int4 need qquant[kv].",
        ),
        click.option(
            "--compile",
            "compiled",
            is_flag=True,
            help="Also with the decode compiled: torch.compile, a static cache, CUDA graphs.",
        ),
        click.option(
            "--repeats", default=3, show_default=True, help="Speed runs, after one to warm up."
        ),
        click.option(
            "--batch",
            "batches",
            multiple=True,
            type=int,
            default=(1,),
            show_default=True,
            metavar="N",
            help="Texts side by side, repeatable.",
        ),
        click.option(
            "--new-tokens",
            multiple=True,
            type=int,
            default=(128,),
            show_default=True,
            metavar="N",
            help="Generated, repeatable.",
        ),
        click.option(
            "--context",
            "contexts",
            multiple=True,
            type=int,
            default=(512,),
            show_default=True,
            metavar="N",
            help="Tokens of the prompt, repeatable: speed is measured of each with each.",
        ),
        click.option(
            "--speed",
            multiple=True,
            type=click.Choice(("modern", "qwen", "none")),
            default=("modern",),
            show_default=True,
            help="Protocols of speed, repeatable: modern is warmed up and takes --context, "
            "--new-tokens and --batch; qwen is that of Qwen's published tables.",
        ),
    ):
        function = option(function)
    return function


def memory_options(function: F) -> F:
    """Those of `parts.memory.MemoryOptions`."""
    for option in (
        click.option(
            "--generate-tokens",
            default=8192,
            show_default=True,
            metavar="N",
            help="Of --memory generate; Qwen's tables have 8192.",
        ),
        click.option(
            "--encode-tokens",
            default=2048,
            show_default=True,
            metavar="N",
            help="Of --memory encode; Qwen's tables have 2048.",
        ),
        click.option(
            "--memory",
            multiple=True,
            type=click.Choice(("weights", "encode", "generate", "none")),
            default=("weights", "encode"),
            show_default=True,
            help="Peaks of memory, repeatable: loading, reading a text, and writing one, which "
            "takes as long as generating --generate-tokens does.",
        ),
    ):
        function = option(function)
    return function


@click.command(short_help="Measure what quantization cost, and what it gained.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--against",
    default=None,
    show_default="no comparison",
    metavar="SRC",
    help="The original: each MODEL is compared with it by its weights, and by what it says to the "
    "same --text, --chat, --task and --long-context.",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default=Path("profile"),
    show_default=True,
    metavar="DIR",
    help="Gets profile.json and REPORT.md; what is measured there already is not measured again.",
)
@accuracy_options
@task_options
@long_context_options
@speed_options
@memory_options
@click.option(
    "--keep-states",
    is_flag=True,
    help="Leave what is compared with in DIR (hidden): a MODEL added later needs no SRC run again.",
)
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.", metavar="NAME"
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    metavar="[auto|float32|bfloat16|float16]",
    help="To compute in, the same for all; `auto` is what the device is good at.",
)
@click.option(
    "--log-json",
    is_flag=True,
    is_eager=True,
    callback=keep(JSON),
    help="Progress as JSON, one object per line on stdout; the profile itself comes last.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress; warnings and the result only.")
@json_option
@common
def profile(
    models: tuple[str, ...],
    against: str | None,
    out: Path,
    device: str,
    dtype: str,
    keep_states: bool,
    log_json: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure each directory MODEL: perplexity, distance from the original, speed, memory.

    A MODEL is a directory, quantized or not, or nf4:DIR, fp4:DIR, int8:DIR to quantize DIR by
    bitsandbytes while it is loaded. Models are loaded one at a time. An interrupted profile goes on
    after its last finished measurement. Exit code 1 if one failed: the others are kept, and the
    same command tries it again.

    \b
    Examples:
      qquant profile Qwen-7B-Chat-Int4 nf4:Qwen-7B-Chat --against Qwen-7B-Chat --text mine.txt
      qquant profile Qwen-7B-Chat-Int4 --speed qwen --memory encode --memory generate
    """
    checked_device(device)
    kept = f"what was measured is in {out}, and the same command goes on from there"
    meta = click.get_current_context().meta
    meta[ENDED_EARLY] = kept if (out / "profile.json").exists() else "nothing was measured"
    progress = watcher(log_json=log_json, quiet=quiet, bar=ProfileBar, lines=ProfileLines)

    def tell(event: Event) -> None:
        if isinstance(event, Measured):
            meta[ENDED_EARLY] = kept
        progress(event)

    with termination(), library_log(quiet=quiet) as hush, progress:
        from .profile_report import render_text
        from .profiling import profile_models
        from .protocol import Protocol

        hush()
        found = profile_models(
            models,
            out,
            against=against,
            protocol=Protocol.of(**settings),
            device=device,
            dtype=dtype,
            keep_states=keep_states,
            progress=tell,
            command=command_line(click.get_current_context()),
        )
    if log_json:
        click.echo(dump({"event": "done", "path": str(out), "profile": found}))
    else:
        click.echo(dump(found) if as_json else render_text(found))
    if failed := found.get("failed"):
        click.echo(
            f"error: {len(failed)} failed measurements, first {failed[0]['model']}: "
            f"{failed[0]['part']}: {failed[0]['error']}; the others are in {out}",
            err=True,
        )
        click.get_current_context().exit(1)
