"""The Auto classes: after `register()` without remote code, and by remote code without qquant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qwen_tiny import tiny_model, write_checkpoint, write_ranks
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from qquant.models import AUTO_MAP, TOKENIZER_AUTO_MAP, export_files, register
from qquant.models.qwen.configuration_qwen import QWenConfig
from qquant.models.qwen.modeling_qwen import QWenLMHeadModel, QWenModel
from qquant.models.qwen.tokenization_qwen import QWenTokenizer

REMOTE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qquant":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
try:
    import qquant
except ImportError:
    pass
else:
    raise SystemExit("the block does not work")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer)
torch.manual_seed(0)
response, history = model.chat(tokenizer, "Hi", history=None)
assert isinstance(response, str) and history == [("Hi", response)]
stream = list(model.chat_stream(tokenizer, "Hi", history=history, do_sample=False))
torch.save(model(torch.arange(40)[None]).logits.detach(), sys.argv[2] + "/logits.pt")
model.save_pretrained(sys.argv[2] + "/again")
tokenizer.save_pretrained(sys.argv[2] + "/again")
again = AutoModelForCausalLM.from_pretrained(sys.argv[2] + "/again", trust_remote_code=True)
assert torch.equal(again.lm_head.weight, model.lm_head.weight)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2] + "/again", trust_remote_code=True)
assert tokenizer.encode("<|im_end|>") == [tokenizer.im_end_id]
assert not any(name.partition(".")[0] == "qquant" for name in sys.modules)
print("ok", len(stream))
"""


def test_register_needs_no_remote_code(tmp_path: Path) -> None:
    """Also where auto_map points to code that cannot run: it is not looked at."""
    path = write_checkpoint(tmp_path, code=False)
    for name in export_files():
        (path / name).write_text("raise RuntimeError('remote code ran')")
    register()
    register()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert type(AutoConfig.from_pretrained(path)) is QWenConfig
    assert type(AutoModel.from_pretrained(path)) is QWenModel
    assert type(model) is QWenLMHeadModel and type(tokenizer) is QWenTokenizer
    response, _ = model.eval().chat(tokenizer, "Hi", history=None)
    assert isinstance(response, str)
    assert model.generation_config.max_window_size == 400
    # `trust_remote_code=True` keeps our model too; precision arguments arrive
    half = AutoModelForCausalLM.from_pretrained(path, bf16=True, trust_remote_code=True)
    assert type(half) is QWenLMHeadModel and half.dtype == torch.bfloat16 and half.config.bf16
    assert AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16).config.fp16
    assert (
        AutoModelForCausalLM.from_config(QWenConfig.from_pretrained(path)).config.vocab_size == 512
    )


def test_saved_after_register_carries_its_code(tmp_path: Path) -> None:
    register()
    tiny_model().save_pretrained(tmp_path / "saved")
    QWenTokenizer(write_ranks(tmp_path / "r")).save_pretrained(tmp_path / "saved")
    for name, source in export_files().items():
        assert (tmp_path / "saved" / name).read_bytes() == source.read_bytes()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == AUTO_MAP
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["auto_map"] == TOKENIZER_AUTO_MAP


def test_tokenizer_config_without_a_class_is_enough(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, code=False)
    (path / "tokenizer_config.json").unlink()
    register()
    assert type(AutoTokenizer.from_pretrained(path)) is QWenTokenizer


def test_exported_directory_works_without_qquant(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "exported")
    env = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", REMOTE, str(path), str(tmp_path)]
    run = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ok")
    ours = QWenLMHeadModel.from_pretrained(path).eval()
    with torch.no_grad():
        expected = ours(torch.arange(40)[None]).logits
    assert torch.allclose(
        torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-5
    )


def test_export_names_match_the_auto_maps() -> None:
    files = export_files()
    assert all(path.is_file() and path.name == name for name, path in files.items())
    targets = [*AUTO_MAP.values(), *(t for t in TOKENIZER_AUTO_MAP["AutoTokenizer"] if t)]
    for target in targets:
        module, _, cls = target.partition(".")
        assert f"class {cls}(" in files[f"{module}.py"].read_text()


@pytest.mark.parametrize("name", sorted(export_files()))
def test_travelling_files_import_only_what_is_there(name: str) -> None:
    """torch, transformers, tiktoken, the standard library and each other."""
    import ast

    for node in ast.walk(ast.parse(export_files()[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in export_files()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for imported in names:
                top = str(imported).partition(".")[0]
                assert (
                    top in {"torch", "transformers", "tiktoken"} or top in sys.stdlib_module_names
                )


def test_importing_models_is_light() -> None:
    code = "import sys, qquant.models; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60
    )
