"""What `verify` finds in bitsandbytes directories, one damage at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bnb_tiny import make, stored
from safetensors.torch import save_file
from test_experts import tiny
from torch import Tensor

import qquant
from qquant import BnbSpec, inspect_directory, verify_directory
from qquant.bnb_convert import quantize_bnb
from qquant.bnb_layout import decode_state, encode_state, state_size
from qquant.errors import CheckpointError
from qquant.report import closing_lines, kind_of, losses_by_kind, relative_error

NAME = "model.layers.1.mlp.up_proj"
STATE = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
SPECS = {
    "nf4": BnbSpec("nf4"),
    "double": BnbSpec("nf4", double_quant=True),
    "int8": BnbSpec("int8"),
}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bnb")
    src = make("qwen2", root / "src", intermediate_size=96)  # rows that end within a block
    for name, spec in SPECS.items():
        quantize_bnb(src, root / name, spec, device="cpu")
    return {"src": src, **{name: root / name for name in SPECS}}


def copy(directory: Path, to: Path, change: Callable[[Tensors], None]) -> Path:
    """The directory with changed tensors and no manifest, whose hashes would tell at once."""
    to.mkdir()
    (to / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = stored(directory)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, to / "model.safetensors", META)
    return to


META = {"format": "pt"}


@pytest.mark.parametrize("kind", SPECS)
def test_a_good_directory(made: dict[str, Path], kind: str) -> None:
    report = verify_directory(made[kind], against=made["src"])
    assert report.ok and not report.warnings, report.render()
    assert len(report.layers) == 14
    for row in report.layers:
        assert row.bits == SPECS[kind].bits
        assert row.group_size == (-1 if kind == "int8" else 64)
        assert row.relative_error == pytest.approx(row.rounding_error, rel=0.1)
        assert 0 < row.relative_error < (0.02 if kind == "int8" else 0.12)
    assert "14 linears compared" in report.render()
    some = verify_directory(made[kind], against=made["src"], sample=3)
    assert sum(row.relative_error is not None for row in some.layers) == 3
    json.dumps(report.to_dict())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_closing_table_and_verify_tell_the_same_error(
    method: str, made: dict[str, Path], tmp_path: Path
) -> None:
    result = quantize_bnb(made["src"], tmp_path / "dst", BnbSpec(method), device="cpu")
    verified = {
        row.name: row.relative_error
        for row in verify_directory(tmp_path / "dst", against=made["src"]).layers
    }
    for layer in result.layers:
        assert relative_error(layer) == pytest.approx(verified[layer.name], rel=1e-4)
    for kind, count, mean, worst, _ in losses_by_kind(result.layers):
        found = [error for name, error in verified.items() if kind_of(name) == kind]
        assert count == len(found)
        assert (mean, worst) == pytest.approx((sum(found) / count, max(found)), rel=1e-4)
        row = f"{kind} {count} {mean:.2%} {worst:.2%}"
        lines = closing_lines(
            target="x", size_bytes=1, seconds=1, peak_bytes=1, layers=result.layers
        )
        assert row in [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text"])
def test_blocks_of_a_hybrid_differ_in_their_attention(kind: str, tmp_path: Path) -> None:
    """As transformers saves them, and without the one or the other."""
    tiny(kind, num_hidden_layers=4).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    model = qquant.load(tmp_path / "src", method="nf4", device="cpu").model
    path = qquant.save(model, tmp_path / "dst")
    report = verify_directory(path)
    assert report.ok, report.render()
    for part in ("linear_attn.out_proj", "self_attn.o_proj"):

        def strip(tensors: Tensors, part: str = part) -> None:
            for name in [n for n in tensors if part in n]:
                del tensors[name]

        spoilt = copy(path, tmp_path / part, strip)
        assert not verify_directory(spoilt).ok


def nan(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{NAME}.{part}"][-1] = float("nan")

    return change


def drop(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"{NAME}.{part}") and None


def put(part: str, make_it: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{NAME}.{part}"] = make_it(tensors[f"{NAME}.{part}"])

    return change


def unquantize(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith(f"{NAME}.")]:
        del tensors[name]
    tensors[f"{NAME}.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)


def text(value: str) -> Callable[[Tensors], None]:
    return put(
        "weight.quant_state.bitsandbytes__nf4",
        lambda _: torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8),
    )


SHAPE = (96, 64)
DAMAGES = {
    "nan-absmax": ("nf4", nan("weight.absmax"), "finite"),
    "nan-scb": ("int8", nan("SCB"), "finite"),
    "nan-nested": ("double", nan("weight.nested_absmax"), "finite"),
    "nan-map": ("double", nan("weight.nested_quant_map"), "finite"),
    "negative": ("nf4", put("weight.absmax", torch.neg), "negative"),
    "transposed-bf16": (
        "nf4",
        put("weight.absmax", lambda t: t.view(96, 1).T.to(torch.bfloat16)),
        "AVX512-BF16",
    ),
    "half-absmax": ("nf4", put("weight.absmax", lambda t: t.half()), "F32 [96]"),
    "short-absmax": ("nf4", put("weight.absmax", lambda t: t[:-1]), "F32 [96]"),
    "table": ("nf4", put("weight.quant_map", lambda t: t.flip(0)), "16 values of nf4"),
    "no-absmax": ("nf4", drop("weight.absmax"), "no weight.absmax"),
    "no-state": ("nf4", drop("weight.quant_state.bitsandbytes__nf4"), "no weight.quant_state"),
    "no-scb": ("int8", drop("SCB"), "no SCB"),
    "format": ("int8", put("weight_format", lambda t: t + 2), "weight_format"),
    "int8-dtype": ("int8", put("weight", lambda t: t.to(torch.uint8)), "I8 [96, 64]"),
    "flat-weight": ("nf4", put("weight", lambda t: t.view(-1)), "U8 [3072, 1]"),
    "not-json": ("nf4", text("{"), "JSON"),
    "no-shape": ("nf4", text('{"quant_type": "nf4"}'), "shape"),
    "other-type": ("nf4", text(encode_state("fp4", "bfloat16", SHAPE).decode()), "quant_type"),
    "wrong-shape": ("nf4", text(encode_state("nf4", "bfloat16", (96, 32)).decode()), "U8 [1536"),
    "nested-only-in-state": (
        "nf4",
        text(encode_state("nf4", "bfloat16", SHAPE, 0.5).decode()),
        "nested_offset",
    ),
    "not-quantized": ("nf4", unquantize, "mlp.up_proj"),
    "norm": ("nf4", lambda t: t["model.norm.weight"].__setitem__(0, float("inf")), "model.norm"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_without_the_source(
    made: dict[str, Path], damage: str, tmp_path: Path
) -> None:
    kind, change, words = DAMAGES[damage]
    path = copy(made[kind], tmp_path / "bad", change)
    report = verify_directory(path)
    assert not report.ok
    assert words in " ".join(map(str, report.problems)), report.render()
    assert verify_directory(copy(made[kind], tmp_path / "same", lambda _: None)).ok


COMPARED = {
    "transposed": ("nf4", put("weight.absmax", lambda t: t.flip(0))),
    "codes": ("nf4", put("weight", lambda t: t.roll(1))),
    "scaled": ("nf4", put("weight.absmax", lambda t: t * 1.2)),
    "nested": ("double", put("weight.absmax", lambda t: t.flip(0))),
    "rows": ("int8", put("SCB", lambda t: t.flip(0))),
    "int8-codes": ("int8", put("weight", lambda t: t.roll(1))),
}


@pytest.mark.parametrize("damage", COMPARED)
def test_damage_behind_an_intact_shape_is_found_against_the_source(
    made: dict[str, Path], damage: str, tmp_path: Path
) -> None:
    kind, change = COMPARED[damage]
    path = copy(made[kind], tmp_path / "bad", change)
    assert verify_directory(path).ok
    report = verify_directory(path, against=made["src"])
    (problem,) = report.problems
    assert NAME in str(problem) and "dequantized error" in str(problem)


def test_what_was_not_quantized_must_be_the_sources(made: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"] += 1
        tensors["model.layers.0.self_attn.q_proj.bias"] += 1

    path = copy(made["nf4"], tmp_path / "bad", change)
    names = [p.key for p in verify_directory(path, against=made["src"]).problems]
    assert sorted(names) == ["model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]


def test_config_and_files_must_agree(made: dict[str, Path], tmp_path: Path) -> None:
    path = copy(made["nf4"], tmp_path / "one", lambda _: None)
    (path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert "quantize_config.json" in str(verify_directory(path).problems)
    (path / "quantize_config.json").unlink()
    good = json.loads((path / "config.json").read_text())
    for key, value, words in (
        ("bnb_4bit_use_double_quant", True, "no weight.nested_absmax"),
        ("bnb_4bit_quant_type", "fp4", "bitsandbytes__fp4"),
        ("bnb_4bit_quant_type", "fp5", "nf4 or fp4"),
        ("bnb_4bit_quant_storage", "bfloat16", "BF16 [1536, 1]"),
        ("bnb_4bit_quant_storage", "x", "bnb_4bit_quant_storage"),
        ("bnb_4bit_compute_dtype", "int8", "bnb_4bit_compute_dtype"),
        ("load_in_8bit", True, "load_in_4bit"),
        ("llm_int8_skip_modules", "lm_head", "a list of names"),
        ("llm_int8_threshold", "6", "a number"),
    ):
        quant = {**good["quantization_config"], key: value}
        (path / "config.json").write_text(json.dumps({**good, "quantization_config": quant}))
        assert words in " ".join(map(str, verify_directory(path).problems)), key


def test_a_changed_file_is_told_by_its_hash(made: dict[str, Path], tmp_path: Path) -> None:
    path = copy(made["nf4"], tmp_path / "one", nan("weight.absmax"))
    name = "qquant_manifest.json"
    (path / name).write_bytes((made["nf4"] / name).read_bytes())
    assert any("SHA-256" in p.key for p in verify_directory(path).problems)


@pytest.mark.parametrize("kind", SPECS)
def test_inspect_counts_the_float_models_parameters(made: dict[str, Path], kind: str) -> None:
    report = inspect_directory(made[kind])
    assert report.parameters == inspect_directory(made["src"]).parameters
    assert "bitsandbytes" in report.summary
    assert report.kinds["codes"] == sum(
        t.nbytes
        for n, t in stored(made[kind]).items()
        if n.endswith(".weight") and t.dtype in (torch.uint8, torch.int8)
    )
    low, high = {"nf4": (4.5, 4.9), "double": (4.1, 7), "int8": (8, 9)}[kind]
    assert low < (report.bits_per_weight_blocks or 0) < high


@pytest.mark.parametrize("offset", [None, 0.0, -1.1754943508222875e-38, 3.4028234663852886e38])
def test_the_state_text_has_its_size_whatever_the_offset(offset: float | None) -> None:
    raw = encode_state("fp4", "float32", (7, 300), offset)
    assert len(raw) == state_size("fp4", "float32", (7, 300), nested=offset is not None)
    found = decode_state("x", raw)
    assert found["shape"] == [7, 300] and found.get("nested_offset") == offset
    with pytest.raises(CheckpointError, match="quant_state"):
        decode_state("x", b"[]")
    for key, size in (("blocksize", 64), ("nested_blocksize", 256)):
        if key in found:
            wrong = json.dumps(found | {key: float(size)}).encode()
            with pytest.raises(CheckpointError, match=rf"expected {key} .* got {size}\.0"):
                decode_state("x", wrong)
