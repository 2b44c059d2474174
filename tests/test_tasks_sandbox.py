"""Code that a model wrote is ended in time and gets no network, processes, memory or files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qquant.errors import InputError, SpecError
from qquant.tasks import sandbox
from qquant.tasks.sandbox import Limits, run_code

QUICK = Limits(seconds=20, memory_bytes=256 << 20, file_bytes=1 << 20, disk_bytes=4 << 20)


@pytest.fixture(scope="module", autouse=True)
def available() -> None:
    try:
        sandbox.check()
    except InputError as error:
        pytest.skip(f"no sandbox here, so HumanEval is refused here, too: {error}")


@pytest.mark.parametrize(
    "program",
    [
        "import math, re, itertools, typing\nassert math.isqrt(9) == 3",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "open('a', 'w').write('b')\nassert open('a').read() == 'b'",
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'a')",
        "print('x' * 10_000_000)",
        "import os\nassert set(os.environ) == {'TMPDIR'} and os.listdir('.') == []",
        "import sys\nassert sys.stdin.read() == ''",
        "import os\nassert os.getppid() == 0",  # whoever started it cannot be named, nor ended
    ],
)
def test_what_ordinary_code_needs_works(program: str) -> None:
    assert run_code(program, QUICK) == sandbox.Verdict(True)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2, 'not equal'", "AssertionError: not equal"),
        ("x = = 1", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),  # before the tests it would have come to
        ("import os\nos._exit(0)", "left by os._exit"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_a_program_that_does_not_come_to_its_end_fails(program: str, why: str) -> None:
    verdict = run_code(program, QUICK)
    assert not verdict.passed and why in verdict.why


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_what_does_not_end_is_ended(program: str) -> None:
    start = time.monotonic()
    verdict = run_code(program, Limits(seconds=0.5))
    assert verdict == sandbox.Verdict(False, "timed out")
    assert time.monotonic() - start < sandbox._GRACE


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("x = [0]\nwhile True: x = x + x", "MemoryError"),
        (
            "import threading, time\n"
            "while True: threading.Thread(target=time.sleep, args=(9,)).start()",
            "can't start new thread",
        ),
    ],
)
def test_memory_is_bounded(program: str, why: str) -> None:
    assert why in run_code(program, QUICK).why


@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT')",
    ],
)
def test_there_is_no_network(program: str) -> None:
    """Not even with a server of this process that listens on the same machine."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.replace("PORT", str(server.getsockname()[1]))

        verdict = run_code(program, QUICK)
    assert not verdict.passed and "not permitted" in verdict.why


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import os\nwhile True: os.fork()", "not permitted"),
        ("import subprocess\nsubprocess.run(['true'])", "not permitted"),
        (
            "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()",
            "not permitted",
        ),
        ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
        ("import ctypes\nassert ctypes.CDLL(None).umount2(b'/proc', 0) == 0", "AssertionError"),
        ("import os\nassert os.listdir('/proc')", "AssertionError"),
    ],
)
def test_there_are_no_other_processes(program: str, why: str) -> None:
    before = len(os.listdir("/proc"))
    verdict = run_code(program, QUICK)
    assert not verdict.passed and why in verdict.why
    assert len(os.listdir("/proc")) < before + 200


def test_files_outside_stay_as_they_are(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    for program in (
        f"open({str(victim)!r}, 'w').write('yours')",
        f"import os\nos.remove({str(victim)!r})",
        f"import os\nos.chmod({str(tmp_path)!r}, 0)",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "import os\nos.remove(os.__file__)",
    ):
        verdict = run_code(program, QUICK)
        assert not verdict.passed and "Read-only file system" in verdict.why
    assert victim.read_text() == "mine" and os.listdir(tmp_path) == ["victim.txt"]


def test_files_inside_are_bounded() -> None:
    big = "with open('a', 'wb') as f:\n    for _ in range(9): f.write(b'a' * 500_000); f.flush()"
    assert "File too large" in run_code(big, QUICK).why
    many = "for i in range(99): open(str(i), 'wb').write(b'a' * 500_000)"
    assert "No space left" in run_code(many, QUICK).why


def test_nothing_runs_where_there_is_no_sandbox(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The child cannot lock itself in: the program is not run, and the reason is told."""
    ran = tmp_path / "ran"
    text = sandbox._CHILD.read_text().replace("_call(libc.unshare(NEWUSER", "_call(libc.unshare(-1")
    child = tmp_path / "child.py"
    child.write_text(text)
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(InputError, match=r"unshare: .*leave the task out"):
        run_code(f"open({str(ran)!r}, 'w')", QUICK)
    child.write_text(
        text.replace("libc.unshare(-1", "libc.unshare(NEWUSER").replace(
            "rules = [(load", "rules = [(0xFFFF, 0, 0, 0), (load"
        )
    )
    with pytest.raises(InputError, match="seccomp"):
        run_code(f"open({str(ran)!r}, 'w')", QUICK)
    child.write_text("raise SystemExit")
    assert not run_code("", QUICK).passed
    assert not ran.exists()


def test_limits_are_checked() -> None:
    with pytest.raises(SpecError, match="seconds"):
        Limits(seconds=0)
