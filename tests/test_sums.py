"""`SHA256SUMS` covers every file, is what coreutils reads, and `verify` believes it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from test_convert import SPEC, make

from qquant import quantize
from qquant.config import QuantSpec
from qquant.errors import CheckpointError
from qquant.sums import NAME, read_sums, write_sums
from qquant.verify import verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sums")
    spec = QuantSpec(method="rtn", group_size=SPEC.group_size)
    return quantize(make("qwen", root / "src"), root / "dst", spec, device="cpu").path


def test_every_file_is_covered(exported: Path) -> None:
    files = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    assert set(read_sums(exported)) == files - {NAME}
    assert "qquant_manifest.json" in files and "README.md" in files


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_coreutils_agrees(exported: Path) -> None:
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", NAME], cwd=exported, check=True)


def copy_of(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "qquant_manifest.json", "config.json"])
def test_a_changed_file_is_found(exported: Path, tmp_path: Path, name: str) -> None:
    assert verify(exported).ok
    copy = copy_of(exported, tmp_path)
    with (copy / name).open("a") as file:
        file.write("\n")
    report = verify(copy)
    assert [p for p in report.problems if p.key.startswith(name) and NAME in p.key]


def test_an_edited_card_is_only_remarked_on(exported: Path, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    (copy / "README.md").write_text("mine")
    report = verify(copy)
    assert report.ok and any("README.md" in p.key for p in report.warnings)


def test_a_missing_file_is_found(exported: Path, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    (copy / "generation_config.json").unlink()
    assert any("generation_config.json" in p.key for p in verify(copy).problems)


@pytest.mark.parametrize(
    "text",
    [
        "no hash here\n",
        "0" * 63 + "  config.json\n",
        "0" * 64 + "  config.json\n" + "0" * 64 + "  config.json\n",
        "0" * 64 + "\n",
        "\udcff",
    ],
)
def test_what_is_no_list_of_hashes_is_named(exported: Path, tmp_path: Path, text: str) -> None:
    copy = copy_of(exported, tmp_path)
    (copy / NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=NAME):
        read_sums(copy)
    assert not verify(copy).ok


def test_names_that_lead_outside_are_not_followed(exported: Path, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    (tmp_path / "secret").write_text("x")
    with (copy / NAME).open("a") as file:
        file.write("0" * 64 + "  ../secret\n")
    assert any("../secret" in p.key for p in verify(copy).problems)


def test_hashes_taken_before_are_not_taken_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_sums(tmp_path, {"a": "f" * 64})
    assert read_sums(tmp_path) == {"a": "f" * 64}
