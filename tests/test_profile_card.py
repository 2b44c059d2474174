"""`qquant card`: tables and results go in, everything else stays, `verify` is content."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from made_profile import INT4, INT8, REFERENCE, made_profile
from test_convert import SPEC, make

from qquant import profile_card, quantize
from qquant.card_results import with_results
from qquant.cli import cli
from qquant.config import QuantSpec
from qquant.directory import sha256_file
from qquant.errors import InputError
from qquant.parts.base import Model
from qquant.profile_card import link_tree, with_section
from qquant.publish import WorkDir
from qquant.reporting import png
from qquant.sums import read_sums
from qquant.verify import verify

BEGIN, END = profile_card.BEGIN, profile_card.END


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    spec = QuantSpec(method="rtn", group_size=SPEC.group_size)
    return quantize(make("qwen", root / "src"), root / INT4, spec, device="cpu").path


@pytest.fixture
def directory(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / INT4))


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What they show is tested elsewhere."""
    if request.node.name != "test_pictures_are_real":
        monkeypatch.setattr(png, "draw", lambda chart: b"PNG of " + chart.name.encode())


def profile_of(directory: Path, blocks: int = 2) -> dict[str, Any]:
    """The made profile as if its Int4 were this directory."""
    found = made_profile(blocks)
    load = found["models"][INT4]["load"]
    load["weights"] = {p.name: sha256_file(p) for p in directory.glob("*.safetensors")}
    load["file_bytes"] = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    return found


def run(directory: Path, found: dict[str, Any], *words: str) -> Result:
    path = directory.parent / "profile.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return CliRunner().invoke(cli, ["card", str(directory), "--profile", str(path), *words])


def tree(directory: Path) -> dict[str, bytes]:
    files = [p for p in directory.rglob("*") if p.is_file()]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


def test_tables_charts_and_results_are_in_the_card(directory: Path) -> None:
    before, identity = tree(directory), Model(str(directory)).identity()
    result = run(directory, profile_of(directory))
    assert result.exit_code == 0, result.output
    assert Model(str(directory)).identity() == identity  # what was measured of it still holds
    text = (directory / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(END) < text.index("## How to make it again")
    for part in ("55.1 ± 0.4", "not told from noise", "![layers chart](profile/layers.png)"):
        assert part in text
    assert INT8 not in text  # another model's figures are its own card's
    names = {"accuracy.png", "speed.png", "memory.png", "layers.png", "profile.json"}
    assert {p.name for p in (directory / "profile").iterdir()} == names
    kept = json.loads((directory / "profile" / "profile.json").read_text())
    assert set(kept["models"]) == {REFERENCE, INT4}
    changed = {n for n, content in tree(directory).items() if before.get(n) != content}
    assert changed == {f"profile/{n}" for n in names} | {
        *("README.md", "SHA256SUMS", "qquant_manifest.json")
    }
    assert before.keys() <= tree(directory).keys()


def test_verify_is_clean_before_and_after(directory: Path) -> None:
    for found in (profile_of(directory), profile_of(directory, 3)):
        assert run(directory, found).exit_code == 0
        report = verify(directory)
        assert report.ok and not report.warnings
        assert "profile/accuracy.png" in read_sums(directory)
        manifest = json.loads((directory / "qquant_manifest.json").read_text())
        assert "profile/accuracy.png" in manifest["files"]
    (directory / "profile" / "accuracy.png").write_bytes(b"another")
    assert any("accuracy.png" in p.key for p in verify(directory).problems)


def test_results_are_in_the_form_of_the_hub(directory: Path) -> None:
    run(directory, profile_of(directory))
    card = ModelCard.load(directory / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.model_name == INT4 and card.data.eval_results is not None
    found = {(r.dataset_type, r.metric_type): r for r in card.data.eval_results}
    mmlu = found["cais/mmlu", "accuracy"]
    assert mmlu.task_type == "text-generation" and mmlu.metric_value == 55.1
    assert mmlu.metric_args["standard_error"] == pytest.approx(0.4197, abs=1e-3)
    assert mmlu.metric_args["lost_against_the_original"] == pytest.approx(0.7)
    assert "0-shot" in str(mmlu.metric_name)
    assert found["wiki.txt", "kl_divergence"].metric_value == pytest.approx(0.01353)
    assert found["openai/openai_humaneval", "pass@1"].metric_value == 29.9


def test_twice_is_once(directory: Path) -> None:
    found = profile_of(directory)
    assert run(directory, found).exit_code == 0
    first, inode = tree(directory), directory.stat().st_ino
    again = run(directory, found)
    assert again.exit_code == 0 and "nothing to change" in again.stdout
    assert tree(directory) == first and directory.stat().st_ino == inode


def test_a_newer_profile_replaces_the_older(directory: Path) -> None:
    run(directory, profile_of(directory))
    newer = profile_of(directory)
    for model in newer["models"].values():
        del model["speed"]
    newer["models"][INT4]["tasks"]["mmlu"]["score"][0] = 0.77
    assert run(directory, newer).exit_code == 0
    text = (directory / "README.md").read_text()
    assert "77.0 ±" in text and "55.1 ±" not in text and text.count(BEGIN) == 1
    assert not (directory / "profile" / "speed.png").exists()
    assert "profile/speed.png" not in read_sums(directory)
    assert verify(directory).ok and not verify(directory).warnings


def test_what_is_not_of_this_model_stays_out_and_other_pictures_stay(directory: Path) -> None:
    found = profile_of(directory)
    found["aside"] = {INT8: copy.deepcopy(found["models"][INT8])}
    found["failed"] = [{"model": m, "part": "x", "error": f"of {m}"} for m in (INT8, INT4)]
    (directory / "profile").mkdir()
    (directory / "profile" / "mine.png").write_bytes(b"mine")
    assert run(directory, found).exit_code == 0
    text = (directory / "profile" / "profile.json").read_text()
    assert INT8 not in text and json.loads(text)["failed"] == [found["failed"][1]]
    assert (directory / "profile" / "mine.png").read_bytes() == b"mine"


def test_hand_written_text_is_kept(directory: Path) -> None:
    path = directory / "README.md"
    run(directory, profile_of(directory))
    text = path.read_text()
    text = text.replace("license:", "# chosen by a person\nlanguage: [en, zh]\nlicense:", 1)
    text = text.replace("## How to load it", "My own words, $x$ \\1 {0}.\n\n## How to load it")
    text += "\n## Afterword\n\nMine, too.\n"
    path.write_text(text)
    assert run(directory, profile_of(directory, 3)).exit_code == 0
    kept = path.read_text()
    for part in ("# chosen by a person\nlanguage: [en, zh]\n", "My own words, $x$ \\1 {0}.\n"):
        assert part in kept
    assert kept.endswith("\n## Afterword\n\nMine, too.\n")
    cut = (kept[: kept.index(BEGIN)], kept[kept.index(END) :])
    old = (text[: text.index(BEGIN)], text[text.index(END) :])
    assert cut == old
    assert verify(directory).ok and not verify(directory).warnings


FOREIGN = """- name: theirs
  results:
  - task:
      type: text-generation
    dataset:
      type: arc
      name: ARC
    metrics:
    - type: acc
      value: 0.5
"""


@pytest.mark.parametrize("indent", ["", "  "])
def test_results_of_others_are_kept(directory: Path, indent: str) -> None:
    path = directory / "README.md"
    theirs = "".join(f"{indent}{line}\n" for line in FOREIGN.splitlines())
    path.write_text(path.read_text().replace("tags:", f"model-index:\n{theirs}tags:", 1))
    for blocks in (2, 3):
        assert run(directory, profile_of(directory, blocks)).exit_code == 0
    data = yaml.safe_load(path.read_text().split("---\n")[1])
    assert [element["name"] for element in data["model-index"]] == ["theirs", INT4]
    results = model_index_to_eval_results(data["model-index"])[1]
    assert results[0].dataset_type == "arc" and len(results) == 11
    assert theirs in path.read_text() and "gptq" in data["tags"]


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ("---\nmodel-index: {a: 1}\n---\n", "front matter"),
        ("---\na: [1\n---\n", "front matter"),
        ("---\n# qquant profile: begin\n---\n", "without the other"),
        (f"---\na: 1\n---\n{END}\n", "without the other"),
    ],
)
def test_a_card_that_cannot_be_added_to_is_refused(directory: Path, front: str, words: str) -> None:
    (directory / "README.md").write_text(front)
    before = tree(directory)
    result = run(directory, profile_of(directory))
    assert result.exit_code == 2 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert tree(directory) == before


def test_a_card_without_front_matter_or_none_at_all(directory: Path) -> None:
    found = profile_of(directory)
    (directory / "README.md").write_text("# Mine\n")
    assert run(directory, found).exit_code == 0
    text = (directory / "README.md").read_text()
    assert text.startswith("---\nbase_model_relation: quantized\n") and "\n# Mine\n" in text
    (directory / "README.md").unlink()
    assert run(directory, found).exit_code == 0
    assert ModelCard.load(directory / "README.md").data.eval_results


def test_a_profile_of_other_weights_is_refused(directory: Path) -> None:
    before = tree(directory)
    found = profile_of(directory)
    (shard,) = found["models"][INT4]["load"]["weights"]
    found["models"][INT4]["load"]["weights"][shard] = "0" * 64
    for words in ((), ("--name", INT4)):
        result = run(directory, found, *words)
        assert result.exit_code == 2 and f"{INT4}: SHA-256 of {shard}" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    del found["models"][INT4]["load"]["weights"]
    assert run(directory, found).exit_code == 0  # sizes are all there is to go by
    found["models"][INT4]["load"]["file_bytes"] += 1
    assert "bytes of weights, here" in run(directory, found).stderr
    assert run(directory, found, "--name", "nobody").exit_code == 2
    shutil.rmtree(directory / "profile")
    assert before["model.safetensors"] == tree(directory)["model.safetensors"]


def test_the_model_is_found_by_its_weights(directory: Path) -> None:
    found = profile_of(directory)
    found["models"]["another name"] = found["models"].pop(INT4)
    result = run(directory, found, "--json")
    assert json.loads(result.stdout)["model"] == "another name"
    found["models"]["a third"] = copy.deepcopy(found["models"]["another name"])
    assert "--name" in run(directory, found).stderr
    assert run(directory, found, "--name", "a third").exit_code == 0


def test_killed_on_the_way_the_directory_is_the_old_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(directory)

    def stop(self: WorkDir) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkDir, "publish", stop)
        assert run(directory, profile_of(directory)).exit_code == 130
    assert tree(directory) == before and verify(directory).ok
    assert sorted(os.listdir(directory.parent)) == [INT4, "profile.json"]


def test_large_files_are_linked_not_copied(directory: Path, tmp_path: Path) -> None:
    inode = (directory / "model.safetensors").stat().st_ino
    (directory / ".cache").mkdir()
    (directory / ".cache" / "kept").write_text("x")
    (directory / "link").symlink_to("config.json")
    run(directory, profile_of(directory))
    assert (directory / "model.safetensors").stat().st_ino == inode
    assert (directory / ".cache" / "kept").read_text() == "x"
    assert os.readlink(directory / "link") == "config.json"


def test_without_hard_links_files_are_copied(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", none)
    (tmp_path / "copy").mkdir()
    link_tree(directory, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(directory)


def test_names_in_a_card_are_text(directory: Path) -> None:
    found = profile_of(directory)
    found["models"][INT4]["tasks"]["<img src=x>|`"] = found["models"][INT4]["tasks"].pop("gsm8k")
    assert run(directory, found).exit_code == 0
    text = (directory / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    assert "<img" not in body.replace("\\<img", "")
    with pytest.raises(InputError):
        with_section(f"{END}\n{BEGIN}\n", "x")
    assert with_results("# A\n", {"models": {"m": {}}}, "m", "t").count("model-index") == 0


@pytest.mark.skipif(not png.available(), reason="needs the extra `plots`")
def test_pictures_are_real(directory: Path) -> None:
    assert run(directory, profile_of(directory)).exit_code == 0
    for picture in (directory / "profile").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG\r\n")
