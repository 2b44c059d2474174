"""`--format compressed-tensors`: GPTQ's numbers laid out otherwise, read by the package itself."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from click.testing import CliRunner
from qwen_tiny import write_checkpoint
from safetensors.torch import load_file, save_file
from test_experts import tiny

import qquant
from qquant import compressed, compressed_layout
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.config import OutputSpec, QuantSpec
from qquant.convert import quantize
from qquant.dense import DenseReader, relative_errors
from qquant.errors import CheckpointError, SpecError
from qquant.layout import KINDS
from qquant.pack import V1, pack
from qquant.readers import verdicts
from qquant.relayout import convert_to_compressed
from qquant.verify import inspect, verify

IDS = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
OUT = OutputSpec(format=compressed_layout.METHOD)
needs_package = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors not installed: pip install 'qquant[compressed]'",
)
# What the package says when it is imported and when it loads, of no consequence here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

SPECS = {
    "int4": QuantSpec(group_size=32, scale_search=4, sweeps=1),
    "int8": QuantSpec(bits=8, group_size=32, method="rtn"),
    "int4-asymmetric": QuantSpec(group_size=32, sym=False, method="rtn"),
    "int4-per-channel": QuantSpec(group_size=-1, method="rtn"),
    "mixed": QuantSpec(group_size=32, target_bpw=6, bit_choices=(4, 8), scale_search=0, sweeps=0),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "source"
    handmade.tiny_qwen2().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(source: Path) -> Any:
    """By spec: (the GPTQ directory, the compressed-tensors one), both from one run's settings."""
    found: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in found:
            pair = source.parent / f"{name}-gptq", source.parent / f"{name}-ct"
            for path, out in zip(pair, (OutputSpec(), OUT), strict=True):
                quantize(source, path, SPECS[name], out=out, tokens=IDS, device="cpu")
            found[name] = pair
        return found[name]

    return get


def dense(path: Path) -> dict[str, torch.Tensor]:
    """Weights of the float16 model that the directory stands for."""
    return qquant.load(path, device="cpu", kernel="dense", dtype="float16").model.state_dict()


@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_gptq_directorys_numbers(made, source: Path, name: str) -> None:
    plain, packed = made(name)
    report = verify(packed, against=source)
    other = verify(plain, against=source)
    assert report.ok, report.render()
    assert list(map(str, report.warnings)) == list(map(str, other.warnings))
    assert [r.relative_error for r in report.layers] == [r.relative_error for r in other.layers]
    ours, theirs = dense(packed), dense(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not (packed / "quantize_config.json").exists()
    if name == "int4":
        stored = load_file(packed / "model.safetensors")
        assert any(bool((t < 0).any()) for n, t in stored.items() if n.endswith("weight_scale"))


@needs_package
@pytest.mark.parametrize("name", SPECS)
def test_transformers_reads_the_same_logits(made, name: str) -> None:
    """Its loader dequantizes in float16, as ours does when asked to: equal to the last bit."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = made(name)[1]
    options: dict[str, Any] = {"dtype": torch.float16}
    if name == "int4-asymmetric":  # else package 0.20.0 expects zero points that are not packed
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(packed, **options).eval()
    ours = qquant.load(made(name)[0], device="cpu", kernel="dense", dtype="float16").model
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompt = {"inputs": IDS[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    assert torch.equal(theirs.generate(**prompt, **options), ours.generate(**prompt, **options))


@needs_package
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_bits_are_where_the_package_puts_them(bits: int, sym: bool) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 64), generator=draw, dtype=torch.uint8)
    zeros = torch.full((32, 2), 2 ** (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(1, 2**bits, (32, 2), generator=draw, dtype=torch.uint8)
    packed = pack(codes, torch.ones(32, 2), zeros, bits=bits, group_size=32)
    parts = compressed.parts_of(packed, bits=bits, zero_offset=V1, sym=sym)
    half = 2 ** (bits - 1)
    values, points = ((t.int() - half).to(torch.int8) for t in (codes, zeros))
    assert torch.equal(parts["weight_packed"], pack_to_int32(values, bits))
    assert ("weight_zero_point" in parts) is not sym
    if not sym:
        assert torch.equal(parts["weight_zero_point"], pack_to_int32(points, bits, packed_dim=0))


@needs_package
def test_original_qwen_in_this_format_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "src")
    spec = QuantSpec(group_size=32, method="rtn")
    for name, out in (("gptq", OutputSpec()), ("ct", OUT)):
        quantize(tmp_path / "src", tmp_path / name, spec, out=out, device="cpu")
    assert verify(tmp_path / "ct", against=tmp_path / "src").ok
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    biases = {n.split(".", 3)[3] for n in stored if n.endswith(".bias")}
    assert biases == {"attn.c_attn.bias"}  # the zero ones are GPTQ's habit
    convert_to_compressed(tmp_path / "gptq", tmp_path / "turned")
    turned = load_file(tmp_path / "turned" / "model.safetensors")
    assert turned.keys() == stored.keys()
    assert all(torch.equal(turned[name], stored[name]) for name in stored)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", dtype=torch.float16, trust_remote_code=True
    )
    ours = qquant.load(tmp_path / "gptq", device="cpu", kernel="dense", dtype="float16").model
    with torch.no_grad():
        assert torch.equal(theirs.eval()(IDS).logits, ours(IDS).logits)


def test_inspect_and_the_card_name_it(made) -> None:
    plain, packed = made("int4")
    ours, theirs = inspect(packed), inspect(plain)
    assert ours.summary == "compressed-tensors int4, group 32, symmetric"
    assert ours.parameters == theirs.parameters
    assert ours.nbytes == sum(t.nbytes for t in load_file(packed / "model.safetensors").values())
    card = (packed / "README.md").read_text()
    assert "pip install compressed-tensors" in card and "--format compressed-tensors" in card
    assert "vllm serve" in card and "pack-quantized" in card and "pip install optimum" not in card
    assert "mixed" in inspect(made("mixed")[1]).summary


def test_a_card_says_what_reads_asymmetric_grids(made, tmp_path: Path) -> None:
    """As `inspect --readers` does: vLLM, and transformers with an option."""
    plain, packed = made("int4-asymmetric")
    convert_to_compressed(plain, tmp_path / "dst")
    for path in (packed, tmp_path / "dst"):
        card = (path / "README.md").read_text()
        assert "CompressedTensorsConfig(dequantize=True)" in card
        assert "not this directory" not in card and "With vLLM" in card
        assert {v.reader.partition(" ")[0]: v.reads for v in verdicts(path)}["vLLM"]
    card = (plain / "README.md").read_text()
    assert "not this directory" in card and 'write `device_map="cpu"`' in card


@pytest.mark.parametrize("name", ["int4", "int8", "int4-asymmetric", "mixed"])
def test_a_gptq_directory_converts_to_the_same_bytes(made, tmp_path: Path, name: str) -> None:
    plain, packed = made(name)
    words = ["convert", str(plain), "-o", str(tmp_path / "dst"), "--to", "compressed-tensors"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0, shown.stderr
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "dst" / file).read_bytes() == (packed / file).read_bytes()
    assert verify(tmp_path / "dst").ok
    assert "compressed-tensors" in (tmp_path / "dst" / "README.md").read_text()


def test_what_the_format_cannot_say_is_not_converted(tmp_path: Path) -> None:
    model = handmade.tiny_qwen2(layers=1)
    for name, settings, error in (
        ("order", {"desc_act": True}, CheckpointError),
        ("three", {"bits": 3}, SpecError),
    ):
        src, _ = handmade.make_pair(model, tmp_path / name, blocks="model.layers", **settings)
        with pytest.raises(error):
            convert_to_compressed(src, tmp_path / "dst")
        assert not (tmp_path / "dst").exists()


def a_gptq_directory(
    root: Path, rules: Any = None, layers: int = 2, **tensors: torch.Tensor | None
) -> Path:
    """Of random codes, with `dynamic` rules; `tensors` replaced, and left out where None."""
    path, _ = handmade.make_pair(handmade.tiny_qwen2(layers=layers), root, blocks="model.layers")
    state = load_file(path / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((path / name).read_text())
        content.get("quantization_config", content)["dynamic"] = rules or {}
        (path / name).write_text(json.dumps(content))
    return path


def test_a_quantized_head_is_refused_by_name(tmp_path: Path) -> None:
    head, _ = handmade.random_linear(320, 128, group_size=32)
    parts = {f"lm_head.{kind}": tensor for kind, tensor in head.items()}
    src = a_gptq_directory(tmp_path, **{"lm_head.weight": None}, **parts)
    assert verify(src).ok
    with pytest.raises(CheckpointError, match="lm_head: expected a head in 16 bits"):
        convert_to_compressed(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


UP = "model.layers.0.mlp.up_proj"


def eight_bits(path: Path, *names: str) -> None:
    """Gives linears of a made directory 8 bits."""
    state = load_file(path / "model.safetensors")
    for name in names:
        shape = state[f"{name}.scales"].shape[1], state[f"{name}.g_idx"].shape[0]
        parts, _ = handmade.random_linear(*shape, bits=8, group_size=32)
        state |= {f"{name}.{kind}": tensor for kind, tensor in parts.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def test_rules_that_need_their_order_are_refused(tmp_path: Path) -> None:
    """There a width's rules stand together, and those for 16 bits first."""
    for number, rules in enumerate(
        (
            {rf"+:{UP}": {"bits": 8}, r"+:.*\.mlp\.": {"bits": 4}, r"+:.*up_proj": {"bits": 8}},
            {rf"+:{UP}": {"bits": 8}, r"-:.*\.0\.mlp\.up_proj": {}},
        )
    ):
        src = a_gptq_directory(tmp_path / str(number), rules)
        eight_bits(src, UP)
        assert verify(src).ok, verify(src).render()
        with pytest.raises(CheckpointError, match=f"dynamic, of {UP}: expected rules that mean 8"):
            convert_to_compressed(src, tmp_path / "dst")
    src = a_gptq_directory(tmp_path / "apart", {rf"+:{UP}": {"bits": 8}, "-:lm_head": {}})
    eight_bits(src, UP)
    assert verify(convert_to_compressed(src, tmp_path / "dst").path).ok


def test_plain_linears_need_a_rule(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    parts: dict[str, Any] = {f"{name}.{kind}": None for kind in (*KINDS, "bias")}
    parts[f"{name}.weight"] = torch.ones(128, 128).half()
    src = a_gptq_directory(tmp_path / "no", {r"+:nothing": {"bits": 8}}, layers=1, **parts)
    assert verify(src).ok
    with pytest.raises(CheckpointError, match=f"of {name}: expected rules that mean 16 bits"):
        convert_to_compressed(src, tmp_path / "dst")
    src = a_gptq_directory(tmp_path / "one", {rf"-:{name}": {}}, layers=1, **parts)
    made = convert_to_compressed(src, tmp_path / "dst").path
    assert verify(made).ok
    content = json.loads((made / "config.json").read_text())
    content["quantization_config"]["ignore"] = ["lm_head", name]  # as other tools write it
    (made / "config.json").write_text(json.dumps(content))
    for file in ("SHA256SUMS", "qquant_manifest.json"):
        (made / file).unlink()
    report = verify(made)
    assert report.ok and not report.warnings, report.render()
    content["quantization_config"]["ignore"] = ["lm_head", "model.layers.0.mlp.gate_proj"]
    (made / "config.json").write_text(json.dumps(content))
    assert "gate_proj: expected unquantized" in verify(made).render()


@pytest.mark.parametrize(
    ("kind", "tensor", "message"),
    [
        ("qweight", torch.ones(4, dtype=torch.int32), "qweight: expected 2 dimensions"),
        ("g_idx", torch.ones((), dtype=torch.int32), "g_idx: expected 1 dimension,"),
        ("scales", torch.ones(()).half(), "scales: expected 2 dimensions"),
        ("g_idx", None, "g_idx: expected in"),
    ],
)
def test_malformed_tensors_are_named(
    tmp_path: Path, kind: str, tensor: torch.Tensor | None, message: str
) -> None:
    src = a_gptq_directory(tmp_path, **{f"{UP}.{kind}": tensor})
    for refuse in (lambda: convert_to_compressed(src, tmp_path / "dst"), lambda: verdicts(src)):
        with pytest.raises(CheckpointError, match=message):
            refuse()


def test_scales_are_not_rounded_in_silence(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        scales = torch.full((4, 256), 2.0**-7, dtype=dtype)
        src = a_gptq_directory(tmp_path / f"even {dtype}", **{f"{UP}.scales": scales})
        made = convert_to_compressed(src, tmp_path / f"made {dtype}").path
        stored = load_file(made / "model.safetensors")[f"{UP}.weight_scale"]
        assert torch.equal(stored, scales.half().t())
        scales[1, 7] = 2.0**-30
        src = a_gptq_directory(tmp_path / f"small {dtype}", **{f"{UP}.scales": scales})
        with pytest.raises(CheckpointError, match=f"{UP}.scales: expected scales that float16"):
            convert_to_compressed(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_its_weights_are_seen_for_a_profiles_layers(made, source: Path) -> None:
    plain, packed = (dict(errors_of(path, source)) for path in made("mixed"))
    assert packed == plain and len(plain) == 14 and max(plain.values()) > 0.01


def errors_of(path: Path, source: Path) -> Any:
    return relative_errors(*(DenseReader(Checkpoint.open(each)) for each in (source, path)))


def test_widths_that_vllm_does_not_read_are_refused(source: Path, tmp_path: Path) -> None:
    for spec in (QuantSpec(bits=3, group_size=32), QuantSpec(group_size=32, target_bpw=4.5)):
        with pytest.raises(SpecError, match="4 or 8, which vLLM's kernels read"):
            quantize(source, tmp_path / "dst", spec, out=OUT, tokens=IDS)
    words = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--format"]
    shown = CliRunner().invoke(cli, [*words, "awq"])
    assert shown.exit_code == 2 and "'gptq', 'compressed-tensors'" in shown.stderr
    shown = CliRunner().invoke(cli, [*words, "compressed-tensors", "--method", "nf4"])
    assert shown.exit_code == 2 and "--format" in shown.stderr
    assert not (tmp_path / "dst").exists()


def test_mixtures_are_refused_by_name(tmp_path: Path) -> None:
    tiny("qwen3_moe", moe_intermediate_size=64).save_pretrained(tmp_path / "src")
    spec, target = QuantSpec(group_size=32, method="rtn"), tmp_path / "dst"
    with pytest.raises(SpecError, match="got qwen3_moe, with experts"):
        quantize(tmp_path / "src", target, spec, out=OUT, device="cpu")
    quantize(tmp_path / "src", tmp_path / "gptq", spec, device="cpu")
    with pytest.raises(SpecError, match="got qwen3_moe, with experts"):
        convert_to_compressed(tmp_path / "gptq", target)
    assert not target.exists()


def _no_scale(state: dict, config: dict) -> None:
    del state["model.layers.0.mlp.up_proj.weight_scale"]


def _other_shape(state: dict, config: dict) -> None:
    state["model.layers.0.mlp.up_proj.weight_shape"] += 32


def _other_bits(state: dict, config: dict) -> None:
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def _float(state: dict, config: dict) -> None:
    config["config_groups"]["group_0"]["weights"]["type"] = "float"


def _no_groups(state: dict, config: dict) -> None:
    config["config_groups"] = None


def _other_format(state: dict, config: dict) -> None:
    config["format"] = "nvfp4-pack-quantized"


def _order(state: dict, config: dict) -> None:
    state["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.zeros(128, dtype=torch.int32)


def _nan(state: dict, config: dict) -> None:
    state["model.layers.0.mlp.up_proj.weight_scale"][0] = float("nan")


def respecified(path: Path, to: Path, **changes: Any) -> Path:
    """A copy whose config says more of its weights."""
    to.mkdir()
    shutil.copyfile(path / "model.safetensors", to / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("order", ["static", "weight", None, False])
def test_an_order_that_is_not_stored_is_read(made, tmp_path: Path, order: Any) -> None:
    """As llm-compressor writes it by default: codes found in an order, stored without one."""
    path = made("int4")[1]
    again = respecified(path, tmp_path / "again", actorder=order)
    report = verify(again)
    assert report.ok and len(report.layers) == len(verify(path).layers)
    loaded = [qquant.load(p, device="cpu").model(IDS[:1]).logits for p in (path, again)]
    assert torch.equal(*loaded)


@pytest.mark.parametrize("order", ["group", "dynamic", True])
def test_a_stored_order_is_refused(made, tmp_path: Path, order: Any) -> None:
    again = respecified(made("int4")[1], tmp_path / "again", actorder=order)
    assert "without a stored activation order" in verify(again).render()


@pytest.mark.parametrize(
    ("spoil", "message", "loads"),
    [
        (_no_scale, "up_proj.weight_scale: expected beside weight_packed", False),
        (_other_shape, "by weight_shape and the config", False),
        (_other_bits, "by weight_shape and the config", False),
        (_float, "group_0: weights: expected integer weights", False),
        (_no_groups, "config_groups: expected an object", False),
        (_other_format, "format: expected 'pack-quantized'", False),
        (_order, "no stored activation order", False),
        (_nan, "up_proj.scales: expected finite numbers", True),
    ],
)
def test_verify_says_what_is_wrong(made, tmp_path: Path, spoil, message: str, loads: bool) -> None:
    path = made("int4")[1]
    state = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    spoil(state, config["quantization_config"])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify(tmp_path)
    assert message in "\n".join(map(str, report.problems))
    if not loads:
        with pytest.raises(CheckpointError):
            qquant.load(tmp_path, device="cpu")
    inspect(tmp_path)
