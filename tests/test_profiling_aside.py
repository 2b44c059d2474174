"""What was measured of something else, or otherwise, waits aside and comes back."""

# ruff: noqa: F811  (fixtures)

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_models import QUICK, domain, folder, measured, no_speed, quick_pictures, watch_loads  # noqa: F401

from qquant.events import Measured, Warned
from qquant.parts.accuracy import DomainPart
from qquant.parts.base import Model
from qquant.profile_report import render_text
from qquant.profiling import profile_models
from qquant.protocol import Protocol


def test_models_side_by_side_were_measured_alike(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    first = measured(folder, tmp_path, "int8", "copy")
    events: list[Any] = []
    other = measured(folder, tmp_path, "int8", max_tokens=240, progress=events.append)
    assert set(other["models"]) == {"src", "int8"}
    assert other["aside"]["copy"]["accuracy"] == first["models"]["copy"]["accuracy"]
    (warned,) = [event.text for event in events if isinstance(event, Warned)]
    assert "copy was measured otherwise (accuracy fox.txt, accuracy numbers.txt)" in warned
    events.clear()
    again = measured(folder, tmp_path, "copy", progress=events.append)
    made = [event.model for event in events if isinstance(event, Measured)]
    assert "copy" not in made and again["models"]["copy"] == first["models"]["copy"]
    assert set(again["models"]) == {"src", "copy"} and again["models"]["src"]["load"]["reference"]
    assert again["models"]["src"] == first["models"]["src"]  # what had been set aside as well
    alone = measured(folder, tmp_path, "src", "int8", "copy", against=None)
    assert not alone["models"]["src"]["load"]["reference"]
    assert not any("kl" in domain(alone, model) for model in alone["models"])


def no_text(
    folder: Path, out: Path, *models: Path, against: Path | None, device: str = "cpu", **own: Any
) -> dict[str, Any]:
    named = None if against is None else str(against)
    more: dict[str, Any] = {"protocol": Protocol.of(**QUICK | own), "dtype": "float32"}
    paths = [str(model) for model in models]
    return profile_models(paths, out, against=named, device=device, **more)


def test_figures_of_earlier_files_do_not_stand_beside_new_ones(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    """The weights are made anew in place, and accuracy is not asked for again."""
    int8 = Path(shutil.copytree(folder / "int8", tmp_path / "int8"))
    src, weights, out = folder / "src", int8 / "model.safetensors", tmp_path / "out"
    first = measured(folder, out, str(int8), max_tokens=24)
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    second = no_text(folder, out, int8, against=src)
    assert "accuracy" not in second["models"]["int8"]
    assert domain(second, "src") == domain(first, "src")
    assert second["aside"]["int8"]["accuracy"] == first["models"]["int8"]["accuracy"]
    assert "KL" not in render_text(second)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert no_text(folder, out, int8, against=src)["models"] == first["models"]


def test_figures_against_another_reference_do_not_stay(
    folder: Path, tmp_path: Path, no_speed: None
) -> None:
    first = measured(folder, tmp_path, "int8", "wrong", max_tokens=24)
    alone = no_text(folder, tmp_path, folder / "int8", against=None)
    assert alone["models"] == first["models"] and alone["reference"] == "src"
    other = Path(shutil.copytree(folder / "src", tmp_path / "other"))
    os.utime(other / "config.json")
    second = no_text(folder, tmp_path, folder / "int8", against=other)
    assert second["reference"] == "other" and "accuracy" not in second["models"]["int8"]
    assert set(second["models"]) == {"other", "int8"} and "KL" not in render_text(second)
    again = no_text(folder, tmp_path, folder / "int8", folder / "wrong", against=folder / "src")
    assert {name: again["models"][name] for name in first["models"]} == first["models"]


def test_what_fails_anew_is_not_shown_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    first = measured(folder, tmp_path, "int8")
    with monkeypatch.context() as patch:
        patch.setattr(DomainPart, "measure", lambda *_: 1 / 0)
        failed = measured(folder, tmp_path, "int8", max_tokens=240)
    assert len(failed["failed"]) == 4 and "KL" not in render_text(failed)
    assert not any("accuracy" in entry for entry in failed["models"].values())
    loads = watch_loads(monkeypatch)
    assert measured(folder, tmp_path, "int8")["models"] == first["models"] and loads == []


def test_rows_of_two_texts_are_told_apart_and_come_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    def run(text: str, *lengths: int) -> dict[str, Any]:
        more: dict[str, Any] = {"long_text": str(folder / text), "lengths": lengths}
        return no_text(folder, tmp_path, folder / "int8", against=None, **more)

    first = run("fox.txt", 8, 16, 32)
    second = run("numbers.txt", 16)
    rows = second["models"]["int8"]["long_context"]["rows"]
    texts = {(row["length"], row["text"]) for row in rows}
    assert texts == {(8, "fox.txt"), (16, "numbers.txt"), (32, "fox.txt")}
    shown = render_text(second)
    assert "fox.txt, up to 64 tokens" in shown and "numbers.txt, up to 32 tokens" in shown
    loads = watch_loads(monkeypatch)
    assert run("fox.txt", 8, 16, 32)["models"] == first["models"] and loads == []
    assert run("numbers.txt", 16)["models"] == second["models"] and loads == []
    for row in second["models"]["int8"]["long_context"]["rows"]:  # as if one name had been changed
        row |= {"text": "fox.txt", "most_tokens": 64}
    lines = [line for line in render_text(second).splitlines() if "fox.txt, up to 64" in line]
    assert len(lines) == 2 * 4 and len({line.rsplit("(", 1)[1] for line in lines}) == 2


def test_an_older_profile_keeps_its_rows_and_is_told_of_what_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_speed: None
) -> None:
    """Results once had none of the hashes beside their key."""
    more: dict[str, Any] = {"long_text": str(folder / "fox.txt"), "lengths": (8, 16)}
    first = measured(folder, tmp_path, "int8", max_tokens=24, **more)
    old = json.loads(json.dumps(first))
    new = ("of", "on", "against", "sha256", "most_tokens", "chat", "seqlen")
    for entry in old["models"].values():
        texts = entry["accuracy"]["domains"].values()
        rows = entry["long_context"]["rows"]
        for result in (entry["load"], *entry["speed"].values(), *texts, *rows):
            for key in (*new, *(["text"] if "length" in result else [])):
                result.pop(key, None)
    (tmp_path / "profile.json").write_text(json.dumps(old))
    loads = watch_loads(monkeypatch)
    again = measured(folder, tmp_path, "int8", max_tokens=24, **more)
    assert loads == [] and again["reference"] == "src"
    rows = again["models"]["int8"]["long_context"]["rows"]
    assert [row["length"] for row in rows] == [8] * 4 + [16] * 4
    again["models"]["int8"]["load"]["on"] = "as another version hashed it"
    (tmp_path / "profile.json").write_text(json.dumps(again))
    assert measured(folder, tmp_path, "int8", max_tokens=24, **more)["models"] == {
        **again["models"],
        "int8": again["models"]["int8"] | {"load": first["models"]["int8"]["load"]},
    }
    assert all({"of", "on"} <= set(row) for row in rows)
    assert domain(again, "int8")["against"] == domain(first, "int8")["against"]


def test_the_same_device_is_no_other_machine(folder: Path, tmp_path: Path, no_speed: None) -> None:
    """Nothing is measured again, and all of it stays, however the device is spelled."""
    first = no_text(folder, tmp_path, folder / "int8", against=folder / "src", device="cpu")
    if torch.cuda.is_available():
        pytest.skip("there is another device here, which `auto` takes")
    more: dict[str, Any] = {"speed": ("none",), "device": "auto"}
    second = no_text(folder, tmp_path, folder / "int8", against=folder / "src", **more)
    assert second["models"] == first["models"] and "aside" not in second


def test_logs_in_a_models_directory_are_no_other_model(folder: Path) -> None:
    model = Model(str(folder / "int8"))
    before = model.identity()
    (folder / "int8" / "events.jsonl").write_text("{}")
    (folder / "int8" / "nohup.out").write_text("")
    assert model.identity() == before
    (folder / "int8" / "events.jsonl").unlink(), (folder / "int8" / "nohup.out").unlink()
