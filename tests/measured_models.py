"""What the tests of profiles measure: tiny models, two texts, and nothing that takes long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_convert import make

from qquant import (
    QuantSpec,
    profiling,
    quantize,
    runtime,
)
from qquant.profiling import profile_models
from qquant.protocol import Protocol
from qquant.reporting import png

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 40
QUICK = {"seqlen": 24, "max_tokens": 480, "contexts": (8,), "new_tokens": (6,), "repeats": 2}
QUICK |= {"speed": ("modern",), "memory": ("none",), "encode_tokens": 16}
NOTHING = {"speed": ("none",), "memory": ("none",)}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is tested where it belongs."""
    monkeypatch.setattr(png, "draw", lambda chart: b"PNG")


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
            found = {"preset": "modern", "context": 8, "batch": 1, "decode_tokens_per_s": 2.0}
            return {**found, "ttft_s": [1.0 + next(runs), 0.0]}

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
    turns = [{"from": "user", "value": "Who?"}, {"from": "assistant", "value": "The fox. " * 9}]
    (root / "chat.json").write_text(json.dumps([{"conversations": turns}] * 9))
    return root


def measured(folder: Path, out: Path, *models: str, **more: Any) -> dict[str, Any]:
    texts = tuple(str(folder / name) for name in ("fox.txt", "numbers.txt"))
    own = {"chats", "long_text", "lengths", "long_tokens", *QUICK}
    settings = QUICK | {k: more.pop(k) for k in list(more) if k in own}
    protocol = Protocol.of(texts=texts, **settings)
    more = {"against": str(folder / "src"), "device": "cpu", "dtype": "float32"} | more
    return profile_models([str(folder / m) for m in models], out, protocol=protocol, **more)


def domain(found: dict[str, Any], model: str, text: str = "fox.txt") -> dict[str, Any]:
    return found["models"][model]["accuracy"]["domains"][text]


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the directories that are loaded from now on."""
    loads: list[str] = []
    original = runtime.load

    def load(path: str, **more: Any) -> Any:
        loads.append(Path(path).name)
        return original(path, **more)

    monkeypatch.setattr(runtime, "load", load)
    return loads
