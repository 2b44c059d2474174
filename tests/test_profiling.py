"""A profile tells good from bad, repeats nothing that is measured, and makes nothing up."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_convert import make

from qquant import QuantSpec, profile, profiling, quantize, runtime
from qquant.cli import cli
from qquant.errors import CheckpointError, InputError, RunError, SpecError
from qquant.events import Measured, MeasureFailed, Measuring, ProfilePlanned
from qquant.parts.accuracy import DomainPart
from qquant.parts.base import Model, Part, Subject
from qquant.profile_progress import ProfileBar, ProfilePace
from qquant.profiling import profile_models
from qquant.protocol import Protocol
from qquant.worker import Worker

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 40
QUICK = {"seqlen": 24, "max_tokens": 480, "prompt_len": 8, "new_tokens": 6, "repeats": 2}


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed run takes a process, which is slow to start: one test is enough."""
    runs = iter(range(10**6))

    class Fake:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def measure(self, *_: Any) -> dict[str, Any]:
            return {"prompt_len": 8, "prefill_s": 1.0 + next(runs), "decode_tokens_per_s": 2.0}

    monkeypatch.setattr(profiling, "Worker", Fake)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, a quantized directory, a damaged one, an identical copy, and two texts."""
    root = tmp_path_factory.mktemp("profile")
    make("qwen", root / "src")
    spec = QuantSpec(method="rtn", bits=8, group_size=32)
    quantize(root / "src", root / "int8", spec, device="cpu")
    shutil.copytree(root / "int8", root / "wrong")
    tensors = load_file(root / "wrong" / "model.safetensors")
    tensors["transformer.h.1.mlp.w1.scales"] *= 2
    save_file(tensors, root / "wrong" / "model.safetensors", {"format": "pt"})
    shutil.copytree(root / "src", root / "copy")
    (root / "fox.txt").write_text(TEXT)
    (root / "numbers.txt").write_text(" ".join(map(str, range(2000))))
    return root


def measured(folder: Path, out: Path, *models: str, **more: Any) -> dict[str, Any]:
    texts = tuple(str(folder / name) for name in ("fox.txt", "numbers.txt"))
    settings = QUICK | {k: more.pop(k) for k in list(more) if k in QUICK}
    protocol = Protocol.of(texts=texts, **settings)
    more = {"against": str(folder / "src"), "device": "cpu", "dtype": "float32"} | more
    return profile_models([str(folder / m) for m in models], out, protocol=protocol, **more)


def domain(found: dict[str, Any], model: str, text: str = "fox.txt") -> dict[str, Any]:
    return found["models"][model]["accuracy"]["domains"][text]


def test_the_good_the_wrong_and_the_same(folder: Path, tmp_path: Path) -> None:
    found = measured(folder, tmp_path, "int8", "wrong", "copy")
    for text in ("fox.txt", "numbers.txt"):
        same, good, wrong = (domain(found, m, text) for m in ("copy", "int8", "wrong"))
        assert same["kl"] == [0, 0] and same["top1"] == [1, 0] and same["nll_lost"] == [0, 0]
        assert 0 < good["kl"][0] < wrong["kl"][0] / 20
        assert wrong["top1"][0] < good["top1"][0]
        assert abs(wrong["nll_lost"][0]) > 5 * abs(good["nll_lost"][0])
        assert wrong["perplexity"] != good["perplexity"]
        assert domain(found, "src", text)["perplexity"] == same["perplexity"]
    speed = found["models"]["int8"]["speed"]["modern-b1-c8-n6"]
    assert 0 < speed["peak_bytes"] < 1 << 28
    assert len(speed["decode_runs_s"]) == 2 and speed["decode_tokens_per_s"] > 0
    assert found["models"]["int8"]["load"]["file_bytes"] < domain_bytes(folder / "src")
    assert "dequantize" in found["models"]["int8"]["load"]["kernel"]
    report = (tmp_path / "REPORT.md").read_text()
    assert "| int8" in report and "numbers.txt" in report and "dequantize" in report
    assert json.loads((tmp_path / "profile.json").read_text()) == found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["REPORT.md", "profile.json"]


def domain_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.safetensors"))


def test_what_is_measured_is_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    first = measured(folder, tmp_path, "int8")
    loads: list[str] = []
    original = runtime.load

    def load(path: str, **more: Any) -> Any:
        loads.append(Path(path).name)
        return original(path, **more)

    monkeypatch.setattr(runtime, "load", load)
    assert measured(folder, tmp_path, "int8") == first and loads == []
    both = measured(folder, tmp_path, "int8", "copy")
    assert loads == ["src", "copy"]  # the reference for its states, and what is new
    assert both["models"]["int8"] == first["models"]["int8"]
    loads.clear()
    more = measured(folder, tmp_path, "int8", "copy", max_tokens=240)
    assert loads == ["src", "int8", "copy"]  # other tokens; the speed is kept
    assert more["models"]["int8"]["speed"] == first["models"]["int8"]["speed"]
    assert domain(more, "int8")["tokens"] == 10 * 23


def test_an_interrupted_profile_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    original, calls = profile.compare_all, iter(range(100))

    def stop(*args: Any) -> Any:
        if next(calls) == 4:  # two texts each of the reference and of int8 are done
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(profile, "compare_all", stop)
        with pytest.raises(KeyboardInterrupt):
            measured(folder, tmp_path, "int8", "copy")
    kept = json.loads((tmp_path / "profile.json").read_text())["models"]["int8"]
    assert len(kept["accuracy"]["domains"]) == 2
    assert measured(folder, tmp_path, "int8", "copy")["models"]["int8"] == kept


def test_an_interrupted_model_goes_on_after_its_last_measurement(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    original, made = DomainPart.measure, []

    def measure(self: DomainPart, subject: Subject) -> dict[str, Any]:
        if len(made) == 3:  # both texts of the reference and the first of int8
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(f"{subject.model.name} {self.name}")
        return original(self, subject)

    monkeypatch.setattr(DomainPart, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        measured(folder, tmp_path, "int8")
    assert not list(tmp_path.glob(".states*"))
    measured(folder, tmp_path, "int8")
    assert made[3:] == ["interrupted", "int8 numbers.txt"]


def test_what_fails_takes_nothing_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    original, events = DomainPart.measure, []

    def measure(self: DomainPart, subject: Subject) -> dict[str, Any]:
        if (subject.model.name, self.name) == ("int8", "fox.txt"):
            raise ZeroDivisionError("never mind")
        return original(self, subject)

    with monkeypatch.context() as patch:
        patch.setattr(DomainPart, "measure", measure)
        found = measured(folder, tmp_path, "int8", "copy", progress=events.append)
    error = "ZeroDivisionError: never mind"
    assert found["failed"] == [{"model": "int8", "part": "accuracy fox.txt", "error": error}]
    assert MeasureFailed("int8", "accuracy fox.txt", error) in events
    assert list(found["models"]["int8"]["accuracy"]["domains"]) == ["numbers.txt"]
    assert domain(found, "copy")["kl"] == [0, 0]
    events.clear()
    mended = measured(folder, tmp_path, "int8", "copy", progress=events.append)
    assert "failed" not in mended and domain(mended, "int8")["kl"][0] > 0
    assert [(e.model, e.part) for e in events if isinstance(e, Measured)] == [
        ("int8", "accuracy fox.txt")
    ]


@dataclass(frozen=True)
class Dies(Part):
    """A measurement whose process is killed, and one after it that is not."""

    deadly: bool

    @property
    def place(self) -> tuple[str, ...]:
        return ("speed", str(self.deadly))

    @property
    def process(self) -> str | None:
        return self.label

    def measure(self, subject: Subject) -> dict[str, Any]:
        subject.advance(1, 2)
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"threads": torch.get_num_threads(), "pid": os.getpid()}


def test_a_process_that_is_killed_is_told_and_the_next_one_runs(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    subject = Subject(Model(str(folder / "src")))
    with Worker(subject, 1) as worker, pytest.raises(RunError, match="killed"):
        worker.measure(Dies(True), lambda *at: told.append(at))
    assert told == [(1, 2)]
    with Worker(subject, 1) as worker:
        first, second = (worker.measure(Dies(False), lambda *_: None) for _ in range(2))
    assert first == second and first["threads"] == 1 and first["pid"] != os.getpid()


def test_option_names_are_unique_over_kinds() -> None:
    names = [f.name for kind in Protocol().kinds().values() for f in fields(kind)]  # type: ignore
    assert len(set(names)) == len(names) > 5


def test_time_left_is_by_what_was_seen() -> None:
    now = [0.0]
    pace = ProfilePace(lambda: now[0])
    left = (("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"))
    pace.see(ProfilePlanned(("a", "b"), ("x", "y"), left))
    assert pace.left_seconds is None and pace.left_text() == ""
    pace.see(Measuring("a", "x"))
    now[0] = 10.0
    pace.see(Measuring("a", "x", 1, 4))
    assert pace.left_seconds == 30 + 3 * 40  # a quarter took 10 s, and nothing else is known
    pace.see(Measured("a", "x", "", 20.0))
    assert pace.left_seconds == 3 * 20
    pace.see(Measuring("a", "y"))
    pace.see(Measured("a", "y", "", 100.0))
    assert (pace.left_seconds, pace.done, pace.total) == (120, 2, 4)
    pace.see(MeasureFailed("b", "x", "why"))
    assert pace.left_seconds == 100
    resumed = ProfilePace(lambda: 0.0)
    resumed.see(ProfilePlanned(("a", "b"), ("x",), (("b", "x"),), (("a", "x", "KL 1", 7.0),)))
    assert (resumed.left_seconds, resumed.done) == (7.0, 1)


def test_the_table_on_the_terminal_fills() -> None:
    from rich.console import Console

    bar = ProfileBar(lambda _: None)
    bar(ProfilePlanned(("a", "b"), ("x",), (("b", "x"),), (("a", "x", "KL 1", 7.0),)))
    bar(Measuring("b", "x", 1, 2))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(bar.render())
    shown = console.export_text()
    assert "KL 1" in shown and "b x 50%, 1 of 2 done" in shown and "left" in shown
    bar(Measured("b", "x", "KL 2", 3.0))
    console.print(bar.render())
    assert "KL 2" in console.export_text()


def test_kept_states_give_the_same_as_the_model(folder: Path, tmp_path: Path) -> None:
    from qquant.runtime import load

    one = load(folder / "src", device="cpu", dtype="float32").model
    other = load(folder / "int8", device="cpu", dtype="float32").model
    ids = torch.randint(0, 256, (7, 24), generator=torch.Generator().manual_seed(0))
    kept = profile.KeptReference(one, [ids[:3], ids[3:]], tmp_path)
    assert profile.compare(kept, other, ids) == profile.compare(one, other, ids)
    assert not list(tmp_path.iterdir())  # the files have no names
    with pytest.raises(SpecError, match="rows that were kept"):
        profile.compare(kept, other, ids.flip(1))


def test_eight_times_the_layers_is_several_times_as_slow() -> None:
    """Wide bounds: machines are shared. Fixed costs of a tiny model keep it from eight."""
    import handmade

    small, deep = (handmade.tiny_qwen2(layers=n) for n in (2, 16))
    rates = [profile.speed(m, 16, 24, repeats=5).decode_runs_s for m in (small, deep)]
    assert 2.5 < min(rates[1]) / min(rates[0]) < 24


def test_without_a_reference_nothing_is_compared(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    found = measured(folder, tmp_path, "int8", against=None)
    assert set(domain(found, "int8")) == {"key", "seconds", "tokens", "perplexity"}
    assert "reference" not in found
    assert math.isfinite(domain(found, "int8")["perplexity"][0])


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        measured(folder, tmp_path / "a", "int8", "nowhere")
    for texts, text in ((("no.txt",), r"no\.txt"), (("a/x.txt", "b/x.txt"), "different names")):
        with pytest.raises(InputError, match=text):
            protocol = Protocol.of(texts=texts)
            profile_models([str(folder / "int8")], tmp_path / "a", protocol=protocol)
    with pytest.raises(SpecError, match="new_tokens"):
        Protocol.of(new_tokens=1)
    with pytest.raises(SpecError, match="known settings"):
        Protocol.of(no_such=1)
    assert not (tmp_path / "a").exists()
    for damaged in ("[]", '{"format": 1, "models": {}}', '{"format": 2, "models": {"a": 1}}', "{"):
        (tmp_path / "profile.json").write_text(damaged)
        with pytest.raises(RunError, match=r"profile\.json: expected a profile of format 2"):
            measured(folder, tmp_path, "int8")
        assert (tmp_path / "profile.json").read_text() == damaged


def test_the_command(folder: Path, tmp_path: Path) -> None:
    words = ["profile", str(folder / "int8"), "--against", str(folder / "src")]
    words += ["--text", str(folder / "fox.txt"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--seqlen", "24", "--max-tokens", "240", "--new-tokens", "0"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "fox.txt" in result.stdout and "KL" in result.stdout and "int8" in result.stdout
    assert "int8: accuracy fox.txt: KL" in result.stderr and "(4 of 4)" in result.stderr
    result = CliRunner().invoke(cli, [*words, "--log-json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["profile_planned", "done"]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert "speed" not in json.loads(result.stdout)["models"]["int8"]
    result = CliRunner().invoke(cli, [*words, "--seqlen", "1"])
    assert result.exit_code == 2 and "error: seqlen" in result.stderr
