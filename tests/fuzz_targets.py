"""Every parser of a user's file, once: what it starts from, how it is spoiled, how it is run.

`TARGETS` is what `scripts/fuzz.py` and `test_fuzz.py` go by, so a new parser is added here and
nowhere else. The rule is the same for all (`attempt`): what is read is right or is refused with an
error of qquant's tree, in one printable line of bounded length that names what is at fault.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import handmade
import torch
from fuzz_measuring import MEASURING
from fuzz_target import LONGEST, Run, Target, value_of
from qwen_tiny import write_checkpoint, write_ranks
from safetensors.torch import save, save_file

from qquant.bnb_layout import BnbLayout, decode_state, encode_state, quantization_config
from qquant.bnb_spec import BnbSpec
from qquant.calibration.tokens import calibration_tokens
from qquant.checkpoint import QUANTIZE_CONFIGS, Checkpoint
from qquant.compressed_layout import METHOD as COMPRESSED
from qquant.config import CalibrationSpec, OutputSpec, QuantSpec, spec_from_recipe
from qquant.convert import quantize
from qquant.directory import CONFIG, INDEX, WEIGHTS
from qquant.front_matter import find_licence
from qquant.journal import Journal
from qquant.manifest import NAME as MANIFEST
from qquant.models.tokenizer import load_tokenizer, tokenizer_errors
from qquant.publish import JOURNAL
from qquant.reproduce import reproduce
from qquant.runtime import load
from qquant.sums import NAME as SUMS
from qquant.sums import write_sums
from qquant.verify import inspect, verify

IDS = torch.arange(16).view(2, 8)
FAST = QuantSpec(group_size=32, scale_search=0, sweeps=0, correct=0.0, correct_residual=0.0)


def look(folder: Path) -> None:
    """Every verb that only looks; what `verify` finds is a list and not raised."""
    report = verify(folder)
    json.dumps(report.to_dict(), allow_nan=False)
    for text in (report.render(), inspect(folder).render()):
        assert text.replace("\n", "").isprintable()
    json.dumps(inspect(folder).to_dict())


def _header(folder: Path) -> tuple[list[bytes], Run]:
    (folder / CONFIG).write_text('{"model_type": "qwen2"}')
    tensors = {
        "model.layers.0.up.weight": torch.randn(4, 8).bfloat16(),
        "model.norm.weight": torch.randn(8),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "f8": torch.zeros(4, dtype=torch.float8_e4m3fn),
    }

    def run(data: bytes) -> None:
        (folder / WEIGHTS).write_bytes(data)
        checkpoint = Checkpoint.open(folder)
        for name, info in checkpoint.tensors.items():
            assert tuple(checkpoint.read(name).shape) == info.shape
        look(folder)

    return [save(tensors, {"format": "pt"}), save({"a": tensors["scalar"]})], run


def _index(folder: Path) -> tuple[list[bytes], Run]:
    (folder / CONFIG).write_text('{"model_type": "qwen2"}')
    files = {f"model-0000{i}-of-00002.safetensors": f"model.layers.{i}.w" for i in (1, 2)}
    for file, name in files.items():
        save_file({name: torch.ones(2)}, folder / file, {"format": "pt"})
    (folder.parent / "outside.safetensors").write_bytes(b"not to be read")
    weight_map = {name: file for file, name in files.items()}
    seed = {"metadata": {"total_size": 16}, "weight_map": weight_map}

    def run(data: bytes) -> None:
        (folder / INDEX).write_bytes(data)
        look(folder)
        for name in Checkpoint.open(folder).tensors:
            assert name in weight_map

    return [json.dumps(seed).encode()], run


def _config(kind: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        source = folder / "source"
        if kind == "qwen":
            write_checkpoint(source, code=False)
        else:
            handmade.tiny_qwen2(hidden=64, ffn=64, layers=1).save_pretrained(source)
        seed = (source / CONFIG).read_bytes()

        def run(data: bytes) -> None:
            (source / CONFIG).write_bytes(data)
            shutil.rmtree(folder / "target", ignore_errors=True)
            inspect(source).render()
            quantize(source, folder / "target", FAST, tokens=IDS, device="cpu", restart=True)
            look(folder / "target")
            with torch.no_grad():
                load(folder / "target", device="cpu").model(IDS)

        return [seed], run

    return prepare


def _gptq(folder: Path) -> dict[str, Any]:
    model = handmade.tiny_qwen2(hidden=64, ffn=64, layers=1)
    made, _ = handmade.make_pair(model, folder / "made", blocks="model.layers")
    for path in made.iterdir():
        path.rename(folder / path.name)
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def _quantization(folder: Path) -> tuple[list[bytes], Run]:
    config = _gptq(folder)
    plain = config["quantization_config"]
    rules = {r"+:model\.layers\.0\.(?:mlp\.up_proj)$": {"bits": 4}, "-:.*never.*": {}}
    bnb = quantization_config(BnbSpec("nf4"), "float32", ["lm_head"])

    def run(data: bytes) -> None:
        (folder / QUANTIZE_CONFIGS[0]).write_bytes(data)
        inside = config | {"quantization_config": value_of(data)}
        (folder / CONFIG).write_text(json.dumps(inside))
        look(folder)
        with torch.no_grad():
            load(folder, device="cpu").model(IDS)

    return [json.dumps(d).encode() for d in (plain, plain | {"dynamic": rules}, bnb)], run


def _compressed(file: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        handmade.tiny_qwen2(hidden=64, ffn=64, layers=1).save_pretrained(folder / "source")
        spec, out = QuantSpec(method="rtn", group_size=32), OutputSpec(format=COMPRESSED)
        made = quantize(folder / "source", folder / "made", spec, out=out, device="cpu").path
        config = json.loads((made / CONFIG).read_text())
        ours = config["quantization_config"]
        seed = json.dumps(ours).encode() if file == CONFIG else (made / file).read_bytes()

        def run(data: bytes) -> None:
            if file == CONFIG:
                data = json.dumps(config | {"quantization_config": value_of(data)}).encode()
            (made / file).write_bytes(data)
            look(made)
            with torch.no_grad():
                load(made, device="cpu").model(IDS)

        return [seed], run

    return prepare


def _manifest(folder: Path) -> tuple[list[bytes], Run]:
    _gptq(folder)
    names = [CONFIG, WEIGHTS, QUANTIZE_CONFIGS[0]]
    seed = {
        "manifest": 1,
        "source": {"name": "x", "sha256": "0" * 64},
        "quantization": {"bits": 4, "bit_choices": [3, 4]},
        "files": {name: "0" * 64 for name in names},
    }

    def run(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        look(folder)

    return [json.dumps(seed).encode()], run


def _sums(folder: Path) -> tuple[list[bytes], Run]:
    _gptq(folder)
    write_sums(folder, {})
    seed = (folder / SUMS).read_bytes()

    def run(data: bytes) -> None:
        (folder / SUMS).write_bytes(data)
        look(folder)

    return [seed], run


def _reproduce(folder: Path) -> tuple[list[bytes], Run]:
    source, made = folder / "source", folder / "made"
    handmade.tiny_qwen2(hidden=64, ffn=64, layers=1).save_pretrained(source)
    quantize(source, made, QuantSpec(method="rtn", group_size=32), device="cpu")
    seed = (made / MANIFEST).read_bytes()

    def run(data: bytes) -> None:
        (made / MANIFEST).write_bytes(data)
        reproduce(made, source).render()

    return [seed], run


def _ranks(file: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        write_checkpoint(folder, code=False)
        ranks = write_ranks(folder / "qwen.tiktoken").read_bytes()
        extra = b"aGVsbG8= 600\nd29ybGQ= 601\n"

        def run(data: bytes) -> None:
            (folder / file).write_bytes(data)
            tokenizer = load_tokenizer(Checkpoint.open(folder))
            assert tokenizer.decode(tokenizer.encode("Hi, 你好")) == "Hi, 你好"

        return [ranks if file == "qwen.tiktoken" else extra], run

    return prepare


def write_tokenizer(folder: Path) -> None:
    """The files of a Qwen2 tokenizer; its vocabulary is the bytes and one merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "th"])}
    made = Tokenizer(models.BPE(vocab, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    Qwen2Tokenizer(tokenizer_object=made).save_pretrained(folder)


def _tokenizer(file: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        write_tokenizer(folder)
        (folder / CONFIG).write_text('{"model_type": "qwen2"}')
        save_file({"a": torch.ones(1)}, folder / WEIGHTS)
        seed = (folder / file).read_bytes()

        def run(data: bytes) -> None:
            (folder / file).write_bytes(data)
            tokenizer = load_tokenizer(Checkpoint.open(folder))
            with tokenizer_errors("tokenizer"):
                tokenizer.encode("Hi, 你好 " + "a" * 40 + "b")

        return [seed], run

    return prepare


def _generation(folder: Path) -> tuple[list[bytes], Run]:
    _gptq(folder)
    seed = {"eos_token_id": [1, 2], "do_sample": True, "top_p": 0.8, "max_new_tokens": 4}

    def run(data: bytes) -> None:
        (folder / "generation_config.json").write_bytes(data)
        load(folder, device="cpu")

    return [json.dumps(seed).encode()], run


def _licence(folder: Path) -> tuple[list[bytes], Run]:
    def run(data: bytes) -> None:
        for name in ("README.md", "LICENSE"):
            (folder / name).write_bytes(data)
            found = find_licence(folder)
            (folder / name).unlink()
            assert len(str(found)) < LONGEST

    return [b"---\nlicense: other\nlicense_name: x\n---\n# Title\n", b"Apache License 2.0\n"], run


RECORDS = (
    {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes"}]},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be"}]},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "1"},
        ]
    },
    {"instruction": "Add", "input": "1", "output": "2", "history": [["a", "b"]]},
    {"turns": ["One", "Two"]},
    {"text": "Some text.\n\nMore of it."},
)


def _calibration(suffix: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        write_checkpoint(folder / "source", code=False)
        tokenizer = load_tokenizer(Checkpoint.open(folder / "source"))

        def run(data: bytes) -> None:
            file = folder / f"calib{suffix}"
            file.write_bytes(data)
            spec = CalibrationSpec(sources=(str(file),), samples=2, seqlen=8)
            ids = calibration_tokens(tokenizer, spec, model_type="qwen").ids
            assert ids.shape == (2, 8) and 0 <= int(ids.min()) <= int(ids.max()) < len(tokenizer)

        if suffix == ".txt":
            text = "Wörter und Sätze.\n\n你好 " * 4
            return [
                text.encode(c)
                for c in ("utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32")
                if c != "latin-1"
            ] + ["Wörter".encode("latin-1")], run
        if suffix == ".json":
            return [json.dumps([record, record]).encode() for record in RECORDS], run
        lines = [json.dumps(r).encode() + b"\n" for r in RECORDS]
        return [line + line for line in lines], run

    return prepare


def _spec(kind: type[Any]) -> Callable[[Path], tuple[list[bytes], Run]]:
    """The specs, as a caller of the library (or a manifest) may fill them."""

    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        seeds: list[dict[str, Any]] = [{f.name: getattr(kind(), f.name) for f in fields(kind)}]
        if kind is QuantSpec:
            seeds.append(seeds[0] | {"bits": 3, "target_bpw": 4.5})

        def run(data: bytes) -> None:
            values = value_of(data)
            known = {f.name for f in fields(kind)}
            spec = kind(**{key: value for key, value in values.items() if key in known})
            json.dumps(spec.to_dict() if hasattr(spec, "to_dict") else str(spec), allow_nan=False)
            if kind is QuantSpec:
                spec_from_recipe(values.pop("recipe", "fast"), **values)

        return [json.dumps(seed).encode() for seed in seeds], run

    return prepare


def _journal(folder: Path) -> tuple[list[bytes], Run]:
    identity = {"quant.bits": 4, "source": "x"}
    Journal.open(folder, identity).begin({"calibration": {"sha256": "0"}}, torch.ones(2, 3).long())
    seed = (folder / JOURNAL).read_bytes()

    def run(data: bytes) -> None:
        (folder / JOURNAL).write_bytes(data)
        journal = Journal.open(folder, identity)
        journal.ids(), journal.streams(lambda tensor: tensor)
        assert journal.block == 0 and journal.facts == {"calibration": {"sha256": "0"}}

    return [seed], run


def _state(folder: Path) -> tuple[list[bytes], Run]:
    def run(data: bytes) -> None:
        decode_state("h.0.mlp", data)

    return [encode_state("nf4", "bfloat16", (64, 32), o) for o in (None, 0.25)], run


def _bnb_config(folder: Path) -> tuple[list[bytes], Run]:
    seeds = [quantization_config(BnbSpec(m), "float16", ["lm_head"]) for m in ("nf4", "int8")]

    def run(data: bytes) -> None:
        assert BnbLayout.parse(value_of(data)).summary.isprintable()

    return [json.dumps(seed).encode() for seed in seeds], run


SPECS = tuple(f.name for kind in (QuantSpec, OutputSpec, BnbSpec) for f in fields(kind))
TARGETS: dict[str, Target] = {
    "header": Target("safetensors", (WEIGHTS,), _header),
    "index": Target("json", (INDEX, "file ", "weights of"), _index),
    "config-qwen": Target("json", (CONFIG, "transformer."), _config("qwen")),
    "config-qwen2": Target("json", (CONFIG, "model.", "lm_head"), _config("qwen2")),
    "quantization": Target("json", ("quant", "model.", "bitsandbytes", CONFIG), _quantization),
    "compressed-config": Target(
        "json", ("quantization_config", "model.", CONFIG), _compressed(CONFIG)
    ),
    "compressed-header": Target("safetensors", (WEIGHTS, "model.", CONFIG), _compressed(WEIGHTS)),
    "bnb-config": Target("json", ("quantization_config",), _bnb_config),
    "bnb-state": Target("json", ("h.0.mlp",), _state),
    "manifest": Target("json", (MANIFEST,), _manifest),
    "sums": Target("lines", (SUMS,), _sums),
    "reproduce": Target(
        "json", (MANIFEST, "source", "calib", "device", "dtype", *SPECS), _reproduce
    ),
    "ranks": Target("lines", ("qwen.tiktoken",), _ranks("qwen.tiktoken")),
    "ranks-extra": Target("lines", ("qwen_extra.tiktoken",), _ranks("qwen_extra.tiktoken")),
    "tokenizer": Target("json", ("tokenizer",), _tokenizer("tokenizer.json")),
    "tokenizer-config": Target("json", ("tokenizer",), _tokenizer("tokenizer_config.json")),
    "generation": Target("json", ("generation_config.json",), _generation),
    "licence": Target("bytes", (), _licence),
    "calib-json": Target("json", ("calib.json",), _calibration(".json")),
    "calib-jsonl": Target("records", ("calib.jsonl",), _calibration(".jsonl")),
    "calib-txt": Target("bytes", ("calib.txt",), _calibration(".txt")),
    "spec-quant": Target("json", tuple(f.name for f in fields(QuantSpec)), _spec(QuantSpec)),
    "spec-calib": Target(
        "json", tuple(f.name for f in fields(CalibrationSpec)), _spec(CalibrationSpec)
    ),
    "spec-output": Target("json", tuple(f.name for f in fields(OutputSpec)), _spec(OutputSpec)),
    "spec-bnb": Target("json", tuple(f.name for f in fields(BnbSpec)), _spec(BnbSpec)),
    "journal": Target("lines", (JOURNAL, "unfinished"), _journal),
    **MEASURING,
}
