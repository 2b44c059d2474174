"""A profile tells good from bad, repeats nothing that is measured, and makes nothing up."""

# ruff: noqa: F811  (fixtures)

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_tiny import make as make_for_bnb
from click.testing import CliRunner
from fresh import Interpreter
from measured_models import (  # noqa: F401
    NOTHING,
    QUICK,
    TEXT,
    domain,
    folder,
    measured,
    no_speed,
    quick_pictures,
    watch_loads,
)
from test_calibration_tokens import fast_tokenizer
from test_convert import make
from test_profile_report import bars

from qquant import (
    BnbSpec,
    QuantSpec,
    profile,
    quantize,
    runtime,
    verify_directory,
)
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.dense import DenseReader, relative_errors
from qquant.devices import driver_version, gpu_facts
from qquant.errors import CheckpointError, RunError
from qquant.events import Measured, MeasureFailed, Measuring, ProfilePlanned, Stage
from qquant.parts import base
from qquant.parts.accuracy import DomainPart
from qquant.parts.base import Model, Subject
from qquant.parts.memory import MemoryPart
from qquant.profile_progress import ProfileBar, ProfilePace
from qquant.profiling import STATES, profile_models
from qquant.protocol import Protocol
from qquant.reporting import svg
from qquant.reporting.charts import charts
from qquant.reporting.schema import read_profile


def test_the_good_the_wrong_and_the_same(folder: Path, tmp_path: Path, no_speed: None) -> None:
    found = measured(folder, tmp_path, "int8", "wrong", "copy")
    for text in ("fox.txt", "numbers.txt"):
        same, good, wrong = (domain(found, m, text) for m in ("copy", "int8", "wrong"))
        source = domain(found, "src", text)
        assert same["kl"] == [0, 0] and same["top1"] == [1, 0] and same["nll_lost"] == [0, 0]
        assert same["nll_lost_interval"] == [0, 0] and same["perplexity"] == source["perplexity"]
        assert same["topk"] == {"5": [1, 0], "10": [1, 0]}
        for span, other in zip(same["by_position"], source["by_position"], strict=True):
            assert span["kl"] == span["nll_lost"] == [0, 0] and span["top1"] == [1, 0]
            assert span["perplexity"] == other["perplexity"]
        assert same["rows"]["nll"] == source["rows"]["nll"]
        assert set(same["rows"]["kl"]) == {0} and set(same["rows"]["top1"]) == {1}
        assert 0 < good["kl"][0] < wrong["kl"][0] / 20
        assert wrong["top1"][0] < good["top1"][0] - 5 * good["top1"][1]
        for k in ("5", "10"):
            assert wrong["topk"][k][0] < good["topk"][k][0] - 5 * good["topk"][k][1]
        assert abs(wrong["nll_lost"][0]) > 5 * abs(good["nll_lost"][0])
        distance = [abs(d["perplexity"][0] - source["perplexity"][0]) for d in (good, wrong)]
        assert distance[1] > 5 * distance[0]
        assert [(s["from"], s["to"]) for s in wrong["by_position"]] == [(1, 15), (16, 23)]
        for span, other in zip(wrong["by_position"], good["by_position"], strict=True):
            assert span["kl"][0] > 10 * other["kl"][0]
            assert span["top1"][0] < other["top1"][0] - 3 * other["top1"][1]
            assert abs(span["nll_lost"][0]) > 3 * abs(other["nll_lost"][0])
        assert min(wrong["rows"]["kl"]) > 5 * max(good["rows"]["kl"])
        assert max(wrong["rows"]["top1"]) < min(good["rows"]["top1"])
    errors = {m: layer_errors(found, m) for m in ("copy", "int8", "wrong")}
    assert set(errors["copy"].values()) == {0}
    assert 0 < max(errors["int8"].values()) < 0.02
    damaged = "transformer.h.1.mlp.w1"
    assert max(errors["wrong"], key=errors["wrong"].get) == damaged  # type: ignore[arg-type]
    assert errors["wrong"].pop(damaged) == pytest.approx(1, abs=0.02)
    assert errors["int8"].pop(damaged) < 0.02 and errors["wrong"] == errors["int8"]
    assert "layers" not in found["models"]["src"]
    drawn = {p.title: p for c in charts(found) if c.name == "layers" for p in c.panels}
    panel = drawn["wrong: error of each weight, %"]
    heights = sorted((height, name) for name, _, height in bars(svg.draw(panel)))
    assert heights[-1][1] == damaged and heights[-1][0] > 20 * heights[-2][0]
    assert [m.label for m in panel.marks if m.loud] == [damaged]
    assert drawn["copy: error of each weight, %"].note == "No error."
    assert read_profile(tmp_path / "profile.json") == found
    assert found["models"]["int8"]["load"]["file_bytes"] < domain_bytes(folder / "src")
    assert "dequantize" in found["models"]["int8"]["load"]["kernel"]
    report = (tmp_path / "REPORT.md").read_text()
    assert "speed: contexts: 8\n" in report  # as made of the file, later
    assert "| int8" in report and "numbers.txt" in report and "dequantize" in report
    assert json.loads((tmp_path / "profile.json").read_text()) == found
    files = {p.name for p in tmp_path.iterdir()}
    assert files >= {"REPORT.md", "profile.json", "report.html"}
    assert all(name.endswith((".md", ".json", ".html", ".png")) for name in files)


def test_any_mix_and_what_is_quantized_on_the_fly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    """`nf4:DIR` is measured as the directory that `quantize` makes of DIR is."""
    src = make_for_bnb("qwen", tmp_path / "src")
    quantize(src, tmp_path / "nf4", BnbSpec("nf4", compute_dtype="float32"), device="cpu")
    quantize(src, tmp_path / "int8", QuantSpec(method="rtn", bits=8, group_size=32), device="cpu")
    models = [f"nf4:{src}", f"int8:{src}", str(tmp_path / "nf4"), str(tmp_path / "int8")]
    found = profile_models(
        models,
        tmp_path / "out",
        against=str(src),
        protocol=Protocol.of(texts=(str(folder / "fox.txt"),), **QUICK),
        device="cpu",
        dtype="float32",
    )
    assert "failed" not in found
    flying, eight = "src (nf4 on the fly)", "src (int8 on the fly)"
    assert list(found["models"]) == ["src", flying, eight, "nf4", "int8"]
    methods = [found["models"][m]["load"]["method"] for m in (flying, eight, "nf4", "int8")]
    assert methods == ["nf4", "int8", None, None]
    assert found["machine"]["versions"]["bitsandbytes"] == version("bitsandbytes")
    names = [Model(str(tmp_path / "nf4")), Model(str(src), "nf4"), Model(str(src))]
    assert [model.packages for model in names] == [("bitsandbytes",)] * 2 + [()]
    before = [model.identity() for model in names]
    monkeypatch.setattr(base, "package_version", lambda name: "another")
    same = [model.identity() == old for model, old in zip(names, before, strict=True)]
    assert same == [False, False, True]  # what bitsandbytes takes no part in is not measured again
    for key in ("kl", "top1", "nll_lost", "perplexity"):
        ours, theirs = domain(found, flying)[key], domain(found, "nf4")[key]
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert domain(found, flying)["kl"][0] > 5 * domain(found, eight)["kl"][0] > 0
    assert layer_errors(found, flying) == pytest.approx(layer_errors(found, "nf4"), rel=1e-3)


def test_speed_is_measured_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_tokens": 24, "memory": ("encode",), "new_tokens": (6, 1)}
    found = measured(folder, tmp_path, "int8", against=None, **few)
    assert "failed" not in found
    assert read_profile(tmp_path / "profile.json") == found  # as report, card, compare read it
    one = found["models"]["int8"]["speed"]["modern-b1-c8-n1"]
    assert one["inter_token_ms"]["p50"] is None and one["ttft_s"][0] > 0
    speed = found["models"]["int8"]["speed"]["modern-b1-c8-n6"]
    assert len(speed["runs"]) == 2 and speed["decode_tokens_per_s"] > 0
    assert 0 < speed["bandwidth_share"] and "dequantize for" in speed["slow_kernel"]
    memory = found["models"]["int8"]["memory"]["encode-16"]
    assert 0 < memory["held_bytes"] < memory["peak_bytes"] < 1 << 28
    assert "float32 was asked for" in found["models"]["int8"]["load"]["slow_kernel"]


def layer_errors(found: dict[str, Any], model: str) -> dict[str, float]:
    linears = found["models"][model]["layers"]["linears"]
    return {name: row["relative_error"] for name, row in linears.items()}


def domain_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.safetensors"))


def test_what_is_measured_is_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    first = measured(folder, tmp_path, "int8")
    loads = watch_loads(monkeypatch)
    assert measured(folder, tmp_path, "int8") == first and loads == []
    both = measured(folder, tmp_path, "int8", "copy")
    assert loads == ["src", "copy"]  # the reference for its states, and what is new
    assert both["models"]["int8"] == first["models"]["int8"]
    loads.clear()
    more = measured(folder, tmp_path, "int8", "copy", max_tokens=240)
    assert loads == ["src", "int8", "copy"]  # other tokens; the speed is kept
    assert more["models"]["int8"]["speed"] == first["models"]["int8"]["speed"]
    assert domain(more, "int8")["tokens"] == 10 * 23


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
    loads = watch_loads(monkeypatch)
    kept = json.loads((tmp_path / "profile.json").read_text())["models"]
    found = measured(folder, tmp_path, "int8")
    assert made[3:] == ["interrupted", "int8 numbers.txt"]
    assert loads == ["int8"]  # the reference's states were there still
    assert domain(found, "int8") == kept["int8"]["accuracy"]["domains"]["fox.txt"]
    assert found["models"]["src"] == kept["src"]
    assert {p.suffix for p in tmp_path.iterdir()} <= {".md", ".json", ".html", ".png"}


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(int(sys.argv.pop(1)))
from qquant.parts.accuracy import DomainPart
from qquant.profiling import profile_models
from qquant.protocol import Protocol
made, original = [], DomainPart.measure
def measure(self, subject):
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(self)
    return original(self, subject)
DomainPart.measure = measure
src, model, out, *texts = sys.argv[1:]
nothing = {"speed": ("none",), "memory": ("none",)}
protocol = Protocol.of(texts=tuple(texts), seqlen=24, max_tokens=480, **nothing)
profile_models([model], out, against=src, protocol=protocol, device="cpu", dtype="float32")
"""


def test_a_killed_profile_goes_on_and_repeats_nothing(
    folder: Path, tmp_path: Path, interpreter: Interpreter
) -> None:
    texts = [str(folder / name) for name in ("fox.txt", "numbers.txt")]
    words = [str(folder / "src"), str(folder / "int8"), str(tmp_path), *texts]
    ended = interpreter.run(KILLED, str(torch.get_num_threads()), *words)
    assert ended.code == -signal.SIGKILL, ended.err
    before = json.loads((tmp_path / "profile.json").read_text())["models"]
    assert list(before["int8"]["accuracy"]["domains"]) == ["fox.txt"]
    events: list[Any] = []
    found = measured(folder, tmp_path, "int8", **NOTHING, progress=events.append)
    made = [(e.model, e.part) for e in events if isinstance(e, Measured)]
    assert made == [("int8", "accuracy numbers.txt")]
    assert domain(found, "int8") == before["int8"]["accuracy"]["domains"]["fox.txt"]
    assert found["models"]["src"] == before["src"]
    assert {p.suffix for p in tmp_path.iterdir()} <= {".md", ".json", ".html", ".png"}


def test_the_driver_is_named_where_there_is_one(tmp_path: Path) -> None:
    said = tmp_path / "version"
    assert driver_version(said) is None
    said.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
        "GCC version:  gcc version 12.2.0\n"
    )
    assert driver_version(said) == "550.54.15"
    assert gpu_facts("cpu") is None


def test_kept_states_spare_a_later_model_the_reference(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    whole = measured(folder, tmp_path / "a", "int8", "copy")
    first = measured(folder, tmp_path / "b", "int8", keep_states=True)
    loads = watch_loads(monkeypatch)
    both = measured(folder, tmp_path / "b", "int8", "copy", keep_states=True)
    assert loads == ["copy"]
    assert both["models"]["int8"] == first["models"]["int8"]
    for text in ("fox.txt", "numbers.txt"):
        mine, theirs = (dict(domain(found, "copy", text)) for found in (whole, both))
        assert mine.pop("seconds") and theirs.pop("seconds") and mine == theirs
    files = sorted((tmp_path / "b" / STATES).iterdir())
    assert len(files) == 5  # states and matrix of two texts, and the lock
    measured(folder, tmp_path / "b", "int8", "copy", max_tokens=240, keep_states=True)
    later = sorted((tmp_path / "b" / STATES).iterdir())
    assert len(later) == 5 and set(files) & set(later) == {tmp_path / "b" / STATES / "lock"}


def test_a_directory_that_changes_while_it_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    int8 = Path(shutil.copytree(folder / "int8", tmp_path / "int8"))
    original = DomainPart.measure

    def measure(self: DomainPart, subject: Subject) -> dict[str, Any]:
        os.utime(int8 / "model.safetensors")
        return original(self, subject)

    monkeypatch.setattr(DomainPart, "measure", measure)
    found = measured(folder, tmp_path / "out", str(int8), max_tokens=24)
    told = {f["part"]: f["error"] for f in found["failed"]}
    assert set(told) == {"accuracy fox.txt", "accuracy numbers.txt"}
    assert all("the files as they were" in error for error in told.values())


def test_one_profile_at_a_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / STATES).mkdir()
    with (tmp_path / STATES / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="one profile at a time"):
            measured(folder, tmp_path, "int8")


def test_conversations_are_a_domain(folder: Path, tmp_path: Path, no_speed: None) -> None:
    found = measured(
        folder, tmp_path, "copy", "wrong", chats=(str(folder / "chat.json"),), max_tokens=96
    )
    assert list(found["models"]["copy"]["accuracy"]["domains"])[2] == "chat.json"
    same, wrong = (domain(found, m, "chat.json") for m in ("copy", "wrong"))
    assert same["tokens"] == 4 * 23 and same["kl"] == [0, 0] and wrong["kl"][0] > 0.01
    assert found["protocol"]["accuracy"]["chats"] == ["chat.json"]


def test_long_context_has_the_shape_of_qwens_table(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    more: dict[str, Any] = {"long_text": str(folder / "fox.txt"), "max_tokens": 24}
    events: list[Any] = []
    found = measured(folder, tmp_path, *("copy", "int8", "wrong"), lengths=(16, 64), **more)
    values = {
        name: [row["perplexity"][0] for row in entry["long_context"]["rows"]]
        for name, entry in found["models"].items()
    }
    assert values["copy"] == values["src"]  # and the damaged one is told from the good
    for src, int8, wrong in zip(values["src"], values["int8"], values["wrong"], strict=True):
        assert abs(wrong - src) > 5 * abs(int8 - src)
    there = found["models"]["copy"]["long_context"]
    rows = {(r["length"], r["dynamic_ntk"], r["logn"]): r for r in there["rows"]}
    assert there["text"] == "fox.txt" and len(rows) == len(there["rows"]) == 8
    assert {row["perplexity"][0] for key, row in rows.items() if key[0] == 16}.__len__() == 1
    assert {row["perplexity"][0] for key, row in rows.items() if key[0] == 64}.__len__() == 4
    loaded = runtime.load(folder / "src", device="cpu", dtype="float32")
    ids = torch.tensor([loaded.tokenizer.encode(TEXT)[:128]])
    for (length, ntk, logn), row in rows.items():
        loaded.model.config.use_dynamic_ntk, loaded.model.config.use_logn_attn = ntk, logn
        expected = profile.perplexity(loaded.model, ids.view(-1, length))
        assert row["perplexity"] == pytest.approx(list(expected), rel=1e-6)
        assert row["tokens"] == 128 // length * (length - 1)
    kept = there["rows"][:4]
    events.clear()
    later = measured(folder, tmp_path, "copy", lengths=(16, 32), progress=events.append, **more)
    again = later["models"]["copy"]["long_context"]["rows"]
    assert [row["length"] for row in again] == [16] * 4 + [32] * 4 + [64] * 4
    assert {(row["length"], row["most_tokens"]) for row in again} == {(16, 64), (32, 64), (64, 128)}
    made = [e.part for e in events if isinstance(e, Measured) and e.model == "copy"]
    assert made == ["perplexity at 16", "perplexity at 32"]  # the text's share is another
    assert [r["perplexity"] for r in kept] != [r["perplexity"] for r in again[:4]]


def test_a_kl_that_is_not_finite_is_told() -> None:
    part = MemoryPart.__new__(MemoryPart)
    assert "KL not finite" in part.headline({"peak_bytes": 5, "kl": [None, None]})


def test_other_families_have_one_row_per_length(tmp_path: Path, no_speed: None) -> None:
    fast_tokenizer().save_pretrained(make("qwen2", tmp_path / "src"))
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    protocol = Protocol.of(long_text=str(text), lengths=(8, 16), **NOTHING)
    found = profile_models([str(tmp_path / "src")], tmp_path / "out", protocol=protocol)
    rows = found["models"]["src"]["long_context"]["rows"]
    assert [(r["length"], r["switches"]) for r in rows] == [(8, False), (16, False)]
    assert not any(r["dynamic_ntk"] or r["logn"] for r in rows)


def test_every_way_of_storing_is_read_for_the_layers(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "src")
    source = DenseReader(Checkpoint.open(tmp_path / "src"))
    assert len(source.names) == 14 and source.names[0].startswith("model.layers.0.")
    made = {"int8": QuantSpec(method="rtn", bits=8, group_size=32), "nf4": BnbSpec("nf4")}
    for name, spec in made.items():
        quantize(tmp_path / "src", tmp_path / name, spec, device="cpu")
    errors = {
        name: dict(relative_errors(source, DenseReader(Checkpoint.open(tmp_path / name))))
        for name in made
    }
    flying = dict(relative_errors(source, DenseReader(source.checkpoint, "nf4")))
    assert flying == pytest.approx(errors["nf4"], rel=1e-3)
    for rows, least, most in ((errors["int8"], 0.001, 0.02), (errors["nf4"], 0.05, 0.15)):
        assert set(rows) == set(source.names)
        assert all(least < error < most for error in rows.values())
    report = verify_directory(tmp_path / "int8", tmp_path / "src")
    assert {row.name: row.relative_error for row in report.layers} == pytest.approx(
        errors["int8"], rel=1e-4
    )
    other = make("qwen", tmp_path / "other")
    with pytest.raises(CheckpointError, match="a linear of both"):
        list(relative_errors(source, DenseReader(Checkpoint.open(other))))


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

    bar, now = ProfileBar(lambda _: None), [0.0]
    bar.pace = ProfilePace(lambda: now[0])
    console = Console(width=80, record=True, file=io.StringIO())
    for event in ((), (Stage("plan"),)):  # from the first moment on
        for one in event:
            bar(one)
        console.print(bar.render())
        assert console.export_text().startswith("planning: reading texts")
    bar(ProfilePlanned(("a", "b"), ("x",), (("b", "x"),), (("a", "x", "KL 1", 7.0),)))
    bar(Measuring("b", "x"))
    now[0] = 30.0
    bar(Measuring("b", "x", 1, 2))
    console.print(bar.render())
    shown = console.export_text()
    assert "KL 1" in shown and "b x 50%, 1 of 2 done, about 30 s left" in shown
    bar(Measured("b", "x", "KL 2", 3.0))
    console.print(bar.render())
    assert "KL 2" in console.export_text()


def test_without_a_reference_nothing_is_compared(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    found = measured(folder, tmp_path, "int8", against=None)
    expected = {"key", "under", "of", "on", "seconds", "sha256", "chat", "seqlen"}
    expected |= {"tokens", "perplexity", "by_position", "rows"}
    assert set(domain(found, "int8")) == expected
    assert "reference" not in found
    assert math.isfinite(domain(found, "int8")["perplexity"][0])


def test_a_comparison_without_text_or_task_says_what_it_compares(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    """Weights alone tell nothing of what a model says: the run and the report say so."""
    words = ["profile", str(folder / "wrong"), "--against", str(folder / "src"), "--device", "cpu"]
    words += ["--speed", "none", "--memory", "none", "-o", str(tmp_path)]
    told, said = "warning: src is compared by its weights alone", "Accuracy was not measured"
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0 and told in result.stderr and "give --text" in result.stderr
    assert said in result.stdout and said in (tmp_path / "REPORT.md").read_text()
    assert said in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "profile.json").read_text())
    assert set(found["models"]["wrong"]) == {"load", "layers"}
    text = ["--text", str(folder / "fox.txt"), "--seqlen", "24", "--max-tokens", "48"]
    for more in (text, []):  # and without a text what was measured before is there still
        result = CliRunner().invoke(cli, [*words, *more])
        assert result.exit_code == 0 and told not in result.stderr and said not in result.stdout
    alone = [*words[:2], *words[4:-1], str(tmp_path / "alone")]
    result = CliRunner().invoke(cli, alone)
    assert result.exit_code == 0 and told not in result.stderr and said not in result.stdout


def test_a_profile_without_what_is_not_known_is_gone_on_with(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    parts = '"accuracy": null, "load": null, "layers": null, "speed": {}'
    parts += ', "long_context": {"rows": [{"key": "k"}], "text": null}'
    models = f'{{"int8": {{{parts}}}, "other": {{"long_context": null, "load": {{"key": "k"}}}}}}'
    rest = '"protocol": {}, "machine": {"versions": null}, "seeds": null, "aside": null'
    text = f'{{"format": 2, "models": {models}, "commands": 3, {rest}}}'
    (tmp_path / "profile.json").write_text(text)
    more: dict[str, Any] = {"long_text": str(folder / "fox.txt"), "lengths": (16,)}
    found = measured(folder, tmp_path, "int8", max_tokens=24, **more)
    assert "failed" not in found and found["models"]["int8"]["load"]["kernel"]
    rows = found["models"]["int8"]["long_context"]["rows"]
    assert [row["length"] for row in rows if "length" in row] == [16] * 4
