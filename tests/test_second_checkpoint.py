"""The second checkpoint's text is split cleanly, and its training repeats itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


def make_package(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "pack"


def test_documents_are_docstrings_under_their_names(tmp_path: Path) -> None:
    from second_corpus import held_out, read_docs

    long = "It says what it does, at such a length that it is worth keeping in a corpus of text."
    source = f'''"""Module. {long}"""
class A:
    """Class. {long}"""
    def f(self):
        """Short."""
    def g(self):
        """Method. {long}"""
        if True:
            def h():
                """Inner. {long}"""
'''
    # Names that fall on either side, found by the rule itself.
    names = [f"m{i}.py" for i in range(200)]
    kept = next(n for n in names if not held_out(f"pack/{n}"))
    held = next(n for n in names if held_out(f"pack/{n}"))
    twin = f'"""Twin. {long}"""\ndef copied():\n    """Module. {long}"""\n'
    package = make_package(
        tmp_path,
        {
            kept: source,
            held: twin,
            f"tests/{kept}": source,
            "broken.py": "def (",
            "test_x.py": twin,
        },
    )
    corpus = read_docs(roots=[package])
    assert [name for name, _ in corpus.held_out] == [f"pack/{held}"]
    assert [name for name, _ in corpus.train] == [f"pack/{kept}"]
    text, module = corpus.train[0][1], f"pack.{kept[:-3]}"
    assert f"{module}.A\n\nClass. " in text and f"{module}.A.g\n\nMethod. " in text
    assert f"{module}.A.g.h\n\nInner. " in text and "Short." not in text
    # What a held-out file says is not trained on, word for word, wherever else it is written.
    assert "Module. " not in text and "Module. " in corpus.held_out[0][1]
    questions = [turns[0][0] for turns in corpus.chats]
    assert sorted(questions)[0] == f"What is the class {module}.A?"


def test_training_repeats_itself_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole run in a process apart (another hash seed) and one here, broken off after a step."""
    script = [str(ROOT / "scripts" / "train_second.py"), "--tiny", "--work"]
    done = subprocess.run(
        [sys.executable, *script, str(tmp_path / "once")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
    )
    once = json.loads(done.stdout.splitlines()[-1])

    import train_second

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for more in (["--steps", "1"], ["--out", str(tmp_path / "out")]):
            monkeypatch.setattr(sys, "argv", [*script, str(tmp_path / "twice"), *more])
            train_second.main()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    first, twice = map(json.loads, capsys.readouterr().out.splitlines())

    assert (first["steps"], once["steps"]) == (1, 6)
    del once["seconds"], twice["seconds"]
    assert once == {key: twice[key] for key in once}
    states = [load_file(tmp_path / work / "state.safetensors") for work in ("once", "twice")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    # Each step reads other text, so only the whole way down is more than what the text makes.
    assert once["losses"][-1] < first["losses"][0] - 0.1

    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == model.config.eos_token_id
    text = (out / "heldout.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer.encode(text[:2000])) == text[:2000]
    weights = load_file(out / "model" / "model.safetensors")
    trained = states[0]["net.model.embed_tokens.weight"].to(torch.bfloat16)
    assert torch.equal(weights["model.embed_tokens.weight"], trained)
    assert (out / "domain.txt").stat().st_size > 10_000
    measured = json.loads((out / "measured.json").read_text())
    assert measured["windows_sha256"] == once["windows_sha256"]
    assert "seconds" not in measured, "it would differ from run to run"
