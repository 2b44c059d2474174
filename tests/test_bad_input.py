"""Bad input of every kind, through the real command: exit code 2, one message, nothing written.

Each case starts from a checkpoint that quantizes (the first test shows it) and breaks one thing, so
that the refusal is for that thing. The words asserted are the file, key or tensor at fault and the
cure; the folder beside the source is compared before and after, hidden files too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from qwen_tiny import write_checkpoint
from safetensors.torch import load_file, save_file

from qquant.cli import cli

FAST = ("--samples", "4", "--seqlen", "16", "--group-size", "32", "--recipe", "fast")
ODD = "transformer.h.1.mlp.c_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good") / "source", code=False)


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "source"))


def quantize(source: Path, *more: str) -> Result:
    target = source.parent / "target"
    words = ["quantize", str(source), "-o", str(target), "--device", "cpu", *FAST, *more]
    return CliRunner().invoke(cli, words)


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in sorted(root.rglob("*"))
    }


def refused(source: Path, words: tuple[str, ...], *more: str) -> None:
    before = tree(source.parent)
    result = quantize(source, *more)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    errors = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert errors == result.stderr.splitlines()[-1:], result.stderr
    assert "bug in qquant" not in result.stderr and "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0], f"{word!r} is not in {errors[0]!r}"
    assert tree(source.parent) == before


def test_the_checkpoint_that_the_cases_break_does_quantize(source: Path) -> None:
    result = quantize(source)
    assert result.exit_code == 0, result.output
    assert (source.parent / "target" / "model.safetensors").is_file()
    assert sorted(p.name for p in source.parent.iterdir()) == ["source", "target"]


def change_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))


def change_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard(source: Path) -> tuple[Path, Path]:
    """The weights over two shards with an index; returns the shards."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    files = [source / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {}
    for part, file in zip(parts, files, strict=True):
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file.name))
    index = {"metadata": {}, "weight_map": where}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return files[0], files[1]


def test_no_such_checkpoint(source: Path) -> None:
    shutil.rmtree(source)
    refused(source, ("source", "directory"))


def test_a_hub_name_instead_of_a_directory(tmp_path: Path) -> None:
    before = tree(tmp_path)
    words = ["quantize", "Qwen/Qwen-7B-Chat", "-o", str(tmp_path / "target")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2 and "download" in result.stderr
    assert tree(tmp_path) == before


def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    refused(source, ("config.json",))


def test_config_is_not_json(source: Path) -> None:
    (source / "config.json").write_text("{model_type:")
    refused(source, ("config.json", "JSON"))


def test_not_a_qwen(source: Path) -> None:
    change_config(source, model_type="llama")
    refused(source, ("llama", "qwen"))


def test_missing_shard(source: Path) -> None:
    _, second = shard(source)
    second.unlink()
    refused(source, (second.name,))


def test_truncated_shard(source: Path) -> None:
    _, second = shard(source)
    second.write_bytes(second.read_bytes()[:-100])
    refused(source, (second.name,))


def test_truncated_single_file(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5])
    refused(source, (file.name,))


@pytest.mark.parametrize("outside", ["../outside.safetensors", "/etc/passwd"])
def test_index_naming_a_file_outside(source: Path, outside: str) -> None:
    first, _ = shard(source)
    if outside.startswith(".."):
        shutil.copy(first, source.parent / "outside.safetensors")
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][ODD] = outside
    file.write_text(json.dumps(index))
    refused(source, (outside,))


def test_pickled_weights_only(source: Path) -> None:
    (source / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, source / "pytorch_model.bin")
    refused(source, ("pytorch_model.bin", "safetensors"))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_are_not_finite(source: Path, method: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ODD][3, 5] = float("nan")

    change_weights(source, spoil)
    refused(source, (ODD,), "--method", method)


def test_a_missing_tensor(source: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[ODD]

    change_weights(source, drop)
    refused(source, (ODD,))


def test_dimensions_that_do_not_divide(source: Path) -> None:
    refused(source, ("group", "128", "transformer.h.0.attn.c_attn"), "--group-size", "128")


def test_already_quantized(source: Path) -> None:
    change_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(source, ("already quantized", "gptq", "Give the checkpoint it was made from"))


def test_no_tokenizer(source: Path) -> None:
    (source / "qwen.tiktoken").unlink()
    refused(source, ("tokenizer", "qwen.tiktoken"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.json", b"", ("empty.json",)),
        ("list.json", b"[]", ("list.json",)),
        ("foreign.json", b'[{"colour": "blue", "size": 3}]', ("foreign.json",)),
        ("broken.jsonl", b'{"instruction": "a", "output": "b"}\n{"inst', ("broken.jsonl", "2")),
        ("image.txt", b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", ("image.txt",)),
        ("short.txt", b"Too little.", ("short.txt", "token")),
    ],
)
def test_calibration_files(source: Path, name: str, content: bytes, words: tuple[str, ...]) -> None:
    file = source.parent / name
    file.write_bytes(content)
    refused(source, words, "--calib", str(file))


def test_calibration_file_that_is_not_there(source: Path) -> None:
    refused(source, ("nothing.json", "builtin"), "--calib", "nothing.json")


def test_calibration_weight_that_is_no_number(source: Path) -> None:
    refused(source, ("builtin=much",), "--calib", "builtin=much")


def test_target_exists(source: Path) -> None:
    (source.parent / "target").mkdir()
    (source.parent / "target" / "config.json").write_text("{}")
    refused(source, ("target", "--overwrite"))


def test_overwrite_does_not_wipe_what_is_no_model(source: Path) -> None:
    (source.parent / "target").mkdir()
    (source.parent / "target" / "letters.txt").write_text("dear")
    refused(source, ("target",), "--overwrite")


def test_target_is_the_source(source: Path) -> None:
    before = tree(source.parent)
    words = ["quantize", str(source), "-o", str(source), "--overwrite", *FAST]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2 and result.stderr.startswith("error: ")
    assert tree(source.parent) == before


def test_target_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source.parent / "readonly"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere: let the system say that it may not

        def access(path: str | os.PathLike[str], mode: int, **_: object) -> bool:
            return not (Path(path) == folder and mode & os.W_OK)

        monkeypatch.setattr(os, "access", access)
    before = tree(source.parent)
    words = ["quantize", str(source), "-o", str(folder / "target"), *FAST]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2 and "writ" in result.stderr
    assert str(folder) in result.stderr and result.stderr.count("\n") == 1
    assert tree(source.parent) == before


def test_target_in_a_folder_that_is_not_there(source: Path) -> None:
    words = ["quantize", str(source), "-o", str(source.parent / "no" / "target"), *FAST]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2 and "mkdir -p" in result.stderr


def test_disk_too_small(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(source, ("disk", "free"))


def test_unknown_recipe(source: Path) -> None:
    refused(source, ("recipe", "default, best, fast, qwen", "'worst'"), "--recipe", "worst")


def test_a_device_that_is_not_here(source: Path) -> None:
    refused(source, ("device", "--device cpu"), "--device", "cuda:99")


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_looking_at_what_is_not_there(tmp_path: Path, verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and "nothing" in result.stderr


def test_verify_and_inspect_tell_good_from_damaged(source: Path) -> None:
    assert quantize(source).exit_code == 0
    target = source.parent / "target"
    good = CliRunner().invoke(cli, ["verify", str(target), "--against", str(source), "--json"])
    report = json.loads(good.stdout.splitlines()[-1])
    assert good.exit_code == 0 and report["ok"] and len(report["layers"]) == 10
    shown = CliRunner().invoke(cli, ["inspect", str(target)])
    assert shown.exit_code == 0 and "GPTQ int4" in shown.stdout
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    damaged = CliRunner().invoke(cli, ["verify", str(target)])
    assert damaged.exit_code == 1
    assert "model.safetensors" in damaged.stdout
    assert damaged.stderr.startswith("error: ") and "problem" in damaged.stderr
