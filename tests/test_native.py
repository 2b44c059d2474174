"""Original Qwen as native qwen2: the same bytes, the same logits, no code of ours to read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from click.testing import CliRunner
from qwen_tiny import GOLDEN, N_RANKS, tiny_model, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import qquant
from qquant import native
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.config import QuantSpec
from qquant.convert import quantize
from qquant.errors import CheckpointError, TargetError, VerifyError
from qquant.headers import TensorInfo
from qquant.layout import KINDS, Layout, linears_of
from qquant.native import convert_to_native
from qquant.native_layout import names_of
from qquant.pack import Packed, dequantize
from qquant.verify import verify

TINY = GOLDEN / "qwen1-tiny"
IDS = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "The user 你好 naïve <|im_end|> 123\n\n x"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "the user"},
    {"role": "user", "content": "你好"},
]
MODULES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "transformer.h.1.ln_1": "model.layers.1.input_layernorm",
    "transformer.h.1.ln_2": "model.layers.1.post_attention_layernorm",
    "transformer.h.1.attn.c_proj": "model.layers.1.self_attn.o_proj",
    "transformer.h.1.mlp.w1": "model.layers.1.mlp.up_proj",
    "transformer.h.1.mlp.w2": "model.layers.1.mlp.gate_proj",
    "transformer.h.1.mlp.c_proj": "model.layers.1.mlp.down_proj",
}
THIRDS = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]


def change(path: Path, name: str, **values: object) -> None:
    config = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(config | values))


def source(path: Path, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> Path:
    """A tiny original Qwen in `dtype`, `tensors` added or replaced."""
    write_checkpoint(path)
    state = {k: v.to(dtype) for k, v in load_file(path / "model.safetensors").items()}
    save_file(state | tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """(source, native) of the tiny chat model."""
    root = tmp_path_factory.mktemp("native")
    change(source(root / "source"), "config.json", seq_length=256)  # the chats below fit in
    return root / "source", convert_to_native(root / "source", root / "native").path


# --- without quantization -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_weight_is_the_sources_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_SLICE", 1000)  # a few rows at a time
    reads: list[int] = []
    read_bytes = Checkpoint._bytes

    def spied(self: Checkpoint, info: TensorInfo, start: int, end: int, *into: Any) -> Tensor:
        reads.append(end - start)
        return read_bytes(self, info, start, end, *into)

    monkeypatch.setattr(Checkpoint, "_bytes", spied)
    src = source(tmp_path / "src", dtype)
    found = convert_to_native(src, tmp_path / "dst")
    assert len(reads) > 500 and max(reads) <= 1000  # the source is 150 to 300 kB
    old, new = (load_file(p / "model.safetensors") for p in (src, found.path))
    assert {t.dtype for t in new.values()} == {dtype}
    assert found.tensors == len(new) == len(old) + 2 * 2 * 2  # c_attn in three, twice, two layers
    for theirs, ours in MODULES.items():
        assert torch.equal(new[f"{ours}.weight"], old[f"{theirs}.weight"])
    for kind in ("weight", "bias"):
        joined = torch.cat([new[f"{name}.{kind}"] for name in THIRDS])
        assert torch.equal(joined, old[f"transformer.h.1.attn.c_attn.{kind}"])
    assert json.loads((found.path / "config.json").read_text())["torch_dtype"] == (
        str(dtype).removeprefix("torch.")
    )


def test_nan_and_minus_zero_go_over_as_they_are(tmp_path: Path) -> None:
    odd = torch.full((64,), -0.0)
    odd[3] = float("nan")
    src = source(tmp_path / "src", **{"transformer.ln_f.weight": odd})
    got = load_file(convert_to_native(src, tmp_path / "dst").path / "model.safetensors")
    assert torch.equal(got["model.norm.weight"].view(torch.int32), odd.view(torch.int32))


def test_shards_and_equal_runs_write_equal_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    tiny_model(hidden_size=256, intermediate_size=1024, kv_channels=128).save_pretrained(
        tmp_path / "src"
    )
    sums = []
    for name in ("a", "b"):
        found = convert_to_native(tmp_path / "src", tmp_path / name, shard_size=1_000_000)
        assert len(list(found.path.glob("model-*.safetensors"))) > 2
        sums.append((found.path / "SHA256SUMS").read_text())
    assert sums[0] == sums[1]
    listed = {line.split("  ")[1] for line in sums[0].splitlines()}
    assert listed == {p.name for p in (tmp_path / "a").iterdir()} - {"SHA256SUMS"}


def test_first_release_config_names(tmp_path: Path, tiny: tuple[Path, Path]) -> None:
    src = source(tmp_path / "src")
    change(src, "config.json", seq_length=256)
    config = json.loads((src / "config.json").read_text())
    for old, new in (
        ("n_embd", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("ffn_hidden_size", "intermediate_size"),
        ("padded_vocab_size", "vocab_size"),
    ):
        config[old] = config.pop(new)
    (src / "config.json").write_text(json.dumps(config))
    made = convert_to_native(src, tmp_path / "dst").path
    assert (made / "config.json").read_text() == (tiny[1] / "config.json").read_text()


def test_no_code_travels(tiny: tuple[Path, Path]) -> None:
    assert not list(tiny[1].glob("*.py"))
    assert "auto_map" not in "".join(p.read_text() for p in tiny[1].glob("*config.json"))


def test_generation_ends_where_the_originals_chat_does(tiny: tuple[Path, Path]) -> None:
    from qquant.models.qwen.tokenization_qwen import QWenTokenizer

    tokenizer = QWenTokenizer(tiny[0] / "qwen.tiktoken")
    made = json.loads((tiny[1] / "generation_config.json").read_text())
    ends = [tokenizer.im_end_id, tokenizer.eod_id, tokenizer.im_start_id]
    assert made["eos_token_id"] == ends and made["pad_token_id"] == tokenizer.eod_id
    assert "chat_format" not in made and made["top_p"] == 0.8


@pytest.mark.parametrize(
    ("chat_format", "named", "made", "noted"),
    [
        ("chatml", [N_RANKS, N_RANKS + 2], [N_RANKS + 2, N_RANKS, N_RANKS + 1], False),
        ("chatml", [7, N_RANKS], [N_RANKS + 2, N_RANKS, N_RANKS + 1, 7], True),
        ("raw", [N_RANKS + 9, N_RANKS], [N_RANKS, N_RANKS + 9], False),
        ("raw", N_RANKS + 9, [N_RANKS, N_RANKS + 9], True),
        ("raw", None, N_RANKS, False),
    ],
)
def test_ends_that_the_source_names_are_kept(
    tmp_path: Path, chat_format: str, named: Any, made: Any, noted: bool
) -> None:
    src = source(tmp_path / "src")
    change(src, "generation_config.json", chat_format=chat_format, eos_token_id=named)
    found = convert_to_native(src, tmp_path / "dst")
    written = json.loads((found.path / "generation_config.json").read_text())
    assert written["eos_token_id"] == made
    assert any("also ends at" in note for note in found.notes) is noted


def test_template_and_split_special_tokens_are_carried_over(tmp_path: Path) -> None:
    """chat_template.jinja comes before tokenizer_config.json's, as in transformers."""
    src = source(tmp_path / "src")
    (src / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!你", encoding="utf-8")
    change(src, "tokenizer_config.json", split_special_tokens=True, chat_template="other")
    found = convert_to_native(src, tmp_path / "dst")
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    message = [{"role": "user", "content": "<|im_start|>"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>!你"
    split = tokenizer.encode("<|im_start|>")
    assert split == list(b"<|im_") + list(b"start|>")
    (src / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: expected UTF-8"):
        convert_to_native(src, tmp_path / "other")


def test_a_base_model_ends_at_the_end_of_text(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    end = json.loads((src / "generation_config.json").read_text())["eos_token_id"]
    change(src, "generation_config.json", chat_format="raw", stop_words_ids=[[end]])
    found = convert_to_native(src, tmp_path / "dst")
    made = json.loads((found.path / "generation_config.json").read_text())
    assert made["eos_token_id"] == end and "stop_words_ids" not in made
    assert not any("stop" in note for note in found.notes)
    tokenizer = json.loads((found.path / "tokenizer_config.json").read_text())
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|endoftext|>", "<|extra_0|>")
    task = json.loads((found.path / "configuration.json").read_text())
    assert task == {"framework": "pytorch", "task": "text-generation"}


def test_what_differs_beyond_seq_length_is_said(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    shown = CliRunner().invoke(
        cli, ["convert", str(tmp_path / "src"), "-o", str(tmp_path / "dst"), "--to", "qwen2"]
    )
    assert shown.exit_code == 0, shown.output
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["max_position_embeddings"] == 32  # seq_length
    card = (tmp_path / "dst" / "README.md").read_text()
    assert "gptqmodel" not in card
    for text in (shown.stderr, card):
        assert "Beyond 32 tokens (seq_length)" in text
        assert "dynamic NTK" in text and "logn" in text and "max_window_size (400)" in text


def test_up_to_seq_length_nothing_differs_and_beyond_it_does(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    made = convert_to_native(src, tmp_path / "dst").path
    theirs, ours = (qquant.load(p, device="cpu", dtype="float32").model for p in (src, made))
    off = []
    for length in (32, 33):  # seq_length, and one more
        ids = IDS.reshape(1, -1)[:, :length]
        with torch.no_grad():
            off.append(float((theirs(ids).logits - ours(ids).logits)[:, -1].abs().max()))
    assert off[0] < 1e-4 and off[1] > 100 * off[0]


def test_without_the_two_tricks_nothing_differs(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    change(src, "config.json", use_dynamic_ntk=False, use_logn_attn=False, rotary_emb_base=1000000)
    found = convert_to_native(src, tmp_path / "dst")
    assert not any("Beyond" in note for note in found.notes)
    config = json.loads((found.path / "config.json").read_text())
    assert config["max_position_embeddings"] == 512 and config["rope_theta"] == 1000000
    theirs, ours = (qquant.load(p, device="cpu", dtype="float32").model for p in (src, found.path))
    ids = IDS.reshape(1, -1)  # 48 tokens, beyond seq_length
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-4


# --- GPTQ -----------------------------------------------------------------------------------------


def weights(path: Path) -> dict[str, Tensor]:
    """The dequantized weight of every linear of a GPTQ directory, float64, by name."""
    stored = load_file(path / "model.safetensors")
    layout = Layout.parse(json.loads((path / "config.json").read_text())["quantization_config"])
    made = {}
    for name in linears_of(stored):
        own = layout.of(name)
        assert own is not None
        packed = Packed(*(stored[f"{name}.{kind}"] for kind in Packed._fields))
        made[name] = dequantize(packed, own.bits, zero_offset=own.zero_offset, dtype=torch.float64)
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 8},
        {"bits": 3},
        {"bits": 2},
        {"bits": 4, "sym": False, "v2": True},
        {"bits": 3, "sym": False},
        {"bits": 4, "desc_act": True},
        {"bits": 4, "group_size": -1},
        {"bits": 8, "bias": False},
    ],
    ids=str,
)
def test_packed_weights_are_the_same_numbers(tmp_path: Path, settings: dict) -> None:
    model = handmade.tiny_qwen1(layers=2)
    src, _ = handmade.make_pair(model, tmp_path, blocks="transformer.h", **settings)
    found = convert_to_native(src, tmp_path / "dst")
    assert verify(found.path).ok
    old, new = weights(src), weights(found.path)
    seen = set()
    for name, weight in old.items():
        native_names = names_of(name)
        seen |= set(native_names)
        assert torch.equal(torch.cat([new[n] for n in native_names]), weight)
    assert seen == set(new) and len(new) == 2 * 7
    stored = load_file(found.path / "model.safetensors")
    biases = {n.split(".")[-2] for n in stored if n.endswith(".bias")}
    assert biases == {"q_proj", "k_proj", "v_proj"}
    quant = json.loads((found.path / "quantize_config.json").read_text())
    assert quant == json.loads((src / "quantize_config.json").read_text())
    card = (found.path / "README.md").read_text()
    assert "pip install optimum gptqmodel" in card and 'write `device_map="cpu"`' in card


def test_rules_of_mixed_precision_are_renamed(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    spec = QuantSpec(group_size=32, target_bpw=5.2)
    quantized = quantize(src, tmp_path / "int", spec, tokens=IDS, device="cpu")
    assert quantized.mixed is not None and len(set(quantized.mixed.chosen.widths)) == 3
    found = convert_to_native(quantized.path, tmp_path / "dst")
    old, new = (
        Layout.parse(json.loads((p / "quantize_config.json").read_text()))
        for p in (quantized.path, found.path)
    )
    for i in range(2):
        for module in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"):
            theirs = old.of(f"transformer.h.{i}.{module}")
            for name in names_of(f"transformer.h.{i}.{module}"):
                assert new.of(name).bits == theirs.bits
        fused = new.of(f"model.layers.{i}.self_attn.qkv_proj")  # as vLLM and SGLang look it up
        assert fused.bits == old.of(f"transformer.h.{i}.attn.c_attn").bits
        gate_up = new.of(f"model.layers.{i}.mlp.gate_up_proj")
        assert gate_up.bits == old.of(f"transformer.h.{i}.mlp.w1").bits
    for name, weight in weights(quantized.path).items():
        made = weights(found.path)
        assert torch.equal(torch.cat([made[n] for n in names_of(name)]), weight)
    manifest = json.loads((found.path / "qquant_manifest.json").read_text())
    assert manifest["source"]["manifest"]["quantization"]["target_bpw"] == 5.2


def test_listed_and_left_out_modules_are_renamed(tmp_path: Path) -> None:
    model = handmade.tiny_qwen1(layers=1)
    src, _ = handmade.make_pair(model, tmp_path, blocks="transformer.h")
    quant = json.loads((src / "quantize_config.json").read_text())
    quant["modules_in_block_to_quantize"] = [["attn.c_attn"], ["mlp.w1", "mlp.w2"]]
    quant["dynamic"] = {"-:lm_head": {}}
    change(src, "config.json", quantization_config=quant)
    (src / "quantize_config.json").write_text(json.dumps(quant))
    found = convert_to_native(src, tmp_path / "dst")
    made = json.loads((found.path / "quantize_config.json").read_text())
    assert made["modules_in_block_to_quantize"] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.up_proj", "mlp.gate_proj"],
    ]
    assert Layout.parse(made).of("lm_head") is None
    assert Layout.parse(made).of("model.layers.0.mlp.up_proj") is not None


# --- read by others -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(tmp_path_factory, tiny: tuple[Path, Path]) -> tuple[dict, dict[str, Tensor], dict]:
    """(what was seen, logits, directories) from one process of plain transformers."""
    root = tmp_path_factory.mktemp("read")
    golden = {
        name: tensor
        for name, tensor in load_file(TINY / "golden.safetensors").items()
        if name.split(".")[0] in ("short", "leftpad", "greedy_short")
        and name.split(".")[1] in ("input_ids", "attention_mask")
    }
    save_file(golden, root / "golden.safetensors")
    save_file({"ids.input_ids": IDS}, root / "ids.safetensors")
    made = {
        "golden": convert_to_native(TINY, root / "golden").path,
        "tiny": tiny[1],
    }
    if find_spec("gptqmodel") and find_spec("optimum"):
        spec = QuantSpec(group_size=32)
        quantized = quantize(tiny[0], root / "int4", spec, tokens=IDS, device="cpu").path
        made["int4"] = convert_to_native(quantized, root / "int4-native").path
    jobs = {
        name: {
            "path": str(path),
            "inputs": str(root / ("golden" if name == "golden" else "ids")) + ".safetensors",
            "dense": name != "int4",
            "steps": 40,
            "messages": MESSAGES if name == "tiny" else None,
            "text": TEXT,
        }
        for name, path in made.items()
    }
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "native_reader.py"
    shown = subprocess.run(
        [sys.executable, str(script), "jobs.json", "result.json", "logits.safetensors"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": "", "GPTQMODEL_CPU_WORKERS": "1"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    seen = json.loads((root / "result.json").read_text())
    errors = {name: found["error"] for name, found in seen.items() if "error" in found}
    assert not errors, errors
    return seen, load_file(root / "logits.safetensors"), made


def test_logits_are_the_originals_in_plain_transformers(read) -> None:
    seen, logits, _ = read
    assert seen["golden"]["model"] == "Qwen2ForCausalLM"
    assert seen["golden"]["from"].startswith("transformers.models.qwen2")
    golden = load_file(TINY / "golden.safetensors")
    for key in ("short", "leftpad"):
        mask = golden.get(f"{key}.attention_mask", torch.ones_like(golden[f"{key}.input_ids"]))
        off = (logits[f"golden.{key}"] - golden[f"{key}.logits"])[mask.bool()].abs().max()
        assert off < 2e-5  # float32 rounding; the logits reach 3
    assert seen["golden"]["greedy"]["greedy_short"] == golden["greedy_short.output_ids"][0].tolist()


def test_chat_is_the_originals_in_plain_transformers(read, tiny: tuple[Path, Path]) -> None:
    from qquant.models.qwen.qwen_generation_utils import make_context

    seen = read[0]["tiny"]
    theirs = qquant.load(tiny[0], device="cpu", dtype="float32")
    history = [(MESSAGES[1]["content"], MESSAGES[2]["content"])]
    _, context = make_context(theirs.tokenizer, "你好", history, "Be brief.", 400)
    assert seen["prompt"] == context
    assert seen["ids"] == theirs.tokenizer.encode(TEXT)
    response, _ = theirs.model.chat(
        theirs.tokenizer, "你好", history=history, system="Be brief.", do_sample=False
    )
    ends = json.loads((tiny[1] / "generation_config.json").read_text())["eos_token_id"]
    answer = [token for token in seen["answer"] if token not in ends]
    assert len(answer) >= len(seen["answer"]) - 1 and answer
    # Random weights pick ids that stand for nothing, which the two decode differently.
    assert theirs.tokenizer.decode(answer).strip() == response


@pytest.mark.readers
def test_int4_reads_in_transformers_with_gptqmodel(read) -> None:
    seen, logits, made = read
    if "int4" not in made:
        pytest.skip("gptqmodel and optimum not installed: pip install 'qquant[readers]'")
    assert seen["int4"]["from"].startswith("transformers.models.qwen2")
    exact, rounded = (
        qquant.load(made["int4"], device="cpu", kernel="dense", dtype=dtype).model
        for dtype in ("float32", "bfloat16")
    )
    with torch.no_grad():
        want, near = exact(IDS).logits, rounded(IDS).logits.float()
    allowed = 1.5 * (near - want).norm()  # its kernel computes in bfloat16, see test_readers
    assert (logits["int4.ids"] - want).norm() < allowed


MODELSCOPE = """
import json, sys
from modelscope import AutoModelForCausalLM, AutoTokenizer
from modelscope.utils.hub import read_config
found = []
for path in sys.argv[1:]:
    config = read_config(path)
    code = {"trust_remote_code": True} if "auto_map" in open(f"{path}/config.json").read() else {}
    model = AutoModelForCausalLM.from_pretrained(path, **code)
    ids = AutoTokenizer.from_pretrained(path, **code)("the user", return_tensors="pt")
    row = model(**ids).logits[0, -1].float().tolist()
    found.append({"framework": config.framework, "task": config.task, "logits": row})
print(json.dumps(found))
"""


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("modelscope", "addict", "simplejson")),
    reason="modelscope not installed: pip install 'qquant[dev]'",
)
def test_modelscope_loads_the_directory(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """The plain one, and where GPTQ is read the Int4 one and original Qwen's, by its code."""
    paths = [tiny[1]]
    if find_spec("gptqmodel") and find_spec("optimum"):
        spec = QuantSpec(group_size=32, method="rtn")
        for name, src in (("int4", tiny[1]), ("original-int4", tiny[0])):
            paths.append(quantize(src, tmp_path / name, spec, device="cpu").path)
    shown = subprocess.run(
        [sys.executable, "-c", MODELSCOPE, *map(str, paths)], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    found = json.loads(shown.stdout.splitlines()[-1])
    for path, seen, off in zip(paths, found, (1e-4, 0.05, 0.05), strict=False):
        assert (seen["framework"], seen["task"]) == ("pytorch", "chat")
        model, tokenizer, _ = qquant.load(path, device="cpu", kernel="dense", dtype="float32")
        with torch.no_grad():
            want = model(**tokenizer("the user", return_tensors="pt")).logits[0, -1]
        assert (torch.tensor(seen["logits"]) - want).norm() < off * want.norm()  # bfloat16 products


def test_every_export_tells_modelscope_its_task(tmp_path: Path, tiny: tuple[Path, Path]) -> None:
    handmade.tiny_qwen2().save_pretrained(tmp_path / "base")
    spec = QuantSpec(group_size=32, method="rtn")
    for src, task in ((tiny[0], "chat"), (tmp_path / "base", "text-generation")):
        made = quantize(src, tmp_path / task, spec, device="cpu").path
        written = json.loads((made / "configuration.json").read_text())
        assert written == {"framework": "pytorch", "task": task}
        assert "configuration.json" in (made / "SHA256SUMS").read_text()


# --- refused --------------------------------------------------------------------------------------


def _spoil_bias(path: Path) -> None:
    source(path, **{"transformer.h.0.mlp.w1.bias": torch.ones(96)})


def _spoil_stranger(path: Path) -> None:
    source(path, **{"transformer.visual.conv.weight": torch.ones(4)})


def _spoil_rotary(path: Path) -> None:
    source(path)
    change(path, "config.json", rotary_pct=0.5)


def _spoil_scaling(path: Path) -> None:
    source(path)
    change(path, "config.json", scale_attn_weights=False)


def _spoil_heads(path: Path) -> None:
    source(path)
    change(path, "config.json", kv_channels=16)


def _spoil_method(path: Path) -> None:
    source(path)
    change(path, "config.json", quantization_config={"quant_method": "bitsandbytes"})


def _spoil_type(path: Path) -> None:
    handmade.tiny_qwen2().save_pretrained(path)


def _spoil_ranks(path: Path) -> None:
    source(path)
    with (path / "qwen.tiktoken").open("a") as file:
        file.write("eHl6emE= 266\n")  # xyzza, of no two tokens


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_bias, r"mlp\.w1\.bias: expected zeros"),
        (_spoil_stranger, r"tensor transformer\.visual\.conv\.weight"),
        (_spoil_rotary, "rotary_pct: expected 1"),
        (_spoil_scaling, "scale_attn_weights: expected true"),
        (_spoil_heads, "c_attn.*by config.json"),
        (_spoil_method, "Convert the checkpoint that it was made from"),
        (_spoil_type, "Nothing to convert"),
        (_spoil_ranks, "token 266, b'xyzza'"),
    ],
)
def test_what_qwen2_cannot_say_is_refused_by_name(tmp_path: Path, spoil, message: str) -> None:
    spoil(tmp_path / "src")
    with pytest.raises(CheckpointError, match=message):
        convert_to_native(tmp_path / "src", tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


W1 = "transformer.h.0.mlp.w1"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lm_head.weight", None, r"lm_head\.weight: expected a tensor of this name"),
        ("transformer.ln_f.weight", None, r"ln_f\.weight: expected a tensor of this name"),
        (f"{W1}.weight", None, r"h\.0\.mlp\.w1\.weight: expected a tensor of this name"),
        ("transformer.h.1.attn.c_attn.bias", None, r"h\.1\.attn\.c_attn\.bias: expected a tensor"),
        (f"{W1}.weight", (96, 32), r"w1\.weight: expected shape \(96, 64\) \(from config\.json\)"),
        ("transformer.wte.weight", (100, 64), r"wte\.weight: expected shape"),
        ("transformer.ln_f.weight", (), r"shape of transformer\.ln_f\.weight: expected at least"),
        ("transformer.wte.weight", (), r"shape of transformer\.wte\.weight: expected at least"),
    ],
)
def test_a_source_that_is_not_whole_is_refused_by_name(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    src = source(tmp_path / "src")
    state = load_file(src / "model.safetensors")
    del state[name]
    if shape is not None:
        state[name] = torch.ones(shape)
    save_file(state, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        convert_to_native(src, tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("kinds", "made", "message"),
    [
        (KINDS, None, r"w1\.weight: expected a tensor of this name"),
        (("qweight",), torch.zeros(4, dtype=torch.int32), r"w1\.qweight: expected 2 dimensions"),
        (("g_idx",), torch.zeros(96, dtype=torch.int32), r"w1\.weight: expected shape \(256, 128"),
        (("scales",), torch.zeros((), dtype=torch.float16), r"w1\.scales: expected at least one"),
    ],
)
def test_packed_linears_are_held_against_the_config(
    tmp_path: Path, kinds: tuple[str, ...], made: Tensor | None, message: str
) -> None:
    src, _ = handmade.make_pair(handmade.tiny_qwen1(layers=1), tmp_path, blocks="transformer.h")
    state = load_file(src / "model.safetensors")
    for kind in kinds:
        del state[f"{W1}.{kind}"]
        if made is not None:
            state[f"{W1}.{kind}"] = made
    save_file(state, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        convert_to_native(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "module", ["transformer.h.0.ln_1", "transformer.h.1.ln_2", "transformer.ln_f", "lm_head"]
)
def test_every_other_bias_has_to_be_zero_and_is_left_out(tmp_path: Path, module: str) -> None:
    size = 320 if module == "lm_head" else 64
    src = source(tmp_path / "zero", **{f"{module}.bias": torch.zeros(size)})
    made = load_file(convert_to_native(src, tmp_path / "dst").path / "model.safetensors")
    assert {n.split(".")[-2] for n in made if n.endswith(".bias")} == {"q_proj", "k_proj", "v_proj"}
    src = source(tmp_path / "one", **{f"{module}.bias": torch.ones(size)})
    with pytest.raises(CheckpointError, match=rf"{module}\.bias: expected zeros"):
        convert_to_native(src, tmp_path / "other")


def test_computed_buffers_of_early_checkpoints_are_left_out(tmp_path: Path) -> None:
    buffer = {"transformer.rotary_emb.inv_freq": torch.ones(16)}
    src = source(tmp_path / "src", **buffer)
    with safe_open(convert_to_native(src, tmp_path / "dst").path / "model.safetensors", "pt") as f:
        assert not any("inv_freq" in name for name in f.keys())


def test_a_copy_that_is_not_the_source_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = source(tmp_path / "src")
    pieces = native._pieces
    calls: list[str] = []

    def spoiled(*args) -> Iterator:
        first = len(calls) < 1
        calls.append(args[1])
        for part, row, tensor in pieces(*args):
            yield part, row, tensor + 1 if first else tensor

    monkeypatch.setattr(native, "_pieces", spoiled)
    with pytest.raises(VerifyError, match="is not what"):
        convert_to_native(src, tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_target_that_is_there_stays(tmp_path: Path, tiny: tuple[Path, Path]) -> None:
    (tmp_path / "dst").mkdir()
    with pytest.raises(TargetError):
        convert_to_native(tiny[0], tmp_path / "dst")
    assert not list((tmp_path / "dst").iterdir())


def test_cli_refuses_with_one_line_and_tells_in_json(tmp_path: Path) -> None:
    handmade.tiny_qwen2().save_pretrained(tmp_path / "src")
    words = ["convert", str(tmp_path / "src"), "-o", str(tmp_path / "dst"), "--to", "qwen2"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 2 and shown.stderr.count("\n") == 1
    write_checkpoint(tmp_path / "qwen")
    words[1] = str(tmp_path / "qwen")
    shown = CliRunner().invoke(cli, [*words, "--log-json"])
    last = json.loads(shown.stdout.splitlines()[-1])
    assert last["event"] == "done" and last["tensors"] == 27 and len(last["notes"]) == 3
