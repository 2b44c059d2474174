"""How a verb meets the terminal: its errors, its signals, what the library logs, what is drawn.

The one place where an exception becomes a line and an exit code: 0 done, 2 bad input and nothing
written, 1 the run failed, 130 interrupted (143 when terminated). The line is `error: ...` on
stderr; where the verb was asked for JSON, one JSON object on stdout says the same, for a usage
error too. Of several processes that torchrun started the first of each machine tells bad input,
since a machine may have its own; what ends the work of any other, that one. Knows no verb, of
options the flags in `JSON_FLAGS` and `--debug`, and those that a lack of memory is cured by.
"""

from __future__ import annotations

import errno
import importlib
import logging
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import QQuantError
from .progress import Bar, Json, Lines, Silent, Write, dump
from .world import launched

# Kept in a context's meta: were they asked for, and all words of the command line.
DEBUG, JSON, _WORDS = "qquant.debug", "qquant.json", "qquant.words"
ENDED_EARLY = "qquant.ended-early"  # what a verb that is interrupted has left behind, in words
JSON_FLAGS = ("--log-json", "--json")
_NO_MEMORY = "out of memory. Use a smaller --memory, fewer --samples or a shorter --seqlen"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["(no message)"])[0].rstrip(".")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, handled like Ctrl-C: what is being written is removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Verbs(click.Group):
    """The group of verbs, and the one place where an exception becomes a line and an exit code."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        words = list(args)
        try:
            ctx = super().make_context(info_name, args, parent, **extra)
        except click.ClickException as error:
            _misused(error, words)
            raise
        ctx.meta[_WORDS] = words
        return ctx

    def invoke(self, ctx: click.Context) -> Any:
        def end(text: str, code: int) -> NoReturn:
            if ctx.meta.get(DEBUG):
                click.echo(traceback.format_exc(), err=True)
            _end(text, code, as_json=bool(ctx.meta.get(JSON)))

        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except click.ClickException as error:
            _misused(error, ctx.meta[_WORDS])
            raise
        except QQuantError as error:
            end(str(error), error.exit_code)
        except Terminated as error:
            end(f"terminated; {_left_behind(ctx)}", 128 + error.number)
        except KeyboardInterrupt:
            end(f"interrupted; {_left_behind(ctx)}", 130)
        except MemoryError:
            end(_NO_MEMORY, 1)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                end(_NO_MEMORY, 1)
            where = f"{error.filename}: " if error.filename else ""
            end(where + (error.strerror or _first_line(error)), 1)
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
                end("out of device memory. Use --device cpu or fewer --samples", 1)
            if isinstance(error, RuntimeError) and _of_memory(error):
                end(_NO_MEMORY, 1)
            if type(error).__name__ == "AcceleratorError":  # torch's: a device failed or is gone
                text = f"the device failed: {_first_line(error)}. Once it works again, the same"
                end(f"{text} command goes on after the last finished block", 1)
            text = f"{type(error).__name__}: {_first_line(error)}. This is a bug in qquant"
            end(text + ("" if ctx.meta.get(DEBUG) else "; --debug shows where"), 1)


def _of_memory(error: RuntimeError) -> bool:
    """Whether it is torch's word for an allocation or a mapping on the host that was refused."""
    words = ("can't allocate memory", "cannot allocate memory", "not enough memory")
    return any(w in str(error).lower() for w in words)


def _left_behind(ctx: click.Context) -> str:
    return str(ctx.meta.get(ENDED_EARLY, "no target was written or changed"))


def command_line(ctx: click.Context) -> str:
    """The command as it was given, without folders of this machine: fit to be published."""
    words = (re.sub(r"(^|[=:,])[^=:,]*/(?=[^/])", r"\1", w.rstrip("/")) for w in ctx.meta[_WORDS])
    return shlex.join([ctx.find_root().info_name or "qquant", *words])


def _misused(error: click.ClickException, words: Sequence[str]) -> None:
    """Ends with JSON too, if the words ask for it; a person is left to click's usage text.

    The words are looked at because parsing them failed: no option has a value yet.
    """
    if launched().local_rank > 0:
        raise click.exceptions.Exit(error.exit_code)
    options = words[: words.index("--")] if "--" in words else words
    if not any(flag in options for flag in JSON_FLAGS):
        return
    text = " ".join(error.format_message().split())
    where = getattr(error, "ctx", None)
    cure = f" Try {where.command_path} --help" if where is not None else ""
    _end(text + cure, error.exit_code, as_json=True)


def _end(text: str, code: int, *, as_json: bool) -> NoReturn:
    """Says it in one line on stderr, and as JSON on stdout where that was asked for.

    Bad input is the same for all ranks of a machine, and the first one there tells it.
    """
    seat = launched()
    if seat.size > 1:
        # torchrun passes on what the terminal has sent already, and ends those that still run.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if seat.rank > 0:
        if code != 2 or seat.local_rank == 0:
            click.echo(f"error: rank {seat.rank}: {text}", err=True)
        raise click.exceptions.Exit(code)
    click.echo(f"error: {text}", err=True)
    if as_json:
        click.echo(dump({"event": "error", "error": text, "exit_code": code}))
    raise click.exceptions.Exit(code)


@contextmanager
def termination() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run as Ctrl-C does, so that work directories are removed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice to ignore is kept
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stderr(logging.Handler):
    """Warnings of the library, in the same voice as the rest.

    Not those of `convert`, which tells the same in events: the watcher shows them.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "qquant.convert":
            return
        click.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


@contextmanager
def library_log(*, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Shows qquant's own warnings on stderr while a verb runs, and keeps other packages' back.

    What torch, torchao and transformers remark while they are imported and used (extensions for
    other hardware, long texts) tells a user of this command nothing; `--debug` lets it through.
    Gives a function to call after the heavy imports: transformers sets its level at import.
    """
    own, handler = logging.getLogger("qquant"), _Stderr(logging.ERROR if quiet else logging.WARNING)
    null = logging.NullHandler()
    before = [(own, own.level)]

    def hush(*names: str) -> None:
        for logger in map(logging.getLogger, names):
            before.append((logger, logger.level))
            logger.setLevel(logging.ERROR)

    def quiet_transformers() -> None:
        if not loud:
            importlib.import_module("transformers")
            hush("transformers")

    loud = bool(click.get_current_context().meta.get(DEBUG))
    if not loud:
        logging.root.addHandler(null)
        hush("torch.utils._pytree")
    own.addHandler(handler)
    own.setLevel(handler.level)
    try:
        yield quiet_transformers
    finally:
        logging.root.removeHandler(null)
        own.removeHandler(handler)
        for logger, level in reversed(before):
            logger.setLevel(level)


def watcher(
    *,
    log_json: bool,
    quiet: bool,
    bar: Callable[[Write], Silent] = Bar,
    lines: Callable[[Write], Silent] = Lines,
) -> Silent:
    """What is shown while the run goes on: see `progress`; on a terminal `bar`, else `lines`."""

    def err(line: str) -> None:
        click.echo(line, err=True)

    if log_json:
        return Json(click.echo)
    if quiet:
        return Silent(err)
    return bar(err) if sys.stderr.isatty() else lines(err)
