"""The model card and the manifest: what they must say, what they must not, and that both repeat."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from qquant.card import render_card, reproduce_command, write_card
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.config import CalibrationSpec, OutputSpec, QuantSpec, spec_from_recipe
from qquant.engine import forms
from qquant.events import LinearDone
from qquant.front_matter import Licence, base_model, find_licence, front_matter
from qquant.manifest import NAME, build_manifest, public_source, write_manifest
from qquant.products import chosen
from qquant.report import closing_lines, flag_rows, flagged

LAYERS = [
    LinearDone(0, "transformer.h.0.attn.c_attn", 1.5, 0.010, 0.1, (), 0.2),
    LinearDone(0, "transformer.h.0.mlp.w1", 2.5, 0.030, 0.4, ("damp-raised",), 0.2),
    LinearDone(1, "transformer.h.1.attn.c_attn", 1.7, 0.020, 0.1, ("dead-columns:3",), 0.2),
    LinearDone(1, "transformer.h.1.mlp.w1", 9.5, 0.050, 0.0, ("rtn-fallback",), 0.2),
]


@dataclass
class Tokens:
    ids: torch.Tensor
    sha256: str
    sources: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    root = tmp_path / "Qwen-Tiny-Chat"
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"model_type": "qwen"}))
    save_file({"transformer.wte.weight": torch.zeros(8, 32)}, root / "model.safetensors")
    return Checkpoint.open(root)


def make(
    directory: Path,
    source: Checkpoint,
    quant: QuantSpec | None = None,
    calib: CalibrationSpec | None = None,
    **changes: Any,
) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "config.json").write_text("{}")
    calib = calib or CalibrationSpec()
    record = {"name": "builtin", "documents": 128, "tokens": 65536, "weight": 1.0, "sha256": "a"}
    tokens = Tokens(torch.zeros(128, 512, dtype=torch.int64), "f" * 64, (record,))
    arguments: dict[str, Any] = {
        "source": source,
        "source_sha256": source.sha256(),
        "quant": quant or QuantSpec(),
        "calib": calib,
        "tokens": tokens,
        "out": OutputSpec(),
        "layers": LAYERS,
        "device": "cpu",
        "compute_dtype": "float32",
        "threads": 2,
    }
    manifest = build_manifest(**{**arguments, **changes})
    write_manifest(directory, manifest)
    return manifest


def test_manifest_holds_specs_hashes_and_layers(tmp_path: Path, source: Checkpoint) -> None:
    out = tmp_path / "out"
    made = make(out, source)
    found = json.loads((out / NAME).read_text("utf-8"))
    assert found == made
    assert found["source"]["name"] == "Qwen-Tiny-Chat"
    assert found["source"]["sha256"] == source.sha256()
    assert found["quantization"] == QuantSpec().to_dict()
    assert found["calibration"]["spec"]["samples"] == 128
    assert found["calibration"]["sha256"] == "f" * 64
    assert found["output"] == {"dtype": "float16", "shard_size": 2_000_000_000, "format": "gptq"}
    assert found["machine"]["threads"] == 2
    assert found["machine"]["products"] == chosen()
    assert found["machine"].items() >= forms("cpu", "float32", QuantSpec()).items()
    assert found["versions"]["torch"] == torch.__version__
    assert found["layers"][1] == {
        "name": "transformer.h.0.mlp.w1",
        "loss": 2.5,
        "relative_loss": 0.03,
        "damp": 0.4,
        "flags": ["damp-raised"],
    }
    weights = hashlib.sha256(b"weights").hexdigest()
    assert found["files"]["model.safetensors"] == weights
    assert set(found["files"]) == {"model.safetensors", "config.json"}


def test_card_is_among_the_hashed_files(tmp_path: Path, source: Checkpoint) -> None:
    out = tmp_path / "out"
    write_card(out, make(out, source), source)
    found = json.loads((out / NAME).read_text("utf-8"))
    card = hashlib.sha256((out / "README.md").read_bytes()).hexdigest()
    assert found["files"]["README.md"] == card


def test_neither_names_a_folder_of_this_machine(tmp_path: Path, source: Checkpoint) -> None:
    out = tmp_path / "out"
    corpus = tmp_path / "private" / "sft.json"
    calib = CalibrationSpec(sources=(f"{corpus}=2", "hf:org/set", "builtin"))
    record = {"name": str(corpus), "documents": 1, "tokens": 2}
    tokens = Tokens(torch.zeros(1, 2, dtype=torch.int64), "e" * 64, (record,))
    write_card(out, make(out, source, calib=calib, tokens=tokens), source)
    for name in (NAME, "README.md"):
        text = (out / name).read_text("utf-8")
        assert str(tmp_path) not in text and "private" not in text
        assert "sft.json=2" in text and "hf:org/set" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("builtin", "builtin"),
        ("/a/b/c.json=0.5", "c.json=0.5"),
        ("hf:org/name=3", "hf:org/name=3"),
        ("../x/", "x"),
    ],
)
def test_sources_are_named_by_their_last_part(given: str, shown: str) -> None:
    assert public_source(given) == shown


def test_same_run_gives_the_same_bytes(tmp_path: Path, source: Checkpoint) -> None:
    """Times differ between runs, so none may be in either file."""
    for name, seconds in (("a", 0.2), ("b", 7.7)):
        out = tmp_path / name
        layers = [
            LinearDone(x.block, x.name, x.loss, x.rel_error, x.damp, x.flags, seconds)
            for x in LAYERS
        ]
        write_card(out, make(out, source, layers=layers), source)
    for file in (NAME, "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def card_of(tmp_path: Path, source: Checkpoint, **changes: Any) -> str:
    out = tmp_path / "out"
    write_card(out, make(out, source, **changes), source)
    return (out / "README.md").read_text("utf-8")


def test_front_matter_is_what_hubs_read(tmp_path: Path, source: Checkpoint) -> None:
    (source.path / "LICENSE").write_text("Tongyi Qianwen LICENSE AGREEMENT\n\nBy clicking ...")
    text = card_of(tmp_path, source)
    assert text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "base_model": "Qwen-Tiny-Chat",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "tongyi-qianwen",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qwen", "gptq", "4-bit", "quantized", "qquant"],
    }


def test_card_names_each_linear_that_did_not_go_as_configured(
    tmp_path: Path, source: Checkpoint
) -> None:
    part = card_of(tmp_path, source).split("did not go as configured")[1].split("##")[0]
    assert "- `transformer.h.0.mlp.w1`: needed more damping (0.4 of the mean diagonal)" in part
    assert "- `transformer.h.1.mlp.w1`: fell back to rounding to nearest" in part
    assert "c_attn" not in part


def linear(name: str, *flags: str, error: float = 0.0004, block: int = 0) -> LinearDone:
    return LinearDone(block, name, 1.0, error, 0.05, flags, 0.1)


def test_many_linears_with_the_same_to_say_are_one_row() -> None:
    """A mixture has thousands of experts; what happened to three or fewer is told of each."""
    experts = [
        linear(f"model.layers.{b}.mlp.experts.{e}.up_proj", f"few-tokens:{e}", block=b)
        for b in range(2)
        for e in range(4)
    ]
    others = [linear(f"model.layers.{b}.mlp.experts.9.up_proj", block=b) for b in range(2)]
    alone = linear("model.layers.1.mlp.experts.8.up_proj", "no-tokens", error=0.01)
    last = linear("model.layers.1.mlp.experts.3.up_proj", "few-tokens:3", error=0.09)
    layers = [*experts[:-1], last, *others, alone]
    said = "an expert with 0 to 3 tokens of its own, helped out with others"
    assert flag_rows(layers) == [
        ("mlp.experts.*.up_proj", f"8 of 11: {said} (relative error at most 30.00%)"),
        (
            "model.layers.1.mlp.experts.8.up_proj",
            "an expert that no calibration token went to, solved without data "
            "(relative error 10.00%)",
        ),
    ]
    first = "model.layers.0.mlp.experts.*.up_proj"
    assert flag_rows(experts[:4]) == [
        (first, f"4 of 4: {said} (relative error at most 2.00%)"),
    ]
    assert [name for name, _ in flag_rows(experts[:3])] == [e.name for e in experts[:3]]
    assert flagged(layers) == [layer.name for layer in layers if layer.flags]
    text = closing_lines(target="out", size_bytes=1, seconds=1, peak_bytes=1, layers=layers)
    assert text[-3:-1] == [
        "9 not as configured:",
        f"  mlp.experts.*.up_proj: {flag_rows(layers)[0][1]}",
    ]


def test_dampings_that_differ_are_told_from_the_least_to_the_largest() -> None:
    found = 2 * [("dead-columns:7", "damp-raised"), ("damp-raised",)]
    layers = [
        LinearDone(i, f"h.{i}.mlp.w1", 1.0, 0.0, damp, flags, 0.1)
        for i, (damp, flags) in enumerate(zip((0.4, 1.6, 0.05, 12.8), found, strict=True))
    ]
    ((name, text),) = flag_rows(layers)
    assert name == "mlp.w1"
    assert (
        "4 of 4: needed more damping (0.05 to 12.8 of the mean diagonal) (relative error at most"
        in text
    )
    assert flag_rows([linear("h.0.mlp.w1", "dead-columns:7")]) == []


def test_card_sums_losses_by_kind(tmp_path: Path, source: Checkpoint) -> None:
    text = card_of(tmp_path, source)
    # Roots of the shares of squares: (√0.03 + √0.05) / 2 and √0.05, (√0.01 + √0.02) / 2 and √0.02.
    assert "| `mlp.w1` | 2 | 19.84% | 22.36% | `transformer.h.1.mlp.w1` |" in text
    assert "| `attn.c_attn` | 2 | 12.07% | 14.14% | `transformer.h.1.attn.c_attn` |" in text


def test_notes_on_the_calibration_data_are_kept(tmp_path: Path, source: Checkpoint) -> None:
    note = "a.json: 3 records held no text and were skipped."
    tokens = Tokens(torch.zeros(1, 2, dtype=torch.int64), "e" * 64, ({"name": "a.json"},), (note,))
    made = make(tmp_path / "out", source, tokens=tokens)
    assert made["calibration"]["notes"] == [note]
    assert f"- {note}" in card_of(tmp_path, source, tokens=tokens)


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        (QuantSpec(), "default"),
        (QuantSpec(bits=8), "default"),
        (spec_from_recipe("qwen", bits=3), "qwen"),
        (spec_from_recipe("fast"), "fast"),
        (spec_from_recipe("qwen", damp=0.02), None),
        (spec_from_recipe("qwen", group_size=64), None),
        (QuantSpec(method="rtn"), None),
    ],
)
def test_a_recipe_is_named_where_nothing_but_bits_was_changed(
    tmp_path: Path, source: Checkpoint, quant: QuantSpec, name: str | None
) -> None:
    assert make(tmp_path / "out", source, quant=quant)["recipe"] == name
    text = card_of(tmp_path, source, quant=quant)
    assert (f"| recipe | {name} |" in text) == (name is not None) == ("| recipe |" in text)


def test_card_of_rounding_claims_no_calibration(tmp_path: Path, source: Checkpoint) -> None:
    text = card_of(tmp_path, source, quant=QuantSpec(method="rtn", bits=3), calib=None, tokens=None)
    assert "None: the method reads no data." in text
    assert "round to nearest" in text
    assert "vllm serve" not in text  # 3 bits


def test_original_qwen_is_told_about_its_code(tmp_path: Path, source: Checkpoint) -> None:
    text = card_of(tmp_path, source)
    assert "vllm serve" not in text and "qquant convert --to qwen2" in text
    assert 'from_pretrained("Qwen-Tiny-Chat-Int4", device_map="auto", trust_remote_code=True)' in (
        text
    )
    assert "model.chat(" in text
    source.config["model_type"] = "qwen3"
    text = card_of(tmp_path, source)
    assert "trust_remote_code" not in text and "model.chat" not in text


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("LICENSE", "   Apache License\n   Version 2.0, January 2004", Licence("apache-2.0")),
        ("LICENSE.txt", "MIT License\n\nCopyright", Licence("mit")),
        (
            "LICENSE",
            "Tongyi Qianwen RESEARCH LICENSE AGREEMENT",
            Licence("other", "tongyi-qianwen-research", "LICENSE"),
        ),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: x-1\ntags:\n- a\n---\n# T",
            Licence("other", "x-1"),
        ),
        ("LICENSE", "All rights reserved.", Licence("other", None, "LICENSE")),
        ("NOTES", "", Licence("other")),
    ],
)
def test_licence_is_the_sources(tmp_path: Path, file: str, text: str, licence: Licence) -> None:
    (tmp_path / file).write_text(text)
    assert find_licence(tmp_path) == licence


def test_front_matter_needs_to_be_at_the_top() -> None:
    assert front_matter("---\nlicense: mit\n---\n") == {"license": "mit"}
    assert front_matter("# Title\n---\nlicense: mit\n---\n") == {}


def test_base_model_is_the_hub_id_where_the_path_tells_it() -> None:
    cache = Path("/c/hub/models--Qwen--Qwen-7B-Chat/snapshots/93a65d34")
    assert base_model(cache) == "Qwen/Qwen-7B-Chat"
    assert base_model(Path("/models/Qwen-7B-Chat")) == "Qwen-7B-Chat"


def test_odd_names_stay_yaml(tmp_path: Path, source: Checkpoint) -> None:
    made = make(tmp_path / "out", source)
    for name in ('a: "b" #c', "null", "7B", "通义"):
        text = render_card(made, title="t", base_model=name, licence=Licence(), weight_bytes=1)
        assert yaml.safe_load(text.split("---\n")[1])["base_model"] == name


@pytest.mark.parametrize(
    ("quant", "calib", "out"),
    [
        (QuantSpec(), CalibrationSpec(), OutputSpec()),
        (spec_from_recipe("qwen", bits=8), CalibrationSpec(seed=3), OutputSpec()),
        (
            spec_from_recipe("fast", sym=False, group_size=-1, damp=0.2, act_order=False),
            CalibrationSpec(sources=("my data.json=2", "self"), samples=3, seqlen=64),
            OutputSpec("bfloat16", 500_000_000),
        ),
        (QuantSpec(target_bpw=4.5, bit_choices=(4, 8)), CalibrationSpec(), OutputSpec()),
    ],
)
def test_reproduce_command_gives_the_same_specs(
    tmp_path: Path,
    source: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    quant: QuantSpec,
    calib: CalibrationSpec,
    out: OutputSpec,
) -> None:
    """The line printed on the card, parsed by the command line, asks for what was done."""
    seen: list[tuple[Any, ...]] = []

    def quantize(*args: Any, **_: Any) -> None:
        seen.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("qquant.convert.quantize", quantize)
    made = make(tmp_path / "out", source, quant=quant, calib=calib, out=out)
    words = shlex.split(reproduce_command(made))
    assert CliRunner().invoke(cli, words[1:]).exit_code == 130
    assert seen == [(Path("Qwen-Tiny-Chat"), Path("OUT"), quant, calib, out)]
