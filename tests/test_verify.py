"""`verify` finds each fault that is put into a good directory, and finds none in a good one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qquant.checkpoint import Checkpoint
from qquant.directory import CONFIG, INDEX, WEIGHTS
from qquant.errors import CheckpointError
from qquant.headers import TensorPlan, dtype_name
from qquant.layout import Layout
from qquant.pack import ZERO_OFFSETS, pack, symmetric_zero
from qquant.shards import ShardWriter
from qquant.verify import VerifyReport, inspect, verify

HIDDEN, FFN, VOCAB, LAYERS, KV = 64, 96, 40, 2, 32
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
FIRST = "model.layers.0.self_attn.q_proj"


def float_tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn((VOCAB, HIDDEN), generator=g)}
    for i in range(LAYERS):
        for name, shape in LINEARS.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(shape, generator=g) / 8
        for name in "qkv":
            linear = f"self_attn.{name}_proj"
            bias = torch.randn(LINEARS[linear][:1], generator=g)
            tensors[f"model.layers.{i}.{linear}.bias"] = bias
        for name in NORMS:
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn((HIDDEN,), generator=g)
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    tensors["lm_head.weight"] = torch.randn((VOCAB, HIDDEN), generator=g)
    return {name: t.bfloat16() for name, t in tensors.items()}


def write_dir(root: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    save_file(tensors, root / WEIGHTS, {"format": "pt"})
    base = {
        "model_type": "qwen2",
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (root / CONFIG).write_text(json.dumps(base | config))
    return root


def round_linear(weight: Tensor, bits: int, group: int, sym: bool) -> tuple[Tensor, ...]:
    """Codes, scales and zeros [N, ...] of rounding to nearest."""
    n, k = weight.shape
    size = k if group == -1 else group
    w = weight.float().view(n, k // size, size)
    if sym:
        scale = (w.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)).half().float()
        zero = torch.full_like(scale, symmetric_zero(bits))
    else:
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 2)).half().float()
        zero = (-low / scale).round().clamp(1, 2**bits - 1)
    codes = (w / scale + zero).round().clamp(0, 2**bits - 1).to(torch.uint8).view(n, k)
    return codes, scale[..., 0], zero[..., 0].to(torch.uint8)


def quantized(
    root: Path,
    *,
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    written: str = "gptq",
    claimed: str | None = "gptq",
    desc_act: bool = False,
    all_biases: bool = False,
) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, tensor in float_tensors().items():
        module = name.removesuffix(".weight")
        if not any(module.endswith(linear) for linear in LINEARS):
            tensors[name] = tensor.half()
            continue
        codes, scales, zeros = round_linear(tensor, bits, group, sym)
        packed = pack(
            codes, scales, zeros, bits=bits, group_size=group, zero_offset=ZERO_OFFSETS[written]
        )
        if desc_act:  # any order: columns are visited as `order` says, and codes follow
            k = codes.shape[1]
            order = torch.randperm(k, generator=torch.Generator().manual_seed(1))
            ordered = round_linear(tensor[:, order], bits, group, sym)
            back = order.argsort()
            packed = pack(
                ordered[0][:, back],
                ordered[1],
                ordered[2],
                bits=bits,
                group_size=group,
                zero_offset=ZERO_OFFSETS[written],
                g_idx=packed.g_idx[back],
            )
        tensors |= {f"{module}.{kind}": t for kind, t in packed._asdict().items()}
        if all_biases:
            tensors.setdefault(f"{module}.bias", torch.zeros(codes.shape[0]).half())
    config: dict[str, Any] = {
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": desc_act,
        "quant_method": "gptq",
    }
    if claimed:
        config["checkpoint_format"] = claimed
    write_dir(root, tensors, {"quantization_config": config})
    (root / "quantize_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dir(tmp_path_factory.mktemp("source"), float_tensors(), {})


def change(root: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(root / WEIGHTS)
    edit(tensors)
    save_file(tensors, root / WEIGHTS, {"format": "pt"})


def configure(root: Path, both: bool = True, **changes: object) -> None:
    config = json.loads((root / CONFIG).read_text())
    config["quantization_config"].update(changes)
    (root / CONFIG).write_text(json.dumps(config))
    if both:
        (root / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))


def found(report: VerifyReport, *words: str) -> bool:
    """Whether one problem holds all of the words; also that the report holds together."""
    assert not report.ok and "NOT OK" in report.render()
    json.dumps(report.to_dict(), allow_nan=False)
    return any(all(word in str(problem) for word in words) for problem in report.problems)


GOOD = [
    {},
    {"all_biases": True},
    {"group": -1},
    {"bits": 8},
    {"bits": 3},
    {"bits": 2},
    {"written": "gptq_v2", "claimed": "gptq_v2"},
    {"bits": 8, "written": "gptq_v2", "claimed": "gptq_v2"},
    {"claimed": None},
    {"sym": False},
    {"sym": False, "written": "gptq_v2", "claimed": "gptq_v2"},
    {"sym": False, "bits": 3},
    {"desc_act": True},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_good_directories_are_ok(tmp_path: Path, source: Path, options: dict[str, Any]):
    report = verify(quantized(tmp_path / "q", **options), against=source)
    assert report.ok, report.render()
    assert not report.warnings, report.render()
    assert len(report.layers) == LAYERS * len(LINEARS)
    for row in report.layers:
        assert row.relative_error is not None and row.rounding_error is not None
        assert (row.outputs, row.inputs) == LINEARS[row.name.split(".", 3)[3]]
        if options.get("sym", True) and not options.get("desc_act"):
            assert row.relative_error == pytest.approx(row.rounding_error, rel=0.05)
    assert "ok" in report.render() and "largest" in report.render()
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_errors_are_those_of_the_weights(tmp_path: Path, source: Path):
    report = verify(quantized(tmp_path / "q"), against=source)
    weight = float_tensors()[f"{FIRST}.weight"].float()
    codes, scales, zeros = round_linear(weight, 4, 32, True)
    rounded = (codes.view(64, 2, 32).float() - zeros[..., None]) * scales[..., None]
    expected = float((rounded.view(64, 64) - weight).norm() / weight.norm())
    row = next(r for r in report.layers if r.name == FIRST)
    assert row.relative_error == pytest.approx(expected, rel=1e-5)
    assert row.zeros == "0x77777777"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("written", "claimed"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_zero_points_of_the_other_format_are_named(
    tmp_path: Path, source: Path, bits: int, written: str, claimed: str
):
    root = quantized(tmp_path / "q", bits=bits, written=written, claimed=claimed)
    report = verify(root)
    assert len(report.problems) == 1
    named = "zero points of model.layers.0.mlp.down_proj"
    assert found(report, named, f"got as {written} stores them", "Readers do not notice")
    assert found(verify(root, against=source), "dequantized error", "zero points are off by one")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_asymmetric_zero_points_of_the_other_format(tmp_path: Path, source: Path, bits: int):
    """No word tells here; the weights do."""
    root = quantized(tmp_path / "q", bits=bits, sym=False, written="gptq_v2", claimed="gptq")
    report = verify(root, against=source)
    assert found(report, "dequantized error", "zero points are off by one")


def test_asymmetric_files_called_symmetric(tmp_path: Path):
    root = quantized(tmp_path / "q", sym=False)
    configure(root, sym=True)
    assert found(verify(root), f"zero points of {FIRST}", "asymmetric, or damaged")


def test_wrapped_zero_points_are_a_warning(tmp_path: Path):
    root = quantized(tmp_path / "q", sym=False)
    change(root, lambda t: t[f"{FIRST}.qzeros"].fill_(-1))
    report = verify(root)
    assert report.ok and "128 of 128 wrapped round from 0" in report.render()


DAMAGE: list[tuple[str, Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = [
    ("no g_idx", lambda t: t.pop(f"{FIRST}.g_idx"), (FIRST, "no g_idx")),
    ("no scales", lambda t: t.pop(f"{FIRST}.scales"), (FIRST, "no scales")),
    (
        "only a bias",
        lambda t: [t.pop(f"{FIRST}.{k}") for k in ("qweight", "qzeros", "scales", "g_idx")],
        ("model.layers.0", "self_attn.q_proj", "the linears of the other blocks"),
    ),
    (
        "no block",
        lambda t: [t.pop(n) for n in list(t) if ".1." in n],
        ("blocks model.layers", "0 to 1"),
    ),
    (
        "weight beside",
        lambda t: t.update({f"{FIRST}.weight": torch.zeros(64, 64).half()}),
        (FIRST, "a plain weight beside"),
    ),
    (
        "short scales",
        lambda t: t.update({f"{FIRST}.scales": torch.ones(1, 64).half()}),
        (f"shape of {FIRST}.scales", "[2, 64]", "got [1, 64]"),
    ),
    (
        "long qzeros",
        lambda t: t.update({f"{FIRST}.qzeros": torch.zeros(2, 16).int()}),
        (f"shape of {FIRST}.qzeros", "[2, 8]"),
    ),
    (
        "int64 g_idx",
        lambda t: t.update({f"{FIRST}.g_idx": t[f"{FIRST}.g_idx"].long()}),
        (f"dtype of {FIRST}.g_idx", "I32", "I64"),
    ),
    (
        "int scales",
        lambda t: t.update({f"{FIRST}.scales": torch.ones(2, 64).int()}),
        (f"dtype of {FIRST}.scales",),
    ),
    (
        "short bias",
        lambda t: t.update({f"{FIRST}.bias": torch.ones(3).half()}),
        (f"shape of {FIRST}.bias", "[64]", "[3]"),
    ),
    (
        "flat qweight",
        lambda t: t.update({f"{FIRST}.qweight": t[f"{FIRST}.qweight"].flatten()}),
        (FIRST, "qweight a matrix"),
    ),
    (
        "NaN scale",
        lambda t: t[f"{FIRST}.scales"][1, 3].fill_(float("nan")),
        (f"{FIRST}.scales", "finite", "1 of 128"),
    ),
    (
        "infinite norm",
        lambda t: t["model.norm.weight"][0].fill_(float("inf")),
        ("model.norm.weight", "finite"),
    ),
    ("NaN bias", lambda t: t[f"{FIRST}.bias"][0].fill_(float("nan")), (f"{FIRST}.bias", "finite")),
    (
        "odd zero",
        lambda t: t[f"{FIRST}.qzeros"][0, 0].fill_(0x77777776),
        (f"zero points of {FIRST}", "all stored as 7", "6 to 7"),
    ),
    (
        "unordered g_idx",
        lambda t: t.update({f"{FIRST}.g_idx": t[f"{FIRST}.g_idx"].flip(0)}),
        (f"{FIRST}.g_idx", "desc_act is false"),
    ),
    (
        "g_idx too large",
        lambda t: t[f"{FIRST}.g_idx"][5].fill_(2),
        (f"{FIRST}.g_idx", "groups 0 to 1", "got 0 to 2"),
    ),
    ("g_idx negative", lambda t: t[f"{FIRST}.g_idx"][5].fill_(-1), (f"{FIRST}.g_idx", "-1 to 1")),
    ("no head", lambda t: t.pop("lm_head.weight"), ("every tensor", "not lm_head.weight")),
    ("no norm", lambda t: t.pop("model.norm.weight"), ("every tensor", "not model.norm.weight")),
    (
        "no embedding",
        lambda t: t.pop("model.embed_tokens.weight"),
        ("tensors", "not model.embed_tokens.weight", "The directory is incomplete"),
    ),
    (
        "no norm in a block",
        lambda t: t.pop("model.layers.1.post_attention_layernorm.weight"),
        ("tensors", "not model.layers.1.post_attention_layernorm.weight"),
    ),
    (
        "no bias",
        lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
        ("tensors", "not model.layers.1.self_attn.k_proj.bias"),
    ),
    (
        "a kind of linear in no block",
        lambda t: [t.pop(n) for n in list(t) if "mlp.down_proj" in n],
        ("tensors", "not model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight"),
    ),
    (
        "a kind of linear of another model",
        lambda t: t.update(
            {n: t[n.replace("o_proj", "k_proj")].clone() for n in t if "o_proj" in n}
        ),
        (
            "shape of model.layers.0.self_attn.o_proj.weight, and 1 more",
            "expected [64, 64], by config.json",
            "got [32, 64]",
        ),
    ),
    (
        "a short norm",
        lambda t: t.update({"model.norm.weight": torch.ones(3).half()}),
        ("shape of model.norm.weight", "[64], by config.json", "[3]"),
    ),
    (
        "not quantized at all",
        lambda t: [
            t.pop(n) for n in list(t) if n.endswith(("qweight", "qzeros", "scales", "g_idx"))
        ],
        ("quantized linears",),
    ),
]


@pytest.mark.parametrize(("edit", "words"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_found_without_the_source(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], words: tuple[str, ...]
):
    root = quantized(tmp_path / "q")
    change(root, edit)
    report = verify(root)
    assert found(report, *words), report.render()


def test_a_group_with_more_than_its_share(tmp_path: Path):
    root = quantized(tmp_path / "q", desc_act=True)
    change(root, lambda t: t[f"{FIRST}.g_idx"].copy_(torch.tensor([0] * 40 + [1] * 24)))
    assert found(verify(root), f"{FIRST}.g_idx", "its share of inputs")


AGAINST: list[tuple[str, Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = [
    (
        "other embedding",
        lambda t: t["model.embed_tokens.weight"][39, 63].add_(1),
        ("model.embed_tokens.weight", "other values"),
    ),
    ("other bias", lambda t: t[f"{FIRST}.bias"][0].add_(1), (f"{FIRST}.bias", "other values")),
    (
        "invented bias",
        lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(FFN).half()}),
        ("model.layers.0.mlp.up_proj.bias", "zeros, since the source has no bias"),
    ),
    (
        "foreign tensor",
        lambda t: t.update({"extra.weight": torch.ones(3)}),
        ("extra.weight", "a tensor of the source"),
    ),
    (
        "scrambled codes",
        lambda t: t[f"{FIRST}.qweight"].copy_(t[f"{FIRST}.qweight"].flip(1)),
        (f"dequantized error of {FIRST}", "damaged, or of another checkpoint"),
    ),
    (
        "swapped words",
        lambda t: t[f"{FIRST}.qweight"].copy_(t[f"{FIRST}.qweight"].roll(1, 0)),
        (f"dequantized error of {FIRST}", "damaged, or of another checkpoint"),
    ),
]


@pytest.mark.parametrize(("edit", "words"), [d[1:] for d in AGAINST], ids=[d[0] for d in AGAINST])
def test_damage_that_only_the_source_shows(
    tmp_path: Path,
    source: Path,
    edit: Callable[[dict[str, Tensor]], object],
    words: tuple[str, ...],
):
    root = quantized(tmp_path / "q")
    change(root, edit)
    assert verify(root).ok
    assert found(verify(root, against=source), *words)


def test_the_source_shows_what_is_missing_too(tmp_path: Path, source: Path):
    root, norm = quantized(tmp_path / "q"), "model.layers.1.input_layernorm.weight"
    change(root, lambda t: [t.pop(norm), t.update({"model.norm.weight": torch.ones(3).half()})])
    report = verify(root, against=source)
    assert found(report, "tensors of the source", norm)
    assert found(report, "shape of model.norm.weight", "[64], as the source", "[3]")


def test_a_source_that_does_not_fit(tmp_path: Path, source: Path):
    root = quantized(tmp_path / "q")
    other = shutil.copytree(source, tmp_path / "other")
    change(other, lambda t: t.update({f"{FIRST}.weight": torch.ones(32, 64).bfloat16()}))
    assert found(verify(root, against=other), f"{FIRST}.weight of the source", "got [32, 64]")
    change(other, lambda t: t.pop(f"{FIRST}.weight"))
    assert found(verify(root, against=other), f"{FIRST}.weight of the source", "got none")
    with pytest.raises(CheckpointError):
        verify(root, against=tmp_path / "missing")


def test_tied_heads(tmp_path: Path, source: Path):
    """A tied model may store the head or not, on either side; stored, it must be the embedding."""

    def without_head(root: Path) -> Path:
        change(root, lambda t: t.pop("lm_head.weight"))
        return root

    def tie(root: Path) -> Path:
        config = json.loads((root / CONFIG).read_text()) | {"tie_word_embeddings": True}
        (root / CONFIG).write_text(json.dumps(config))
        return root

    bare = without_head(shutil.copytree(source, tmp_path / "bare"))
    assert verify(without_head(tie(quantized(tmp_path / "a"))), against=source).ok
    assert verify(without_head(tie(quantized(tmp_path / "b"))), against=bare).ok
    stored = tie(quantized(tmp_path / "c"))
    assert found(verify(stored, against=bare), "lm_head.weight", "other values")
    change(stored, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert verify(stored, against=bare).ok


def test_sampling_compares_as_many_as_it_says(tmp_path: Path, source: Path):
    root = quantized(tmp_path / "q")
    for sample, expected in ((1, 1), (2, 2), (4, 4), (5, 5), (13, 13), (14, 14), (100, 14)):
        report = verify(root, against=source, sample=sample)
        assert sum(r.relative_error is not None for r in report.layers) == expected
        assert report.ok and len(report.layers) == 14


def test_slices_do_not_change_the_result(tmp_path: Path, source: Path, monkeypatch):
    root = quantized(tmp_path / "q", bits=3)
    whole = verify(root, against=source)
    monkeypatch.setattr("qquant.compare._SLICE", 1000)
    parts = verify(root, against=source)
    assert parts.ok
    for one, two in zip(whole.layers, parts.layers, strict=True):
        assert one.relative_error == pytest.approx(two.relative_error, rel=1e-5)


def test_configs(tmp_path: Path):
    root = quantized(tmp_path / "q")
    configure(root, both=False, bits=8)
    assert found(verify(root), "quantize_config.json: bits", "expected 8", "got 4")
    assert found(verify(root), "shape of", "bits or group_size in the config")
    configure(root, both=False, bits=4, damp_percent=0.01)
    report = verify(root)
    assert report.ok and "damp_percent" in report.render()
    configure(root, group_size=64)
    assert found(verify(root), f"shape of {FIRST}.scales", "groups of 64")
    configure(root, group_size=32)
    for changes, words in [
        ({"bits": 5}, ("bits", "(2, 3, 4, 8)", "5")),
        ({"bits": "4"}, ("bits", "'4'")),
        ({"group_size": 0}, ("group_size",)),
        ({"group_size": None}, ("group_size", "None")),
        ({"quant_method": "awq"}, ("quant_method", "awq")),
        ({"checkpoint_format": "marlin"}, ("checkpoint_format", "marlin")),
        ({"checkpoint_format": ["gptq"]}, ("checkpoint_format",)),
        ({"format": "gptq_v2"}, ("checkpoint_format", "gptq_v2")),
        ({"sym": "yes"}, ("sym",)),
        ({"dynamic": [1]}, ("dynamic",)),
        ({"dynamic": {"(": {}}}, ("dynamic", "regular")),
        ({"dynamic": {"a": {"bits": 7}}}, ("bits", "7")),
    ]:
        root = quantized(tmp_path / str(changes))
        configure(root, **changes)
        assert found(verify(root), *words), changes
    (root / "quantize_config.json").unlink()
    (root / CONFIG).write_text("{}")
    assert found(verify(root), "quantization_config", "nothing to verify")
    (root / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    assert found(verify(root), "transformers reads config.json only")
    (root / "quantize_config.json").write_text("[")
    assert found(verify(root), "quantize_config.json", "expected JSON")
    assert not verify(quantized(tmp_path / "fresh")).problems


def test_dynamic_exceptions(tmp_path: Path, source: Path):
    """GPTQModel's: one kind of linear left in 16 bits, and said to be."""
    root = quantized(tmp_path / "q")
    weights = float_tensors()

    def plain(t: dict[str, Tensor]) -> None:
        for i in range(LAYERS):
            name = f"model.layers.{i}.mlp.down_proj"
            for kind in ("qweight", "qzeros", "scales", "g_idx"):
                t.pop(f"{name}.{kind}")
            t[f"{name}.weight"] = weights[f"{name}.weight"].half()

    change(root, plain)
    report = verify(root, against=source)
    assert report.ok and "matrices of blocks" in report.render()
    configure(root, dynamic={"-:.*down_proj": {}})
    report = verify(root, against=source)
    assert report.ok and not report.warnings
    configure(root, dynamic={"-:.*q_proj": {}, "+:.*up_proj": {"bits": 8}})
    report = verify(root)
    assert found(report, FIRST, "unquantized, as `dynamic` says")
    assert found(report, "shape of model.layers.0.mlp.up_proj.qweight", "8 bits")
    layout = Layout.parse({"bits": 4, "group_size": 32, "dynamic": {"+:a": {"group_size": -1}}})
    own, other = layout.of("a.b"), layout.of("b.a")
    assert own and other and (own.group_size, own.bits, other.group_size) == (-1, 4, 32)


def test_manifest_hashes(tmp_path: Path):
    root = quantized(tmp_path / "q")
    files = {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name in (WEIGHTS, CONFIG, "quantize_config.json")
    }
    manifest = root / "qquant_manifest.json"
    manifest.write_text(json.dumps({"files": files}))
    assert verify(root).ok
    change(root, lambda t: t[f"{FIRST}.qweight"][0, 0].add_(1))
    assert found(verify(root), f"{WEIGHTS}: SHA-256", "changed or damaged")
    manifest.write_text(json.dumps({"files": {"gone": "0", "../q/config.json": "0"}}))
    report = verify(root)
    assert found(report, "gone", "nothing there") and found(report, "../q", "who made it")
    for text, word in (("{}", "files"), ("[", "expected JSON")):
        manifest.write_text(text)
        assert found(verify(root), "qquant_manifest.json", word)


def test_sums_of_others_may_leave_files_out(tmp_path: Path):
    root = quantized(tmp_path / "q")
    digest = hashlib.sha256((root / WEIGHTS).read_bytes()).hexdigest()
    (root / "SHA256SUMS").write_text(f"{digest}  {WEIGHTS}\n")
    report = verify(root)
    assert report.ok and "SHA256SUMS: files: expected a hash of config.json" in report.render()
    files = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in (CONFIG,)}
    (root / "qquant_manifest.json").write_text(json.dumps({"files": files}))
    assert found(verify(root), "SHA256SUMS: files", "a hash of config.json")


def test_one_linear_with_the_other_formats_zeros(tmp_path: Path):
    """The cure for all of them would spoil the others."""
    root = quantized(tmp_path / "q")
    change(root, lambda t: t[f"{FIRST}.qzeros"].fill_(-0x77777778))
    report = verify(root)
    assert found(report, f"zero points of {FIRST}", "as gptq_v2 stores them: 0x88888888", "Convert")
    assert "Set checkpoint_format" not in report.render()


def rename(root: Path, new: Callable[[str], str]) -> None:
    tensors = load_file(root / WEIGHTS)
    save_file({new(name): t for name, t in tensors.items()}, root / WEIGHTS, {"format": "pt"})


def set_config(root: Path, **changes: object) -> None:
    config = json.loads((root / CONFIG).read_text())
    (root / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("base", ["", "model.language_model."])
def test_the_model_may_stand_under_another_name(tmp_path: Path, base: str):
    """Of a bare `AutoModel`, and of a text model saved with the prefix that it had."""
    root = quantized(tmp_path / "q")
    rename(root, lambda name: name.replace("model.", base, 1))
    set_config(root, architectures=["Qwen2Model"])
    change(root, lambda t: t.pop("lm_head.weight"))
    assert verify(root).ok, verify(root).render()
    change(root, lambda t: t.pop(f"{base}layers.1.input_layernorm.weight"))
    assert found(verify(root), f"not {base}layers.1.input_layernorm.weight")
    set_config(root, architectures=["Qwen2ForCausalLM"])
    assert found(verify(root), "not lm_head.weight")


def test_blocks_of_other_parts_are_not_the_text_models(tmp_path: Path):
    """A vision tower's, and one that predicts a token further ahead."""
    root = quantized(tmp_path / "q")
    more = {f"visual.blocks.{i}.attn.qkv.weight": torch.ones(2, 2).half() for i in range(5)}
    more["mtp.layers.0.self_attn.q_proj.weight"] = torch.ones(2, 2).half()
    change(root, lambda t: t.update(more))
    report = verify(root)
    assert report.ok, report.render()
    assert inspect(root).layers == LAYERS
    change(root, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.1.")])
    assert found(verify(root), "blocks model.layers", "0 to 1", "1 blocks")


def test_a_stray_tensor_stands_for_no_weight(tmp_path: Path):
    root, name = quantized(tmp_path / "q"), "model.layers.0.mlp.down_proj"

    def strip(tensors: dict[str, Tensor]) -> None:
        for block in range(LAYERS):
            linear = name.replace(".0.", f".{block}.")
            for kind in ("qweight", "qzeros", "scales", "g_idx"):
                tensors.pop(f"{linear}.{kind}")
            tensors[f"{linear}.input_scale"] = torch.ones(1)

    change(root, strip)
    assert found(verify(root), "every tensor", f"not {name}.weight")


def test_plain_tensors_are_floats(tmp_path: Path):
    root = quantized(tmp_path / "q")
    change(root, lambda t: t.update({"model.norm.weight": torch.ones(HIDDEN).long()}))
    assert found(verify(root), "dtype of model.norm.weight", "F16, BF16 or F32", "I64")


def shard(root: Path, size: int = 8000) -> list[str]:
    """Splits a directory's single file into shards."""
    tensors = load_file(root / WEIGHTS)
    (root / WEIGHTS).unlink()
    plan = [TensorPlan(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
    with ShardWriter(root, plan, size) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return [f for f in writer.files if f != INDEX]


def test_shards_and_index(tmp_path: Path, source: Path):
    root = quantized(tmp_path / "q")
    files = shard(root)
    assert len(files) > 2 and verify(root, against=source).ok
    good = json.loads((root / INDEX).read_text())

    def index(**changes: object) -> None:
        (root / INDEX).write_text(json.dumps(good | changes))

    index(metadata={"total_size": 1})
    assert found(verify(root), "total_size", "got 1")
    files_size = sum((root / file).stat().st_size for file in files)
    index(metadata={"total_size": files_size})  # as gptqmodel counts
    assert verify(root).ok
    index(metadata=None)
    report = verify(root)
    assert report.ok and "total_size" in report.render()
    index(weight_map={k: v for k, v in good["weight_map"].items() if k != "model.norm.weight"})
    assert found(verify(root), "weight_map", "not model.norm.weight")
    index(weight_map=good["weight_map"] | {"ghost": files[0]})
    assert found(verify(root), "tensor ghost")
    index()
    data = (root / files[1]).read_bytes()
    (root / files[1]).write_bytes(data[:-1])
    report = verify(root, against=source)
    assert found(report, files[1], "truncated") and len(report.problems) == 1
    assert "looked no further" in report.render()
    save_file({"a": torch.ones(1)}, root / files[1])
    assert found(verify(root), files[1], "format: pt")
    (root / files[1]).unlink()
    assert found(verify(root), files[1], "nothing there")
    (root / INDEX).write_text("{")
    with pytest.raises(CheckpointError):
        verify(root)


def test_a_source_of_zeros(tmp_path: Path, source: Path):
    root = quantized(tmp_path / "q")
    zeros = shutil.copytree(source, tmp_path / "zeros")
    change(zeros, lambda t: t[f"{FIRST}.weight"].zero_())
    report = verify(root, against=zeros)
    assert found(report, f"dequantized error of {FIRST}", "got inf")
    assert report.to_dict()["layers"][0]["relative_error"] is not None
    row = next(r for r in report.to_dict()["layers"] if r["name"] == FIRST)
    assert row["relative_error"] is None


FLOATS = st.floats(allow_nan=False, allow_infinity=False)  # JSON has no others
VALUES = st.none() | st.booleans() | st.integers(-2, 9) | FLOATS | st.text(max_size=5)
ANY = VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(st.text(max_size=4), VALUES)
KEYS = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "format",
    "quant_method",
    "dynamic",
    "meta",
)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("victim"))


@given(
    changes=st.dictionaries(st.sampled_from(KEYS), ANY, max_size=3),
    layers=st.integers(-1, 10**12) | ANY,
    manifest=ANY,
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_config_gives_a_report(
    victim: Path, source: Path, changes: dict[str, object], layers: object, manifest: object
):
    good = json.loads((victim / "quantize_config.json").read_text())
    config = {"num_hidden_layers": layers, "quantization_config": good | changes}
    (victim / CONFIG).write_text(json.dumps(config))
    (victim / "qquant_manifest.json").write_text(json.dumps({"files": manifest}))
    report = verify(victim, against=source, sample=1)
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.render()
    inspect(victim).render()


@given(data=st.data())
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_tensors_give_a_report(tmp_path: Path, source: Path, data: st.DataObject):
    root = quantized(tmp_path / "q")
    tensors = load_file(root / WEIGHTS)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(0, 70), max_size=3))
        dtype = data.draw(st.sampled_from([torch.int32, torch.float16, torch.uint8, torch.bool]))
        tensors[name] = torch.full(shape, data.draw(st.integers(0, 1)), dtype=dtype)
    save_file(tensors, root / WEIGHTS, {"format": "pt"})
    report = verify(root, against=source)
    assert not report.ok
    json.dumps(report.to_dict(), allow_nan=False)
    inspect(root).render()


def test_odd_scales_are_warned_of(tmp_path: Path):
    root = quantized(tmp_path / "q")
    change(root, lambda t: t[f"{FIRST}.scales"][0, 0].zero_())
    change(
        root,
        lambda t: t.update(
            {"model.layers.1.mlp.up_proj.scales": t["model.layers.1.mlp.up_proj.scales"].float()}
        ),
    )
    report = verify(root)
    assert report.ok
    assert "1 of 128 zero" in report.render()
    assert "dtype of model.layers.1.mlp.up_proj.scales: expected F16, got F32" in report.render()


def test_many_findings_are_shortened(tmp_path: Path):
    root = quantized(tmp_path / "q")
    configure(root, bits=8)
    report = verify(root)
    text = report.render(most=2)
    assert text.count("problem: ") == 2 and f"and {len(report.problems) - 2} more problems" in text


def test_inspecting_a_quantized_directory(tmp_path: Path):
    root = quantized(tmp_path / "q")
    (root / "qquant_manifest.json").write_text(
        json.dumps({"source": {"name": "src", "sha256": "ab" * 32}, "layers": [1], "files": {}})
    )
    report = inspect(root)
    weights = sum(n * k for n, k in LINEARS.values()) * LAYERS
    biases, norms = (HIDDEN + 2 * KV) * LAYERS, HIDDEN * (LAYERS * len(NORMS) + 1)
    assert report.parameters == weights + biases + norms + 2 * VOCAB * HIDDEN
    groups = sum(n * k // 32 for n, k in LINEARS.values()) * LAYERS
    assert report.kinds == {
        "codes": weights // 2,
        "embeddings": 2 * VOCAB * HIDDEN,
        "lm_head": 2 * VOCAB * HIDDEN,
        "scales": 2 * groups,
        "g_idx": 4 * sum(k for _, k in LINEARS.values()) * LAYERS,
        "zero points": groups // 2,
        "norms": 2 * norms,
        "biases": 2 * biases,
    }
    assert report.nbytes == sum(report.kinds.values()) == Checkpoint.open(root).nbytes
    in_blocks = report.nbytes - 4 * VOCAB * HIDDEN - 2 * HIDDEN
    params = weights + biases + HIDDEN * LAYERS * len(NORMS)
    assert report.bits_per_weight_blocks == pytest.approx(8 * in_blocks / params)
    assert report.layers == LAYERS and report.model_type == "qwen2"
    text = report.render()
    assert "GPTQ int4, group 32, symmetric, v1 zeros" in text and "name src" in text
    assert "ab" * 32 not in text
    assert json.loads(json.dumps(report.to_dict()))["manifest"]["source"]["sha256"] == "ab" * 32
    assert list(report.kinds.values()) == sorted(report.kinds.values(), reverse=True)


def test_inspecting_a_float_directory(source: Path, tmp_path: Path):
    report = inspect(source)
    tensors = float_tensors()
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert report.bits_per_weight == report.bits_per_weight_blocks == 16
    assert report.quantization is None and report.summary == "not quantized (BF16)"
    assert report.dtypes == {"BF16": {"tensors": len(tensors), "bytes": report.nbytes}}
    assert report.kinds["matrices"] == 2 * LAYERS * sum(n * k for n, k in LINEARS.values())
    assert "not quantized (BF16)" in report.render()
    with pytest.raises(CheckpointError):
        inspect(tmp_path / "missing")
    bare = write_dir(tmp_path / "bare", {"a": torch.ones(2)}, {"model_type": 3})
    assert inspect(bare).bits_per_weight_blocks is None and inspect(bare).render()


def test_other_quantizations_are_named(tmp_path: Path):
    root = quantized(tmp_path / "q")
    configure(root, quant_method="awq")
    report = inspect(root)
    assert report.summary == "quantized by awq"
    unknown = report.parameters, report.bits_per_weight, report.bits_per_weight_blocks
    assert unknown == (None, None, None)
    assert "per weight" not in report.render() and "parameters" not in report.render()
    configure(root, quant_method="gptq", desc_act=True, dynamic={"-:x": {}}, group_size=-1)
    assert "one scale per output" in inspect(root).summary
    assert "act-order, 1 rule for exceptions" in inspect(root).summary
