"""`qquant push` against a stand-in for the hub: what goes, what never goes, and going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from hub_stand_in import LARGE, READER, WRITER, Hub
from test_convert import SPEC, make

from qquant import quantize
from qquant.cli import cli
from qquant.config import QuantSpec
from qquant.directory import sha256_file

# huggingface_hub 2.4 sends bytes in a way that its HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/Tiny-Int4"
WORK = (
    *(".qquant-work/out/a", ".states-x/h.bin", ".cache/huggingface/upload/a.lock", ".git/config"),
    *("sub/.hidden", "__pycache__/modeling_qwen.cpython-311.pyc"),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with several large files, and with everything that must not go."""
    root = tmp_path_factory.mktemp("push")
    spec = QuantSpec(method="rtn", group_size=SPEC.group_size)
    path = quantize(make("qwen", root / "src"), root / "Tiny-Int4", spec, device="cpu").path
    for name in WORK:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("work")
    assert len(large(path)) >= 3
    return path


def large(path: Path) -> set[str]:
    """Hashes of the files that the hub takes one by one."""
    files = [path / name for name in expected(path)]
    return {sha256_file(file) for file in files if file.stat().st_size >= LARGE}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, in place of the real hub; retries do not wait."""
    with Hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield running


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["push", *map(str, words)])


def expected(path: Path) -> dict[str, bytes]:
    files = [p for p in path.rglob("*") if p.is_file()]
    named = {p.relative_to(path).as_posix(): p.read_bytes() for p in files}
    return {name: content for name, content in named.items() if name not in WORK}


def refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.stderr
    assert "Traceback" not in result.output
    assert WRITER not in result.output and READER not in result.output


def test_everything_goes_and_no_work_files(exported: Path, hub: Hub) -> None:
    result = run(exported, REPO, "--create", "--private")
    assert result.exit_code == 0, result.output
    assert hub.content(REPO) == expected(exported)
    assert hub.repos[REPO]["public"] is False
    assert result.stdout.strip().startswith(f"{hub.url}/{REPO}/commit/")
    assert sum("/commit/" in path for path in hub.asked) == 1  # all visible at once
    assert WRITER not in result.output


def test_after_an_interruption_only_the_rest_is_sent(exported: Path, hub: Hub) -> None:
    hub.cut_after = 1
    refused(run(exported, REPO, "--create"), 1, "not sent again")
    assert hub.content(REPO) == {}  # nothing of half a model can be seen
    first = list(hub.sent)
    assert len(first) == 1
    hub.cut_after = None
    assert run(exported, REPO, "--create").exit_code == 0
    assert sorted(hub.sent) == sorted(large(exported)) and hub.sent[0] == first[0]
    assert hub.content(REPO) == expected(exported)
    before = len(hub.sent)
    assert run(exported, REPO).exit_code == 0 and len(hub.sent) == before


def test_a_branch_of_its_own(exported: Path, hub: Hub) -> None:
    assert run(exported, REPO, "--create", "--revision", "v2").exit_code == 0
    assert hub.content(REPO) == {} and hub.content(REPO, "v2") == expected(exported)
    refused(run(exported, REPO, "--revision", "v3"), 2, "v3", "--create")


def test_what_an_earlier_upload_left_is_not_read_instead(exported: Path, hub: Hub) -> None:
    """A branch begins with main's files; another number of shards has other names."""
    assert run(exported, REPO, "--create").exit_code == 0
    mine = {"notes.md": b"mine", "lora/model.safetensors": b"mine"}
    mine |= {"adapter_model.safetensors": b"mine", "adapter_config.json": b"mine"}
    stale = (
        "model.safetensors",
        "model-00001-of-00009.safetensors",
        "pytorch_model.bin.index.json",
    )
    old = {name: b"old" for name in (*stale, "pytorch_model-00001-of-00002.bin")} | mine
    hub.repos[REPO]["branches"]["main"] |= {
        n: c for n, c in old.items() if n not in expected(exported)
    }
    left = {n for n in old if n not in mine} - set(expected(exported))
    assert len(left) >= 3
    result = run(exported, REPO, "--create", "--revision", "v2")
    assert result.exit_code == 0, result.output
    assert hub.content(REPO, "v2") == expected(exported) | mine
    assert all(name in result.stderr for name in left)
    assert left <= set(hub.content(REPO))  # main is as it was


def test_weights_of_somebody_else_are_taken_away_only_when_told(exported: Path, hub: Hub) -> None:
    old = {"model-00001-of-00009.safetensors": b"old", "notes.md": b"old"}
    hub.repos[REPO] = {"public": True, "branches": {"main": dict(old)}}
    refused(run(exported, REPO), 2, "model-00001-of-00009.safetensors", "--overwrite")
    assert hub.content(REPO) == old and hub.sent == []
    assert run(exported, REPO, "--overwrite").exit_code == 0
    assert hub.content(REPO) == expected(exported) | {"notes.md": b"old"}


def test_private_is_not_said_of_a_public_repository(exported: Path, hub: Hub) -> None:
    assert run(exported, REPO, "--create", "--private").exit_code == 0
    assert run(exported, REPO, "--create", "--private").exit_code == 0  # it is private
    hub.repos[REPO] = {"public": True, "branches": {"main": {}}}
    refused(run(exported, REPO, "--create", "--private"), 2, "--private", "public")
    assert hub.content(REPO) == {}


def test_a_dry_run_shows_every_file_and_touches_nothing(
    exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    shown = run(exported, REPO, "--dry-run")
    assert shown.exit_code == 0 and hub.asked == []
    table = shown.stdout.splitlines()[2:]
    rows = [line.split()[0] for line in table[: table.index("")]]
    assert rows == sorted(expected(exported))
    assert ".cache" in shown.stdout.splitlines()[-2]
    found = json.loads(run(exported, REPO, "--dry-run", "--json").stdout)
    assert {f["name"]: f["bytes"] for f in found["files"]} == {
        name: len(content) for name, content in expected(exported).items()
    }
    assert found["bytes"] == sum(map(len, expected(exported).values()))
    assert set(found["left_out"]) == {
        *(".cache", ".git", ".qquant-work", ".states-x", "__pycache__", "sub/.hidden")
    }


@pytest.mark.parametrize(
    ("token", "create", "code", "words"),
    [
        ("hf_unknown", True, 2, ("401", "hf auth login")),
        (READER, True, 2, ("403", "write")),
        (WRITER, False, 2, ("404", "--create")),
        (None, True, 2, ("token", "hf auth login")),
    ],
)
def test_refusals_of_the_hub_have_a_cure(
    exported: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    create: bool,
    code: int,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: token)
    refused(run(exported, REPO, *(["--create"] if create else [])), code, *words)
    assert hub.sent == []


def test_no_network(exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    refused(run(exported, REPO), 1, "a connection")


def test_a_damaged_directory_is_not_sent(exported: Path, hub: Hub, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for more in ([], ["--dry-run"]):
        refused(run(copy, REPO, *more), 1, shard.name, "qquant verify")
    assert hub.asked == []


def test_bad_input_is_refused(exported: Path, tmp_path: Path) -> None:
    refused(run(exported, "no-namespace"), 2, "NAMESPACE/NAME")
    refused(run(exported, "a/b/c"), 2, "NAMESPACE/NAME")
    refused(run(tmp_path / "nowhere", REPO), 2, "nowhere")
    refused(run(exported, REPO, "--private"), 2, "--create")
    for branch in ("a b", "", "-x", "a..b", "x.lock", "/x", "x/", "a:b"):
        refused(run(exported, REPO, "--dry-run", f"--revision={branch}"), 2, "a name of a branch")


def test_a_link_out_of_the_directory_is_refused(exported: Path, tmp_path: Path) -> None:
    copy: Any = Path(shutil.copytree(exported, tmp_path / "copy"))
    (tmp_path / "secret").write_text("x")
    (copy / "notes.txt").symlink_to(tmp_path / "secret")
    refused(run(copy, REPO, "--dry-run"), 2, "notes.txt", "link")
