"""Served directories answer a real `openai` client: whole, streamed, stopped; and in a terminal.

Two servers, each a process of its own: `qquant serve` with an original Qwen that qquant quantized,
and `transformers serve` with a native Qwen2 one. Both models say one known text that ends in
`<|im_end|>` (`scripted.py`).
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from qwen_tiny import N_RANKS, write_checkpoint, write_ranks
from scripted import SAYS, calibration_ids, write_scripted_qwen, write_scripted_qwen2
from test_mixtures import source as mixture

from qquant import OutputSpec, QuantSpec
from qquant.cli import cli
from qquant.convert import quantize
from qquant.models.qwen.tokenization_qwen import QWenTokenizer
from qquant.serving import rust_decoder, serve, served_model

NEEDED = ("fastapi", "uvicorn", "openai", "gptqmodel", "optimum")
MISSING = [name for name in NEEDED if find_spec(name) is None]
served = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'qquant[serve,readers]'"
)
HI = [{"role": "user", "content": "Hi"}]


class Server:
    """A running server: where it is, what it serves, and what it printed."""

    def __init__(self, command: list[str], model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.model, self.url, self.log = str(model), f"http://localhost:{port}", log
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(log.parent / "hf"),
            "GPTQMODEL_CPU_WORKERS": "2",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, self.model, "--port", str(port)], env=env, stdout=out, stderr=out
            )

    def wait(self, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                    assert json.load(answer)["status"] == "ok"
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    root = tmp_path_factory.mktemp("serving")
    spec = QuantSpec(group_size=32)
    made = {}
    for name, source in (
        ("qwen", write_scripted_qwen(root / "source-qwen")),
        ("qwen2", write_scripted_qwen2(root / "source-qwen2")),
    ):
        made[name] = root / f"{name}-int4"
        quantize(source, made[name], spec, tokens=calibration_ids(), device="cpu")
    python = [sys.executable, "-m"]
    plain = [*python, "transformers.cli.transformers", "serve", "--device", "cpu"]
    found = {
        "qwen": Server([*python, "qquant", "serve"], made["qwen"], root / "qwen.log"),
        "qwen2": Server(plain, made["qwen2"], root / "qwen2.log"),
    }
    try:
        for server in found.values():
            server.wait()
        yield found
    finally:
        for server in found.values():
            server.process.terminate()
            try:
                server.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.process.kill()
                raise


@served
@pytest.mark.parametrize("name", ["qwen", "qwen2"])
def test_a_chat_ends_with_the_message(servers: dict[str, Server], name: str) -> None:
    server = servers[name]
    found = server.client().chat.completions.create(model=server.model, messages=HI)
    assert found.choices[0].message.content == SAYS
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 40


@served
@pytest.mark.parametrize("name", ["qwen", "qwen2"])
def test_a_stream_has_whole_characters_only(servers: dict[str, Server], name: str) -> None:
    server = servers[name]
    chunks = list(
        server.client().chat.completions.create(model=server.model, messages=HI, stream=True)
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == SAYS
    assert sum(map(bool, pieces)) > 4, "in pieces, not at once"
    assert any("好" in piece for piece in pieces), "three tokens, never in two pieces"
    assert "\ufffd" not in "".join(pieces)
    assert chunks[-1].choices[0].finish_reason == "stop"


@served
@pytest.mark.parametrize("name", ["qwen", "qwen2"])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_words_end_the_answer(servers: dict[str, Server], name: str, stream: bool) -> None:
    server = servers[name]
    options: dict[str, Any] = {"model": server.model, "messages": HI, "stop": ["ui"]}
    found = server.client().chat.completions.create(**options, stream=stream)
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in found)
        if stream
        else found.choices[0].message.content
    )
    assert text == "Oui", "transformers leaves the stop word in the answer"


@served
@pytest.mark.parametrize("name", ["qwen", "qwen2"])
def test_transformers_chat_works_in_a_terminal(servers: dict[str, Server], name: str) -> None:
    server = servers[name]
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", server.model]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "200"}
        os.environ.pop("HF_HUB_OFFLINE", None)  # offline, its client refuses this machine too
        os.execv(command[0], [*command, server.url, "max_new_tokens=30", "--user", "me"])
    seen = b""

    def shown() -> str:
        """What a person reads: without colours and cursor movements."""
        return re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode(errors="replace")

    ended = False

    def until(text: str | None, seconds: float = 60) -> None:
        """Reads until `text` is shown; None to the end of the process."""
        nonlocal ended, seen
        end = time.monotonic() + seconds
        while (text is None or text not in shown()) and time.monotonic() < end:
            if select.select([terminal], [], [], 0.5)[0]:
                try:
                    seen += os.read(terminal, 65536)
                except OSError:  # the process has ended
                    ended = True
                    break
        assert text is None or text in shown(), shown()[-2000:]

    try:
        until("<me>")
        os.write(terminal, b"Hi\r")
        until(SAYS)
        until("tok/s")
        os.write(terminal, b"!exit\r")
        until(None)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
        os.close(terminal)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0


def test_the_rust_twin_decodes_as_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = QWenTokenizer(write_ranks(tmp_path / "qwen.tiktoken"))
    rust = rust_decoder(tokenizer)
    text = "the user 你好 <|im_start|>\n<|extra_204|> é"
    ids = tokenizer.encode(text)
    assert rust.decode(ids, skip_special_tokens=False) == text
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    assert rust.decode(ids, skip_special_tokens=True) == plain != text
    assert [rust.id_to_token(i) for i in range(N_RANKS, N_RANKS + 3)] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_chat_exports_end_at_the_end_of_a_message(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    for name, change, expected in (
        ("chat", {}, [N_RANKS + 2, N_RANKS]),
        ("base", {"chat_format": "raw"}, N_RANKS),
        ("own", {"eos_token_id": [N_RANKS]}, [N_RANKS]),
    ):
        file = source / "generation_config.json"
        before = json.loads(file.read_text())
        file.write_text(json.dumps(before | change))
        quantize(source, tmp_path / name, QuantSpec(method="rtn", group_size=32), device="cpu")
        after = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert after["eos_token_id"] == expected
        file.write_text(json.dumps(before))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the server was started with, in place of starting it; all packages are there."""
    found: list[list[str]] = []
    module = pytest.importorskip("transformers.cli.transformers")
    monkeypatch.setattr(module, "app", lambda arguments, prog_name: found.append(arguments))
    monkeypatch.setattr("qquant.serving.find_spec", lambda name: object())
    monkeypatch.setattr("qquant.serving.make_known", lambda end: found.append([str(end)]))
    return found


def change(path: Path, **values: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | values).items() if v is not None}))


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


RTN = QuantSpec(method="rtn", group_size=32)


def test_an_original_chat_model_ends_at_the_end_of_a_message(
    tmp_path: Path, started: list[list[str]]
) -> None:
    """As published, unquantized: generation_config.json names the end of the text alone."""
    source = write_checkpoint(tmp_path / "source")
    serve(source, ["--port", "1"])
    assert started == [[str(N_RANKS + 2)], ["serve", str(source), "--port", "1"]]
    model = served_model(N_RANKS + 2).from_pretrained(source)
    assert model.generation_config.eos_token_id == [N_RANKS, N_RANKS + 2]
    assert type(model).__name__ == "QWenLMHeadModel"
    change(source / "generation_config.json", eos_token_id=[N_RANKS + 2, N_RANKS])
    model = served_model(N_RANKS + 2).from_pretrained(source)
    assert model.generation_config.eos_token_id == [N_RANKS + 2, N_RANKS]
    change(source / "generation_config.json", eos_token_id=None)
    model = served_model(N_RANKS + 2).from_pretrained(source)
    assert model.generation_config.eos_token_id == [N_RANKS + 2]
    change(source / "generation_config.json", chat_format="raw")
    started.clear()
    serve(source)
    assert started[0] == ["None"]


def test_without_a_gpu_the_server_is_told_so(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For `auto` gptqmodel takes a kernel for GPUs where torch is built for CUDA."""
    source, path = write_scripted_qwen2(tmp_path / "source"), tmp_path / "int4"
    quantize(source, path, RTN, device="cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    serve(path, ["--port", "1"])
    serve(path, ["--device=auto"])
    serve(source)  # which no kernel is chosen for
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    serve(path)
    more = [arguments[2:] for arguments in started]
    assert more == [["--device", "cpu", "--port", "1"], ["--device=auto"], [], []]


def test_continuous_batching_of_original_qwen_is_refused(
    tmp_path: Path, started: list[list[str]]
) -> None:
    source = write_checkpoint(tmp_path / "source")
    said = refused(str(source), "--continuous-batching")
    assert "use_dynamic_ntk and use_logn_attn false" in said and "convert --to qwen2" in said
    change(source / "config.json", use_dynamic_ntk=False, use_logn_attn=None)
    assert "expected use_logn_attn false" in refused(str(source), "--continuous-batching")
    assert not started
    serve(source, ["--continuous-batching", "--no-continuous-batching"])
    change(source / "config.json", use_logn_attn=False)
    serve(source, ["--continuous-batching"])
    assert [len(arguments) for arguments in started] == [1, 4, 1, 3]


def test_a_path_that_the_server_takes_apart_is_refused(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' server would load what stands before the @."""
    source = write_scripted_qwen2(tmp_path / "model@v2" / "source")
    assert "expected no @ in it" in refused(str(source))
    monkeypatch.chdir(source.parent)
    serve("source")
    assert started == [["serve", "source"]]


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_5_moe_text"])
def test_experts_are_taken_apart_or_refused(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Else transformers would answer from experts as they are made: random."""
    defuser = pytest.importorskip("defuser")
    source, made = mixture(tmp_path / "source", kind), tmp_path / "int4"
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    quantize(source, made, RTN, device="cpu")
    apart: list[str] = []
    monkeypatch.setattr(defuser, "replace_fused_blocks", lambda kind: not apart.append(kind))
    if kind == "qwen3_5_moe_text":
        said = refused(str(made))
        assert "nothing takes the experts of qwen3_5_moe_text apart" in said and not started
        return
    serve(made)
    assert apart == ["qwen2_moe"] and len(started) == 1
    serve(source)
    assert apart == ["qwen2_moe"], "unquantized, transformers puts them together itself"
    monkeypatch.setattr(defuser, "replace_fused_blocks", lambda kind: False)
    assert "expected a defuser that takes them apart" in refused(str(made))


def test_quantized_directories_that_transformers_misreads_are_refused(
    tmp_path: Path, started: list[list[str]]
) -> None:
    source = write_scripted_qwen2(tmp_path / "source")
    quantize(source, tmp_path / "int4", RTN, device="cpu")
    serve(tmp_path / "int4")
    file = tmp_path / "int4" / "config.json"
    quant = json.loads(file.read_text())["quantization_config"]
    change(file, quantization_config=quant | {"dynamic": {"-:model.layers.9": {}}})
    assert "it passes over `dynamic`" in refused(str(tmp_path / "int4"))
    change(file, quantization_config=None)
    assert "got only a file beside it" in refused(str(tmp_path / "int4"))
    spec, packed = replace(RTN, sym=False), OutputSpec(format="compressed-tensors")
    quantize(source, tmp_path / "packed", spec, device="cpu", out=packed)
    assert "packed zero points" in refused(str(tmp_path / "packed"))
    quantize(source, tmp_path / "even", RTN, device="cpu", out=packed)
    serve(tmp_path / "even")
    assert len(started) == 2


@pytest.mark.parametrize("missing", ["openai", "gptqmodel", "compressed_tensors"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    write_checkpoint(tmp_path / "source")
    out = OutputSpec(format="compressed-tensors") if missing.startswith("compressed") else None
    quantize(tmp_path / "source", tmp_path / "int4", RTN, device="cpu", out=out or OutputSpec())
    monkeypatch.setattr(
        "qquant.serving.find_spec", lambda name: None if name == missing else object()
    )
    result = CliRunner().invoke(cli, ["serve", str(tmp_path / "int4")])
    assert result.exit_code == 2
    assert f"no {missing}" in result.output and "pip install" in result.output


def test_a_directory_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    source = write_scripted_qwen2(tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    result = CliRunner().invoke(cli, ["serve", str(source)])
    assert result.exit_code == 2 and "chat template" in result.output


@served
def test_an_option_that_the_server_does_not_have_is_its_to_refuse(tmp_path: Path) -> None:
    source = write_scripted_qwen2(tmp_path / "source")
    command = [sys.executable, "-m", "qquant", "serve", str(source), "--bogus"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--bogus" in done.stderr and "bug in qquant" not in done.stderr
