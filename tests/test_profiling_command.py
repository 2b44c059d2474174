"""A profile that cannot be made is refused in time; what fails spoils nothing else."""

# ruff: noqa: F811  (fixtures)

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from measured_models import domain, folder, measured, no_speed, quick_pictures, watch_loads  # noqa: F401
from test_calibration_tokens import fast_tokenizer
from test_convert import make

from qquant.cli import cli
from qquant.errors import CheckpointError, InputError, RunError, SpecError
from qquant.events import Measured, MeasureFailed
from qquant.parts.accuracy import DomainPart
from qquant.parts.base import Subject
from qquant.parts.load import LoadPart
from qquant.profiling import profile_models
from qquant.protocol import Protocol


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


def test_a_reference_that_fails_is_told_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    def keep(*_: Any) -> Any:
        raise ZeroDivisionError("never mind")

    with monkeypatch.context() as patch:
        patch.setattr(DomainPart, "keep", keep)
        found = measured(folder, tmp_path, "int8", max_tokens=24)
    for text in ("fox.txt", "numbers.txt"):
        first, other = [f for f in found["failed"] if f["part"] == f"accuracy {text}"]
        assert first["model"] == "src" and first["error"] == "ZeroDivisionError: never mind"
        assert other["model"] == "int8" and "Mend what failed of src first" in other["error"]
    assert len(found["failed"]) == 4
    assert found["models"]["int8"]["layers"]["linears"]
    assert "failed" not in measured(folder, tmp_path, "int8", max_tokens=24)


def test_what_cannot_be_measured_is_refused_before_anything_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line that names the cure, nothing loaded or written."""
    loads = watch_loads(monkeypatch)
    other, bare, wide = (tmp_path / name for name in ("other", "bare", "wide"))
    make("qwen2", other)
    fast_tokenizer().save_pretrained(other)
    for copy in (bare, wide):
        shutil.copytree(folder / "src", copy)
    for file in (*bare.glob("*tiktoken"), *bare.glob("tokenizer*")):
        file.unlink()
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": 999}))
    (tmp_path / "short.txt").write_text("The fox.")
    (tmp_path / "file").write_text("")
    same, broken = tmp_path / "same" / "int8", tmp_path / "broken" / "profile.json"
    same.parent.mkdir()
    shutil.copytree(folder / "int8", same)
    broken.parent.mkdir()
    broken.write_text("{")
    fox, short = str(folder / "fox.txt"), str(tmp_path / "short.txt")
    small, out = ["--seqlen", "24"], tmp_path / "out"
    for model, words, expected in (
        (other, ["--text", fox, *small], r"token ids of fox.txt by other: expected those of src"),
        (wide, ["--text", fox, *small], r"vocab_size of wide: expected \d+, as of src, got 999"),
        (bare, ["--text", fox, *small], r"tokenizer of bare: expected its files.* Copy those"),
        (bare, ["--task", "gsm8k", "--data-dir", str(folder)], r"gsm8k"),
        (folder / "int8", ["--text", short], r"short.txt: expected at least 512 tokens, got \d\."),
        (folder / "int8", ["--long-context", fox], r"fox.txt: expected at least \d+ tokens"),
        (folder / "int8", ["--device", "cuda:77"], r"device: expected .*, got cuda:77.*--device"),
        (folder / "int8", ["--dtype", "int3"], r"dtype: expected .*float32.*, got"),
        (folder / "src", ["-o", str(out)], r"models: expected one beside the reference"),
        (folder / "int8", ["-o", str(folder / "int8")], r"int8: expected a directory of its own"),
        (folder / "int8", [str(same)], r"different names, got .*int8 and .*int8\. Rename one"),
        (folder / "int8", ["--batch", "0"], r"--batch: expected numbers of at least 1, got 0"),
        (folder / "int8", ["--text", str(folder)], r"expected a file, got a directory"),
        (folder / "int8", ["-o", str(broken.parent)], r"profile.json: expected a profile.json"),
        (folder / "int8", ["-o", str(tmp_path / "file")], r"file.*expected a directory"),
        (folder / "int8", ["-o", str(tmp_path / "file" / "x")], r"x: expected a directory"),
    ):
        given = ["profile", str(model), "--against", str(folder / "src"), "-o", str(out), *words]
        result = CliRunner().invoke(cli, given)
        assert result.exit_code == 2, (words, result.output)
        assert len(result.stderr.splitlines()) == 1 and re.search(expected, result.stderr), (
            result.stderr
        )
        assert not out.exists() and loads == [] and not result.stdout
    words = ["profile", str(folder / "int8"), str(bare), "--text", fox, *small, "-o", str(out)]
    result = CliRunner().invoke(cli, words)  # without --against each is looked at, too
    assert result.exit_code == 2 and "tokenizer of bare" in result.stderr, result.output
    assert not out.exists() and loads == []


def test_an_error_is_json_where_that_was_asked_for(tmp_path: Path) -> None:
    for flag in ("--log-json", "--json"):
        result = CliRunner().invoke(cli, ["profile", str(tmp_path / "nowhere"), flag])
        assert result.exit_code == 2
        said = json.loads(result.stdout.splitlines()[-1])
        assert said["event"] == "error" and "nowhere" in json.dumps(said)


def test_an_option_of_two_kinds_means_one_thing() -> None:
    """Options are given by name to every kind that has them."""
    names = [f.name for kind in Protocol().kinds().values() for f in fields(kind)]  # type: ignore
    assert {name for name in names if names.count(name) > 1} <= {"kv_caches", "texts"}
    protocol = Protocol.of(kv_caches=("fp8",), texts=("a.txt",))
    assert protocol.speed.kv_caches == protocol.memory.kv_caches == ("fp8",)
    assert protocol.memory.texts == protocol.accuracy.texts == ("a.txt",)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        measured(folder, tmp_path / "a", "int8", "nowhere")
    for texts, text in ((("no.txt",), r"no\.txt"), (("a/x.txt", "b/x.txt"), "different names")):
        with pytest.raises(InputError, match=text):
            protocol = Protocol.of(texts=texts)
            profile_models([str(folder / "int8")], tmp_path / "a", protocol=protocol)
    with pytest.raises(SpecError, match="--new-tokens"):
        Protocol.of(new_tokens=(0,))
    with pytest.raises(SpecError, match="known settings"):
        Protocol.of(no_such=1)
    assert not (tmp_path / "a").exists()
    rest = '"protocol": {}, "machine": {}}'
    for damaged, said in (
        ("[]", ""),
        ('{"format": 1, "models": {}}', ""),
        ("{", ""),
        ('{"format": 2, "protocol": {}, "models": {}}', ": machine"),
        ('{"format": 2, "models": {"a": 1}, ' + rest, r": models\.a"),
        ('{"format": 2, "models": {"a": {"speed": 3}}, ' + rest, r": models\.a\.speed"),
        ('{"format": 2, "models": {}, "aside": {"a": null}, ' + rest, r": aside\.a"),
        ('{"format": 2, "models": {}, "seeds": 3, ' + rest, ": seeds"),
        ('{"format": 2, "models": {}, "protocol": {}, "machine": {"versions": 3}}', ": machine"),
    ):
        (tmp_path / "profile.json").write_text(damaged)
        with pytest.raises(InputError, match=rf"profile\.json{said}.*expected.*remove the file"):
            measured(folder, tmp_path, "int8")
        assert (tmp_path / "profile.json").read_text() == damaged


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["profile", str(folder / "int8"), "--against", str(folder / "src")]
    words += ["--text", str(folder / "fox.txt"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--seqlen", "24", "--max-tokens", "240", "--speed", "none", "--memory", "none"]

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    for part, said in ((DomainPart, "goes on from there"), (LoadPart, "nothing was measured")):
        with monkeypatch.context() as patch:
            patch.setattr(part, "measure", interrupt)
            result = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / part.__name__)])
        assert result.exit_code == 130 and said in result.stderr
    assert "target" not in result.stderr

    def fail(*_: Any) -> Any:
        raise RunError("never mind")

    with monkeypatch.context() as patch:
        patch.setattr(DomainPart, "measure", fail)
        result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1 and "2 failed measurements, first src: acc" in result.stderr
    assert "int8" in result.stdout  # what there is
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "fox.txt" in result.stdout and "KL" in result.stdout and "int8" in result.stdout
    assert "int8: accuracy fox.txt: KL" in result.stderr and "(5 of 5)" in result.stderr
    result = CliRunner().invoke(cli, [*words, "--log-json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["stage", "profile_planned", "done"]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert "speed" not in json.loads(result.stdout)["models"]["int8"]
    result = CliRunner().invoke(cli, [*words, "--seqlen", "1"])
    assert result.exit_code == 2 and "error: --seqlen" in result.stderr


def test_the_command_is_kept_without_folders_of_this_machine(folder: Path, tmp_path: Path) -> None:
    words = ["profile", f"{folder / 'int8'}/", "--device=cpu", "--speed", "none"]
    words += ["--memory", "none", "-o", str(tmp_path / "out")]
    for _ in range(2):
        assert CliRunner().invoke(cli, words, prog_name="qquant").exit_code == 0
    kept = json.loads((tmp_path / "out" / "profile.json").read_text())["commands"]
    assert kept == ["qquant profile int8 --device=cpu --speed none --memory none -o out"]
    assert kept[0] in (tmp_path / "out" / "REPORT.md").read_text()
    assert str(folder) not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("way", ["from inside its folder", "through a link"])
def test_a_directory_is_named_as_one_likes(
    way: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, and below a link: the checks against files that leave a directory know both."""
    if way == "through a link":
        (tmp_path / "link").symlink_to(folder)
        names = [str(tmp_path / "link" / name) for name in ("int8", "src")]
    else:
        monkeypatch.chdir(folder)
        names = ["int8", "./src"]
    out = str(tmp_path / "out")
    words = ["profile", names[0], "--against", names[1], "--text", str(folder / "fox.txt")]
    words += ["-o", out, "--device", "cpu", "--seqlen", "24", "--max-tokens", "240"]
    result = CliRunner().invoke(cli, [*words, "--speed", "none", "--memory", "none"])
    assert result.exit_code == 0, result.output
    for command in (["verify", names[0], "--against", names[1]], ["inspect", names[0]]):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
