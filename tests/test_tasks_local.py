"""The original files of benchmarks become the rows that lm-eval expects; what is wrong is told."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from qquant.errors import InputError
from qquant.tasks import local


def test_mmlu(tmp_path: Path) -> None:
    """Without a header; quotes, commas and line ends inside a field."""
    dev = 'What is it?,one,"two, or so","a ""third""",4,C\n'
    test = '"First line\nsecond line",1,2,3,4,A\r\nB?,x,y,z,w,D\n'
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        archive.writestr("data/dev/law_dev.csv", dev)
        archive.writestr("data/test/law_test.csv", test)
        archive.writestr("data/test/other_law_test.csv", "wrong,1,2,3,4,A\n")
    found = local.rows(str(tmp_path), "cais/mmlu", "law")
    assert found == {
        "dev": [
            {
                "question": "What is it?",
                "subject": "law",
                "choices": ["one", "two, or so", 'a "third"', "4"],
                "answer": 2,
            }
        ],
        "test": [
            {
                "question": "First line\nsecond line",
                "subject": "law",
                "choices": ["1", "2", "3", "4"],
                "answer": 0,
            },
            {"question": "B?", "subject": "law", "choices": ["x", "y", "z", "w"], "answer": 3},
        ],
    }
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / "mmlu.zip") as archive:
        archive.extractall(unpacked)
    assert local.rows(str(unpacked), "cais/mmlu", "law") == found


def test_ceval_and_cmmlu(tmp_path: Path) -> None:
    folder = tmp_path / "ceval"
    head = "id,question,A,B,C,D,answer"
    for split, more, end in (("dev", ",explanation", ",因为"), ("val", "", "")):
        (folder / split).mkdir(parents=True)
        text = f"\ufeff{head}{more}\n0,何为____？,甲,乙,丙,丁,B{end}\n"
        (folder / split / f"law_{split}.csv").write_text(text, encoding="utf-8")
    found = local.rows(str(tmp_path), "ceval/ceval-exam", "law")
    row = {"id": 0, "question": "何为____？", "A": "甲", "B": "乙", "C": "丙", "D": "丁"}
    assert found == {
        "dev": [row | {"answer": "B", "explanation": "因为"}],
        "val": [row | {"answer": "B", "explanation": ""}],
    }
    for split in ("dev", "test"):
        (tmp_path / "cmmlu" / split).mkdir(parents=True)
        text = ",Question,A,B,C,D,Answer\n0,何为？,甲,乙,丙,丁,D\n"
        (tmp_path / "cmmlu" / split / "law.csv").write_text(text, encoding="utf-8")
    row = {"Question": "何为？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "D"}
    assert local.rows(str(tmp_path), "haonan-li/cmmlu", "law") == {"dev": [row], "test": [row]}


def test_gsm8k_and_humaneval(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    row = {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n\n")
    packed = gzip.compress((json.dumps(row | {"more": 1}) + "\n").encode())
    (tmp_path / "gsm8k" / "train.jsonl.gz").write_bytes(packed)
    assert local.rows(str(tmp_path), "openai/gsm8k", "main") == {"train": [row], "test": [row]}
    code = {"task_id": "x/0", "prompt": "def f():\n", "canonical_solution": "    pass\n"}
    code |= {"test": "def check(f):\n    f()\n", "entry_point": "f"}
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(code) + "\n")
    found = local.rows(str(tmp_path), "openai/openai_humaneval", "openai_humaneval")
    assert found == {"test": [code]}


def test_what_is_missing_or_broken_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mmlu\.zip.*no questions of the split dev.*hub"):
        local.rows(str(tmp_path), "cais/mmlu", "law")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "law_dev.csv").write_text("Q?,1,2,3,A\n")
    with pytest.raises(InputError, match=r"law_dev\.csv, row 1.*four choices"):
        local.rows(str(tmp_path), "cais/mmlu", "law")
    (tmp_path / "dev" / "law_dev.csv").write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match=r"law_dev\.csv.*UTF-8"):
        local.rows(str(tmp_path), "cais/mmlu", "law")
    (tmp_path / "dev" / "law_dev.csv").write_text("id,question,A,B,C,answer\n")
    with pytest.raises(InputError, match="none called D"):
        local.rows(str(tmp_path), "ceval/ceval-exam", "law")
    (tmp_path / "HumanEval.jsonl").write_text('{"task_id": "x"}\n')
    with pytest.raises(InputError, match=r"HumanEval\.jsonl, line 1"):
        local.rows(str(tmp_path), "openai/openai_humaneval", None)
    (tmp_path / "HumanEval.jsonl").unlink()
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"HumanEval\.jsonl\.gz.*original file"):
        local.rows(str(tmp_path), "openai/openai_humaneval", None)


def test_an_answer_that_is_no_letter_is_not_taken_for_one(tmp_path: Path) -> None:
    for split in ("dev", "val", "test"):
        (tmp_path / split).mkdir()
    for answer in ("", "AB", "E", "a"):
        (tmp_path / "dev" / "law_dev.csv").write_text(f"Q?,1,2,3,4,{answer}\n")
        with pytest.raises(InputError, match=r"law_dev\.csv, row 1.*a letter A to D"):
            local.rows(str(tmp_path), "cais/mmlu", "law")
        text = f"id,question,A,B,C,D,answer\n0,Q?,1,2,3,4,B\n1,Q?,1,2,3,4,{answer}\n"
        (tmp_path / "val" / "law_val.csv").write_text(text)
        (tmp_path / "dev" / "law_dev.csv").write_text(text.replace(f",{answer}\n", ",A\n"))
        with pytest.raises(InputError, match=r"law_val\.csv, row 2.*an answer A to D"):
            local.rows(str(tmp_path), "ceval/ceval-exam", "law")
        text = f"Question,A,B,C,D,Answer\nQ?,1,2,3,4,{answer}\n"
        (tmp_path / "test" / "law.csv").write_text(text)
        with pytest.raises(InputError, match=r"law\.csv, row 1.*an answer A to D"):
            local.rows(str(tmp_path), "haonan-li/cmmlu", "law")


def test_lines_are_told_apart_by_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    row = {"question": "One\u2028two?", "answer": "#### 2"}
    for name in ("train", "test"):
        text = json.dumps(row, ensure_ascii=False) + "\r\n"
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_bytes(text.encode())
    assert local.rows(str(tmp_path), "openai/gsm8k", "main")["test"] == [row]


def test_a_file_that_unpacks_to_no_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_MOST", 1 << 20)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dev/law_dev.csv", b" " * (2 << 20))
    for dataset in ("openai/openai_humaneval", "cais/mmlu"):
        with pytest.raises(InputError, match="more than 1 MiB"):
            local.rows(str(tmp_path), dataset, "law")


def test_the_published_files() -> None:
    """Every question of them is read; numbers are those of their authors."""
    roots = [os.environ.get("QQUANT_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    folder = next((Path(r) / "eval" for r in roots if r and (Path(r) / "eval").is_dir()), None)
    if folder is None:
        pytest.skip("needs mmlu.zip, ceval.zip, gsm8k/, HumanEval.jsonl.gz: set QQUANT_DATA")

    def names(archive: str, split: str) -> list[str]:
        with zipfile.ZipFile(folder / archive) as found:
            tails = [Path(name).name for name in found.namelist() if name.endswith(".csv")]
        return [n.removesuffix(f"_{split}.csv") for n in tails if n.endswith(f"_{split}.csv")]

    mmlu = [local.rows(str(folder), "cais/mmlu", name) for name in names("mmlu.zip", "test")]
    assert len(mmlu) == 57 and sum(len(r["test"]) for r in mmlu) == 14042
    assert all(len(r["dev"]) == 5 for r in mmlu)
    ceval = [local.rows(str(folder), "ceval/ceval-exam", n) for n in names("ceval.zip", "val")]
    assert len(ceval) == 52 and sum(len(r["val"]) for r in ceval) == 1346
    gsm8k = local.rows(str(folder), "openai/gsm8k", "main")
    assert (len(gsm8k["train"]), len(gsm8k["test"])) == (7473, 1319)
    assert len(local.rows(str(folder), "openai/openai_humaneval", None)["test"]) == 164
