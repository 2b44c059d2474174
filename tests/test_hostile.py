"""Files made to harm: code that wants to run, bombs, expressions without end, links that lead out.

Beside `test_fuzz.py`, which spoils good files at random: here each case is meant.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from fuzz_targets import FAST, IDS, write_tokenizer
from qwen_tiny import write_checkpoint, write_ranks
from safetensors.torch import save_file

import qquant
from qquant import directory, layout
from qquant.calibration import sources
from qquant.calibration.sources import read_source
from qquant.checkpoint import Checkpoint
from qquant.config import CalibrationSpec, OutputSpec, QuantSpec
from qquant.convert import quantize
from qquant.directory import read_json
from qquant.errors import CalibrationError, CheckpointError, QQuantError, SpecError
from qquant.models.qwen.tokenization_qwen import load_extra_ranks, load_ranks
from qquant.models.tokenizer import tokenizer_errors
from qquant.runtime import load
from qquant.verify import inspect, verify

CODE = (
    *("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "setup.py"),
    *("conftest.py", "sitecustomize.py", "custom_generate/generate.py"),
)
AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    "AutoModel": "someone/else--modeling_qwen.QWenModel",
}


def change(file: Path, **values: Any) -> None:
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | values))


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture(params=["qwen", "qwen2"])
def trapped(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A good checkpoint with code and pickles that leave a mark when they are run."""
    source, marker = tmp_path / "source", tmp_path / "marker"
    if request.param == "qwen":
        write_checkpoint(source, code=False)
    else:
        handmade.tiny_qwen2(hidden=64, ffn=64, layers=1).save_pretrained(source)
        write_tokenizer(source)
    for name in CODE:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "x.pt"):
        (source / name).write_bytes(pickle.dumps(Trap(marker)))
    change(source / "config.json", auto_map=AUTO_MAP)
    tokenizer = ["tokenization_qwen.QWenTokenizer", None]
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": tokenizer})
    change(source / "generation_config.json", auto_map=AUTO_MAP, custom_generate="x/y")
    return source


@pytest.mark.filterwarnings("ignore")
def test_code_in_the_source_is_never_run_nor_passed_on(trapped: Path) -> None:
    target, marker = trapped.parent / "target", trapped.parent / "marker"
    quantize(trapped, target, FAST, tokens=IDS, device="cpu")
    assert verify(target, against=trapped).problems == []
    for path in (trapped, target):
        inspect(path).render()
        with torch.no_grad():
            load(path, device="cpu").model(IDS)
    assert not marker.exists()
    own = qquant.models.export_files()
    for file in target.iterdir():
        assert file.suffix not in (".bin", ".pt") and file.is_file(), file.name
        if file.suffix == ".py":
            assert file.read_bytes() == own[file.name].read_bytes()
        elif file.suffix == ".json" and file.name != "qquant_manifest.json":
            assert "someone/else" not in file.read_text(), file.name
            named = json.loads(file.read_text()).get("auto_map", {})
            assert bool(named) <= (target / "modeling_qwen.py").is_file()


def test_pickles_alone_are_refused_unopened(trapped: Path) -> None:
    (trapped / "model.safetensors").unlink()
    for act in (
        lambda: quantize(trapped, trapped.parent / "target", FAST, tokens=IDS, device="cpu"),
        lambda: load(trapped, device="cpu"),
        lambda: verify(trapped),
        lambda: inspect(trapped),
    ):
        with pytest.raises(CheckpointError, match=r"adapter_model\.bin.*never unpickles"):
            act()
    assert not (trapped.parent / "marker").exists()


@pytest.fixture
def native(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    handmade.tiny_qwen2(hidden=64, ffn=64, layers=2).save_pretrained(source)
    return source


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: expected as many as the weights have, 2"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ({"_attn_implementation": {"": "someone/kernel"}}, "attn_implementation"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
    ],
)
def test_a_config_that_would_end_badly_is_refused(
    native: Path, values: dict[str, Any], key: str
) -> None:
    change(native / "config.json", **values)
    for act in (
        lambda: quantize(native, native.parent / "target", FAST, tokens=IDS, device="cpu"),
        lambda: load(native, device="cpu"),
    ):
        with pytest.raises(CheckpointError, match=key):
            act()


@pytest.mark.parametrize("act", ["quantize", "load"])
def test_a_config_of_the_wrong_kinds_is_refused(native: Path, act: str) -> None:
    change(native / "config.json", rope_parameters={"rope_type": "x", "rope_theta": "many"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        if act == "load":
            load(native, device="cpu")
        else:
            quantize(native, native.parent / "target", FAST, tokens=IDS, device="cpu")


def test_a_licence_that_leads_out_is_refused_before_work(native: Path) -> None:
    (native.parent / "secret").write_text("secret")
    (native / "LICENSE").symlink_to(native.parent / "secret")
    with pytest.raises(CheckpointError, match="LICENSE"):
        quantize(native, native.parent / "target", FAST, tokens=IDS, device="cpu")


def test_a_pipe_called_licence_is_not_read(native: Path) -> None:
    os.mkfifo(native / "LICENSE.txt")
    (native / "README.md").mkdir()
    quantize(native, native.parent / "target", FAST, tokens=IDS, device="cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "NaN, which is no JSON"),
        ('{"a": -Infinity}', "-Infinity, which is no JSON"),
        ('{"a": "\\ud800"}', "surrogates"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64"),
        ('{"a":' * 100_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": "' + "x" * 2000 + '"}', "more than 0 MiB"),
    ],
)
def test_json_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    if len(text) < 2500:
        monkeypatch.setattr(directory, "_JSON_BYTES", 1900)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json.*{said}"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path, "config.json") == {"a": "😀"}


ENDLESS = [r"(?:.|\w)*\d$", r"(.|.)*$(?!)", r"(?:(.|\w)+)+\W$", r"(.|..|...)*(?<=\d)$"]
REFUSED = [r"(?R)", r"(?P>x)", "(", "[", "a{1,99999999999999}", "(" * 5000, "a" * 20_000, r"\p{L}"]


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = handmade.tiny_qwen2(hidden=64, ffn=64, layers=1)
    made, _ = handmade.make_pair(model, tmp_path_factory.mktemp("rules"), blocks="model.layers")
    return made


def with_rule(gptq: Path, rule: str) -> Path:
    config = json.loads((gptq / "config.json").read_text())["quantization_config"]
    config["dynamic"] = {"-:" + rule: {}}
    change(gptq / "config.json", quantization_config=config)
    change(gptq / "quantize_config.json", **config)
    return gptq


@pytest.mark.parametrize("rule", ENDLESS)
def test_a_rule_without_end_is_refused(
    gptq: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setattr(layout, "_SECONDS", 0.1)
    with_rule(gptq, rule)
    assert any("dynamic" in problem.key for problem in verify(gptq).problems)
    for act in (inspect, lambda path: load(path, device="cpu")):
        with pytest.raises(CheckpointError, match=r"dynamic.*backtracks without end"):
            act(gptq)
    own = layout.Layout.parse({"bits": 4, "group_size": 32, "dynamic": {rule: {}}})
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        with pytest.raises(CheckpointError, match="all together"):
            own.of(name)


@pytest.mark.parametrize("rule", REFUSED)
def test_what_is_no_expression_is_refused(gptq: Path, rule: str) -> None:
    with_rule(gptq, rule)
    assert "dynamic" in verify(gptq).problems[0].key
    assert "not understood" in inspect(gptq).summary
    with pytest.raises(CheckpointError, match="dynamic"):
        load(gptq, device="cpu")


def test_ordinary_rules_read_as_re_reads_them() -> None:
    rules = [
        r"+:model\.layers\.(?:0|1|17)\.(?:mlp\.up_proj|mlp\.gate_proj)$",
        r"-:.*\.18\..*gate.*",
        r"^model\.layers\.\d+\.self_attn\.[qkv]_proj",
        r"(?i).*MLP.*down",
        r"model.*(?<!q)_proj$",
        "lm_head",
        "",
    ]
    names = [
        f"model.layers.{i}.{m}"
        for i in (0, 1, 18, 27)
        for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    for rule in rules:
        own = layout.Layout.parse({"bits": 4, "group_size": 32, "dynamic": {rule: {"bits": 8}}})
        plain = re.compile(rule[2:] if rule[:2] in ("+:", "-:") else rule)
        for name in [*names, "lm_head", "transformer.h.0.mlp.w1"]:
            assert (own.rule_of(name) is not None) == bool(plain.match(name)), (rule, name)


@pytest.mark.parametrize("name", ["line.txt", "line.json", "line.jsonl"])
def test_a_line_of_100_megabytes(tmp_path: Path, name: str) -> None:
    """In a process of its own: seconds, and memory of a few times the file's size."""
    file = tmp_path / name
    with file.open("w") as out:
        out.write('{"text": "' if "json" in name else "")
        for _ in range(1000):
            out.write("some words of the line, " * 4200)
        out.write('"}\n' if "json" in name else "")
    code = (
        "import sys, time\n"
        "from qquant.calibration.sources import read_source\n"
        "start = time.process_time()\n"
        "documents = read_source(sys.argv[1]).documents\n"
        "status = open('/proc/self/status').read()\n"  # ru_maxrss would begin at the parent's
        "peak = int(status.partition('VmHWM:')[2].split()[0])\n"
        "print(len(documents), time.process_time() - start, peak >> 10, 'torch' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(qquant.__file__).parents[1])}
    words = [sys.executable, "-c", code, str(file)]
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) > 5000 and said[3] == "False"
    assert float(said[1]) < 20 and int(said[2]) < 8 * 100, said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gzip.compress(b"a b " * 1_000_000), "too large"),
        (gzip.compress(b"a b ") + gzip.compress(b"a b " * 1_000_000), "too large"),
        (b"a b " * 1_000_000, "too large"),
        (gzip.compress(b"a b " * 1000, mtime=0)[:-9], "damaged gzip"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"text": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'[{"text": "half \\ud83d"}]', "half a surrogate pair"),
        (b'[{"instruction": "a", "output": "b", "history": 5}]', "'history' is no list"),
        (b'[{"conversations": [{"from": "' + b"x" * 10**6 + b'", "value": "y"}]}]', "unknown"),
    ],
)
def test_calibration_bombs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, said: str
) -> None:
    monkeypatch.setattr(sources, "MOST_BYTES", 3_000_000)
    (tmp_path / "bomb.json").write_bytes(data)
    with pytest.raises(CalibrationError, match=f"bomb.json.*{said}") as caught:
        read_source(str(tmp_path / "bomb.json"))
    assert len(str(caught.value)) < 3000


def test_members_of_gzip_follow_one_another(tmp_path: Path) -> None:
    file = tmp_path / "two.txt.gz"
    file.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two") + b"\0" * 100)
    assert read_source(str(file)).documents[0].text == "one two"


def test_devices_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="device"):
        read_source("/dev/zero")
    read, write = os.pipe()
    os.write(write, b"Text through a pipe.")
    os.close(write)
    assert read_source(f"/dev/fd/{read}").documents[0].text == "Text through a pipe."
    os.close(read)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"QUJD " + b"9" * 5000, "longer than 4096 bytes"),
        (b"QUJD 99999999999", "whole number"),
        (b"A" * (1 << 20) + b" 266", "longer than 4096 bytes"),
    ],
)
def test_ranks_of_any_size(tmp_path: Path, line: bytes, said: str) -> None:
    good = write_ranks(tmp_path / "good").read_bytes()
    bad = tmp_path / "bad"
    bad.write_bytes(good + line + b"\n")
    with pytest.raises(ValueError, match=f"bad, line 267: .*{said}"):
        load_ranks(bad)
    bad.write_bytes(line)
    with pytest.raises(ValueError, match=f"line 1: .*{said}"):
        load_extra_ranks(bad, {})


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_panics(native: Path) -> None:
    """In the tokenizers library, on loading or on the text; that is no `Exception` in Python."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    write_tokenizer(native)
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    change(native / "tokenizer.json", normalizer=charsmap)
    with pytest.raises(CheckpointError, match=r"tokenizer of source.*charsmap"):
        quantize(native, native.parent / "target", FAST, device="cpu")
    made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a)*$"), "isolated")
    with (
        pytest.raises(CheckpointError, match=r"this tokenizer.*retry-limit"),
        tokenizer_errors("this tokenizer"),
    ):
        made.encode("a" * 60 + "b")
    with pytest.raises(KeyboardInterrupt), tokenizer_errors("this tokenizer"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (QuantSpec, {"damp": "0.1"}),
        (QuantSpec, {"sweeps": 1.5}),
        (QuantSpec, {"bits": 4.0}),
        (QuantSpec, {"sym": "no"}),
        (QuantSpec, {"bit_choices": 3}),
        (QuantSpec, {"bit_choices": [3, "4"]}),
        (QuantSpec, {"block_size": 10**30}),
        (CalibrationSpec, {"sources": "builtin"}),
        (CalibrationSpec, {"samples": None}),
        (CalibrationSpec, {"samples": True}),
        (OutputSpec, {"shard_size": "2GB"}),
    ],
)
def test_settings_of_the_wrong_kind(kind: type[Any], values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(SpecError, match=name):
        kind(**values)


def test_lists_from_json_are_tuples() -> None:
    assert QuantSpec(bit_choices=[4, 8]) == QuantSpec(bit_choices=(4, 8))  # type: ignore[arg-type]
    assert CalibrationSpec(sources=["a"]).sources == ("a",)  # type: ignore[arg-type]


def test_names_in_files_cannot_command_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "\x1b[2J\x07"}))
    save_file({"\x1b[31mred\u202e": torch.ones(1)}, tmp_path / "model.safetensors")
    for text in (verify(tmp_path).render(), inspect(tmp_path).render()):
        assert text.replace("\n", "").isprintable()


def test_the_group_size_of_a_file_decides_no_memory(gptq: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(gptq, tmp_path / "made"))
    for size in (10**12, 1 << 20):
        for name in ("config.json", "quantize_config.json"):
            values = json.loads((made / name).read_text())
            values.get("quantization_config", values).update(group_size=size, dynamic={})
            (made / name).write_text(json.dumps(values))
        try:
            assert not verify(made, against=gptq.parent / "dense").ok
        except QQuantError as error:
            assert "group_size" in str(error)
    assert Checkpoint.open(made).tensors
