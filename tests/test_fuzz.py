"""Every parser against spoiled input (`fuzz_targets.py`): right, or refused in one line.

hypothesis draws the randomness, so a failing input is shrunk; the draws are the same in every run.
`scripts/fuzz.py` goes further, for as long as it is let.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
from fuzz_target import Target, attempt
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qquant.errors import InputError, QQuantError, shown

# A model is built for each of these inputs, or pictures are drawn.
SLOW = (
    *("config-qwen", "config-qwen2", "generation", "quantization"),
    *("compressed-config", "compressed-header", "profile-charts"),
)
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fuzz.py"


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Other packages log what they think of spoiled files."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_input_is_refused_or_read_right(name: str, tmp_path: Path) -> None:
    work, target = tmp_path / "work", TARGETS[name]
    work.mkdir()
    seeds, run = target.prepare(work)
    assert any(attempt(target, run, seed) is None for seed in seeds), "no seed is good"

    @given(st.randoms(use_true_random=False))
    @settings(
        max_examples=12 if name in SLOW else 60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def spoil(random: Random) -> None:
        attempt(target, run, target.mutator(random, random.choice(seeds)))

    spoil()


@given(what=st.text(max_size=2000), got=st.text(max_size=2000) | st.binary(max_size=50))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_an_error_is_one_printable_line_of_bounded_length(what: str, got: object) -> None:
    text = str(InputError(what, expected="x", got=got, cure="Do y"))
    assert text.isprintable() and len(text) < 8000 and "\n" not in text
    text.encode()
    if what.isprintable() and len(what) < 500:
        assert text.startswith(what)


def test_text_as_it_is_shown() -> None:
    assert shown("h.0 is 你好") == "h.0 is 你好"
    assert shown("a\n  b\tc") == "a b c"
    assert shown("\x1b[2J\ud800\u202e") == "\\x1b[2J\\ud800\\u202e"
    assert shown("ab" * 10_000, 8) == "abab ... abab"
    assert shown(10**5000) == "a int too large to show"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fuzzer_stops_at_what_is_wrong_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(data: bytes) -> None:
        if b"{" not in data:
            raise QQuantError("no brace in thing")
        if not data.endswith(b"}"):
            raise IndexError(data)

    monkeypatch.chdir(tmp_path)
    fuzz = script().fuzz
    for words, held in ((("thing",), False), (("other",), False)):
        target = Target("bytes", words, lambda _: ([b'{"a": 1}'], run))
        monkeypatch.setitem(TARGETS, "thing", target)
        assert fuzz("thing", 5.0, 0, None) is held
    (saved, *_) = tmp_path.glob("fuzz-thing-*")
    assert "input saved" in capsys.readouterr().out
    assert fuzz("thing", 5.0, 0, saved) is False
    assert fuzz("bnb-state", 0.2, 0, None) is True
