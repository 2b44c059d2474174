"""The seeds in `profile.json` are those that measurements draw with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from test_convert import make

from qquant import bandwidth, generation, profiling
from qquant.events import Measured
from qquant.kernel_report import KernelReport
from qquant.parts.base import Model, Part, Subject
from qquant.parts.memory import MemoryPart
from qquant.parts.speed import SpeedPart
from qquant.profiling import profile_models
from qquant.protocol import Protocol
from qquant.runtime import Loaded


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every seed that torch is given from now on."""
    seeds: list[int] = []
    own, everywhere = torch.Generator, torch.manual_seed

    class Generator:
        def manual_seed(self, seed: int) -> torch.Generator:
            seeds.append(seed)
            return own().manual_seed(seed)

    def manual_seed(seed: int) -> torch.Generator:
        seeds.append(seed)
        return everywhere(seed)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "manual_seed", manual_seed)
    return seeds


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (SpeedPart("modern", 4, 2), ["random_prompt"]),
        (SpeedPart("qwen", 2, 2), ["random_prompt", "qwen_sampling"]),
        (MemoryPart("encode", 4, 1), ["random_prompt"]),
        (MemoryPart("generate", 1, 2), ["random_prompt"]),
        (MemoryPart("weights"), []),
    ],
)
def test_a_measurement_draws_with_the_seeds_it_names(
    part: Part, names: list[str], drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here without a tokenizer, so that Qwen's protocol has random ids for a prompt, too."""
    monkeypatch.setattr(bandwidth, "copy_bandwidth", lambda device: 1.0)
    model = handmade.tiny_qwen2()
    report = KernelReport("auto", torch.device("cpu"), torch.float32)
    loaded = Loaded(model, None, report)
    drawn.clear()
    part.measure(Subject(Model("nowhere"), device="cpu", _loaded=loaded))
    assert list(part.seeds()) == names and drawn == list(part.seeds().values())


def test_the_profile_has_every_seed_and_another_seed_measures_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        """No process of its own."""

        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def measure(self, *_: Any) -> dict[str, Any]:
            return {"preset": "modern", "ttft_s": [1.0, 0.0], "decode_tokens_per_s": 2.0}

    monkeypatch.setattr(profiling, "Worker", Here)
    make("qwen2", tmp_path / "src")
    events: list[Any] = []

    def run(*speed: str) -> Any:
        events.clear()
        protocol = Protocol.of(speed=speed, memory=("none",), qwen_new_tokens=(3,), qwen_context=3)
        return profile_models(
            [str(tmp_path / "src")],
            tmp_path / "out",
            protocol=protocol,
            device="cpu",
            progress=events.append,
        )

    def made() -> list[str]:
        return [e.part for e in events if isinstance(e, Measured) and e.part != "load"]

    assert run("none")["seeds"] == {}
    assert run("modern")["seeds"] == {"random_prompt": generation.PROMPT_SEED}
    speeds = made()
    assert len(speeds) == 1
    assert run("modern")["seeds"] == {"random_prompt": generation.PROMPT_SEED} and not made()
    assert run("none")["seeds"] == {"random_prompt": generation.PROMPT_SEED}  # of what is there
    monkeypatch.setattr(generation, "PROMPT_SEED", 77)
    assert run("modern")["seeds"] == {"random_prompt": 77} and made() == speeds
    assert (
        json.loads((tmp_path / "out" / "profile.json").read_text())["seeds"]["random_prompt"] == 77
    )
    assert "- seed of random prompt: 77\n" in (tmp_path / "out" / "REPORT.md").read_text()
    assert ">seed of random prompt</th><td>77<" in (tmp_path / "out" / "report.html").read_text()
