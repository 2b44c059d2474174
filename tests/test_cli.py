"""The command line around a fake conversion: options, what is shown, exit codes, clear messages.

The fake stands where `qquant.convert` is imported from, so that these tests need neither a model
nor torch. What the real conversion refuses is in test_bad_input.py.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

import qquant
from qquant.cli import cli
from qquant.config import RECIPES, CalibrationSpec, OutputSpec, QuantSpec
from qquant.errors import CheckpointError, NumericsError
from qquant.events import BlockDone, LinearDone, Planned, Stage, Warned
from qquant.progress import Lines, Pace, dump

LAYERS = [
    LinearDone(0, "transformer.h.0.attn.c_attn", 1.5, 0.01, 0.1, (), 0.2),
    LinearDone(0, "transformer.h.0.mlp.w1", 2.5, 0.03, 0.4, ("damp-raised",), 0.2),
]


@dataclass
class Made:
    path: Path
    seconds: float = 75.0
    layers: list[LinearDone] = field(default_factory=lambda: list(LAYERS))
    size_bytes: int = 5_860_000_000
    timings: dict[str, float] = field(default_factory=lambda: {"hessian": 3.6})
    flops: dict[str, int] = field(default_factory=lambda: {"hessian": 36 * 10**9})
    matmul_gflops: float | None = None
    mixed: None = None
    resumed: int = 0
    foreseen: Any = None
    peak_bytes: int = 972_000_000
    device: str = "cpu"
    compute_dtype: str = "float32"
    threads: int = 2
    columns: str = "stretches"
    spilled_bytes: int = 0
    recomputed: float = 0.25
    device_peak_bytes: int | None = None


@dataclass
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Call]]:
    """Puts a conversion in place that notes its call, sends events, then ends with `error`."""

    def install(error: BaseException | None = None, **made: Any) -> list[Call]:
        calls: list[Call] = []

        def quantize(*args: Any, progress: Callable[[Any], None], **kwargs: Any) -> Made:
            calls.append(Call(args, kwargs))
            progress(Stage("quantize"))
            progress(Planned(1, 2, 65536, "cpu", ("a note",)))
            for layer in LAYERS:
                progress(layer)
            progress(BlockDone(0, 1, 0.4))
            progress(Warned("look here"))
            if error is not None:
                raise error
            return Made(args[1], **made)

        module = types.ModuleType("qquant.convert")
        module.quantize = quantize  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "qquant.convert", module)
        monkeypatch.delattr(qquant, "convert", raising=False)
        return calls

    return install


def refused_by_torch() -> RuntimeError:
    """What its allocator on the host says."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    return caught.value


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_defaults_are_the_specs_own(fake: Callable[..., list[Call]]) -> None:
    calls = fake()
    assert run("quantize", "src", "-o", "dst").exit_code == 0
    (call,) = calls
    assert call.args == (Path("src"), Path("dst"), QuantSpec(), CalibrationSpec(), OutputSpec())
    plain = {"device": "auto", "compute_dtype": "auto", "overwrite": False, "restart": False}
    plain |= {"timings": False, "memory": None, "gpu_memory": None}
    assert call.kwargs.pop("world").seat.size == 1
    assert call.kwargs == plain


def test_every_option_arrives(fake: Callable[..., list[Call]]) -> None:
    calls = fake()
    text = (
        "quantize src -o dst --recipe qwen --bits 8 --group-size -1 --asym --act-order --damp 0.2 "
        "--scale-search 7 --no-negative-scales --sweeps 1 --correct 0.5 --correct-residual 0.25 "
        "--correct-damp 0.3 --correct-share 0.25 --expert-tokens 2 "
        "--block-size 64 --method rtn --calib a.json=2 --calib builtin --samples 3 --seqlen 64 "
        "--seed 9 --device cuda:1 --compute-dtype float32 --dtype bfloat16 --shard-size 1.5GiB "
        "--memory 8GiB --gpu-memory 6GB --overwrite --restart --timings --bit-choices 4,8"
    )
    assert run(*text.split()).exit_code == 0
    quant = QuantSpec(
        bits=8,
        group_size=-1,
        sym=False,
        method="rtn",
        act_order=True,
        damp=0.2,
        scale_search=7,
        negative_scales=False,
        sweeps=1,
        correct=0.5,
        correct_residual=0.25,
        correct_damp=0.3,
        correct_share=0.25,
        expert_tokens=2,
        block_size=64,
        bit_choices=(4, 8),
    )
    calib = CalibrationSpec(sources=("a.json=2", "builtin"), samples=3, seqlen=64, seed=9)
    out = OutputSpec(dtype="bfloat16", shard_size=1_610_612_736)
    assert calls[0].args[2:] == (quant, calib, out)
    assert calls[0].kwargs.pop("world").seat.size == 1
    assert calls[0].kwargs == {
        "device": "cuda:1",
        "compute_dtype": "float32",
        "overwrite": True,
        "restart": True,
        "timings": True,
        "memory": 8 * 2**30,
        "gpu_memory": 6 * 10**9,
    }


def test_recipe_sets_what_no_option_does(fake: Callable[..., list[Call]]) -> None:
    calls = fake()
    run("quantize", "src", "-o", "dst", "--recipe", "qwen", "--damp", "0.05")
    assert calls[0].args[2] == QuantSpec(**{**RECIPES["qwen"], "damp": 0.05})


def test_every_spec_field_has_an_option() -> None:
    options = {p.name for p in cli.commands["quantize"].params}
    missing = {f.name for s in (QuantSpec, CalibrationSpec, OutputSpec) for f in fields(s)}
    assert missing <= options


def test_help_shows_every_default() -> None:
    text = " ".join(run("quantize", "--help").output.split())
    for recipe in RECIPES:
        assert recipe in text
    for shown in ("default: 128]", "default: builtin", "default: 2GB", "default: float16"):
        assert shown in text
    assert f"default: {QuantSpec().damp}; qwen: {RECIPES['qwen']['damp']}" in text
    assert "Examples:" in text
    verb = cli.commands["quantize"]
    context = click.Context(verb)
    for option in verb.params:
        if isinstance(option, click.Option) and not option.required:
            flag, words = option.get_help_record(context) or ("", "")
            assert (option.is_flag and not option.secondary_opts) or "[default: " in words, flag


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--recipe", "worst"], ["recipe", "default, best, fast, qwen", "'worst'"]),
        (["--bits", "5"], ["bits", "(2, 3, 4, 8)", "--bits 4"]),
        (["--group-size", "100"], ["group_size", "32, 64, 128", "--group-size 128"]),
        (["--shard-size", "big"], ["--shard-size", "'big'", "2GB"]),
        (["--dtype", "float32"], ["dtype", "float16", "'float32'"]),
        (["--device", "tpu"], ["--device", "cuda:N", "'tpu'"]),
        (["--samples", "0"], ["samples", "at least 1"]),
        (["--method", "awq"], ["method", "'awq'"]),
    ],
)
def test_bad_settings_end_before_anything_starts(
    fake: Callable[..., list[Call]], args: list[str], words: list[str]
) -> None:
    calls = fake()
    result = run("quantize", "src", "-o", "dst", *args)
    assert result.exit_code == 2
    assert calls == []
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CheckpointError("no config.json", cure="Give a directory"), 2, "no config.json"),
        (NumericsError("layer 3: not finite"), 1, "layer 3: not finite"),
        (OSError(28, "No space left on device", "x.safetensors"), 1, "x.safetensors: No space"),
        (MemoryError(), 1, "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "out of memory. Use a smaller --mem"),
        (refused_by_torch(), 1, "out of memory. Use a smaller --memory, fewer --samples"),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), 1, "out of memory"),
        (RuntimeError("not enough memory: you tried to allocate"), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA"), 1, "out of device memory"),
        (torch.AcceleratorError("CUDA error: x"), 1, "device failed: CUDA error: x. Once it works"),
        (ValueError("first\nsecond"), 1, "ValueError: first. This is a bug in qquant"),
    ],
)
def test_errors_are_one_line_and_a_code(
    fake: Callable[..., list[Call]], error: BaseException, code: int, text: str
) -> None:
    fake(error)
    result = run("quantize", "src", "-o", "dst", "--quiet")
    assert result.exit_code == code
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and text in last
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback(fake: Callable[..., list[Call]]) -> None:
    fake(ValueError("odd"))
    result = run("quantize", "src", "-o", "dst", "--debug")
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ValueError: odd")


def test_log_json_is_one_object_per_line_and_ends_with_the_summary(
    fake: Callable[..., list[Call]],
) -> None:
    fake()
    result = run("quantize", "src", "-o", "dst", "--log-json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [line["event"] for line in lines]
    expected = ["stage", "planned", "linear_done", "linear_done", "block_done", "warned", "done"]
    assert kinds == expected
    assert lines[2] == {
        "event": "linear_done",
        "block": 0,
        "name": "transformer.h.0.attn.c_attn",
        "loss": 1.5,
        "rel_error": 0.01,
        "damp": 0.1,
        "flags": [],
        "seconds": 0.2,
    }
    assert lines[-1]["size_bytes"] == 5_860_000_000
    assert lines[-1]["flagged"] == ["transformer.h.0.mlp.w1"]
    assert result.stderr == ""


def test_log_json_ends_with_the_error(fake: Callable[..., list[Call]]) -> None:
    fake(NumericsError("layer 3"))
    result = run("quantize", "src", "-o", "dst", "--log-json")
    last = json.loads(result.stdout.splitlines()[-1])
    assert last == {"event": "error", "error": "layer 3", "exit_code": 1}


@pytest.mark.parametrize(
    ("words", "error", "end"),
    [
        ("quantize src -o dst --bist 4 --log-json", "--bist", "Try qquant quantize --help"),
        (
            "quantize src -o dst --log-json --samples many",
            "--samples",
            "Try qquant quantize --help",
        ),
        ("quantize --log-json -o dst", "Missing argument 'SRC'", "Try qquant quantize --help"),
        ("quantize --log-json src", "Missing option '-o'", "Try qquant quantize --help"),
        ("quantize --log-json src -o", "-o", "requires an argument."),
        ("quantize --log-json src more -o dst", "more", "Try qquant quantize --help"),
        ("verify --json", "Missing argument 'DIR'", "Try qquant verify --help"),
        ("inspect --json a b", "b", "Try qquant inspect --help"),
        ("quantise src --log-json", "quantise", "Try qquant --help"),
        ("--log-json quantize src -o dst", "--log-json", "Try qquant --help"),
    ],
)
def test_usage_errors_are_json_too_where_json_was_asked_for(
    fake: Callable[..., list[Call]], words: str, error: str, end: str
) -> None:
    calls = fake()
    result = CliRunner().invoke(cli, words.split(), prog_name="qquant")
    assert result.exit_code == 2
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found == {"event": "error", "error": found["error"], "exit_code": 2}
    assert error in found["error"] and found["error"].endswith(end)
    assert result.stderr == f"error: {found['error']}\n"
    assert calls == []


@pytest.mark.parametrize(
    "words", ["quantize src --bist", "quantise", "quantize -o d -- --log-json -x"]
)
def test_usage_errors_are_clicks_where_a_person_asks(words: str) -> None:
    result = CliRunner().invoke(cli, words.split(), prog_name="qquant")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: qquant") and "Error: " in result.stderr


def test_json_stays_json_for_values_that_are_no_numbers() -> None:
    assert json.loads(dump({"a": float("nan"), "b": [float("inf"), 1.0]})) == {
        "a": None,
        "b": [None, 1.0],
    }


def test_result_names_what_did_not_go_as_configured(fake: Callable[..., list[Call]]) -> None:
    fake()
    result = run("quantize", "src", "-o", "dst", "--timings")
    assert "dst: 5.86 GB, 2 linears quantized in 1 m 15 s, peak memory 972 MB" in result.stdout
    assert "transformer.h.0.mlp.w1: needed more damping (0.4 of" in result.stdout
    assert "\nhessian     3.60  100.0%" in result.stdout
    assert "25% of the last linears' inputs were made again" in result.stdout


def test_the_estimate_is_compared_with_what_it_was_of(fake: Callable[..., list[Call]]) -> None:
    """A run makes it when it has made the model: that time is no part of either."""
    said = types.SimpleNamespace(compare=lambda seconds, _: f"took {seconds:g}")
    fake(foreseen=said, timings={"set-up": 16.5, "estimate": 1.0, "calibrate": 2.0, "solve": 9.0})
    assert run("quantize", "src", "-o", "dst").stdout.splitlines()[-1] == "took 55.5"


def test_quiet_shows_warnings_only(fake: Callable[..., list[Call]]) -> None:
    fake()
    loud = run("quantize", "src", "-o", "dst").stderr
    quiet = run("quantize", "src", "-o", "dst", "--quiet").stderr
    assert "1 blocks, 2 linears" in loud and "1 blocks, 2 linears" not in quiet
    assert "note: a note" in quiet
    assert "warning: look here" in quiet


def test_no_control_characters_when_not_a_terminal(fake: Callable[..., list[Call]]) -> None:
    fake()
    result = run("quantize", "src", "-o", "dst")
    assert "\x1b" not in result.output and "\r" not in result.output


def test_a_log_is_written_at_a_low_rate() -> None:
    now = [0.0]
    lines: list[str] = []
    watch = Lines(lines.append, every=10.0, clock=lambda: now[0])
    watch(Planned(100, 100, 0, "cpu"))
    for block in range(100):
        now[0] += 1.0
        watch(LinearDone(block, f"h.{block}.w", 1.0, 0.01, 0.1, (), 1.0))
        watch(BlockDone(block, 100, 1.0))
    assert len(lines) == 1 + 10
    assert lines[1] == "block 10/100, last error 10.00%, about 1 m 30 s left"


def test_time_left_follows_the_pace() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.see(Planned(2, 8, 0, "cpu"))
    assert pace.left is None
    now[0] = 30.0  # calibration data is gathered
    pace.see(Stage("quantize"))
    now[0] = 34.0
    pace.see(LAYERS[0])
    pace.see(LAYERS[1])
    assert pace.left == pytest.approx(12.0)


def test_bar_draws_block_linear_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """Under a pseudo terminal: what a person sees."""
    pty = pytest.importorskip("pty")
    script = (
        "import click, time\n"
        "from qquant.events import *\n"
        "from qquant.progress import Bar\n"
        "with Bar(lambda t: click.echo(t, err=True)) as bar:\n"
        "    bar(Planned(3, 6, 10, 'cpu'))\n"
        "    bar(LinearDone(1, 'h.1.c_attn', 1.5, .0144, .1, (), .1))\n"
        "    bar(Warned('look here'))\n"
        "    time.sleep(.3)\n"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other side closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert child.wait() == 0
    text = shown.decode()
    for word in ("3 blocks, 6 linears", "block 2/3", "h.1.c_attn", "12.00%", "left", "look here"):
        assert word in text, word


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_the_run_and_let_it_clean_up(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    script = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # ignored where tests run under nohup
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ... or after `&` in a script
        "def quantize(src, dst, *a, **k):\n"
        "    try:\n"
        "        (dst.parent / 'work').touch()\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        (dst.parent / 'work').unlink()\n"
        "fake = types.ModuleType('qquant.convert'); fake.quantize = quantize\n"
        "sys.modules['qquant.convert'] = fake\n"
        "from qquant.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "quantize", "src", "-o", str(tmp_path / "dst")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "work").exists():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == code
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_librarys_warnings_are_shown_and_other_packages_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels: list[int] = []

    def quantize(*args: Any, **_: Any) -> Made:
        logging.getLogger("qquant.runtime").warning("two tensors too many")
        logging.getLogger("torchao.ops").warning("not for this hardware")
        logging.getLogger("transformers.tokenization_utils_base").warning("a long text")
        levels.append(logging.getLogger("transformers").level)
        return Made(args[1])

    module = types.ModuleType("qquant.convert")
    module.quantize = quantize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qquant.convert", module)
    monkeypatch.delattr(qquant, "convert", raising=False)
    before = list(logging.root.handlers), logging.getLogger("qquant").level
    transformers_level = logging.getLogger("transformers").level
    assert run("quantize", "a", "-o", "b").stderr == "warning: two tensors too many\n"
    assert run("quantize", "a", "-o", "b", "--quiet").stderr == ""
    assert (list(logging.root.handlers), logging.getLogger("qquant").level) == before
    assert not logging.getLogger("qquant").handlers
    assert levels == [logging.ERROR, logging.ERROR]
    assert logging.getLogger("transformers").level in (transformers_level, logging.WARNING)


def test_python_m_is_the_same_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "qquant", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"qquant, version {qquant.__version__}\n"
