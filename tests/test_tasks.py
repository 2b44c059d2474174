"""Tasks ask and score as lm-eval's own run of a model does; losses are told from noise."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from click.testing import CliRunner
from lm_eval.tasks import TaskManager
from qwen_tiny import write_checkpoint

import qquant
from qquant.cli import cli
from qquant.errors import InputError, MissingDependencyError, RunError, SpecError
from qquant.parts import tasks as part
from qquant.parts.base import Model, Subject
from qquant.parts.tasks import TaskOptions
from qquant.tasks import manager, sandbox
from qquant.tasks.options import TaskSpec
from qquant.tasks.paired import lost
from qquant.tasks.run import run_task

SUBJECTS = ("abstract_algebra", "anatomy", "astronomy")
WORDS = ["the user", "the other", "usher", "there", "her", "thus"]
CODE = {
    "task_id": "t/0",
    "prompt": 'def twice(x):\n    """ Two times x. """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(f):\n    assert f(3) == 6\n",
    "entry_point": "twice",
}


def mmlu_row(subject: str, i: int) -> dict[str, Any]:
    """In the hub's form."""
    rng = random.Random(f"{subject}{i}")
    question = f' Is "{subject}", number {i}, {rng.choice(WORDS)}?'
    choices = [f"{rng.choice(WORDS)} {rng.randrange(9)}" for _ in range(4)]
    return {"question": question, "subject": subject, "choices": choices, "answer": i % 4}


def ceval_row(subject: str, i: int) -> dict[str, Any]:
    choices = {letter: f"{letter}你{i}" for letter in "ABCD"}
    row = {"id": i, "question": f"你user____{subject}", **choices, "answer": "ABCD"[i % 4]}
    return {**row, "explanation": ""}


def gsm8k_row(i: int) -> dict[str, Any]:
    return {"question": f"The user has {i} and {i}, {i}?", "answer": f"{i}+{i}\n#### {2 * i}"}


def hub(path: str, name: str | None = None, **_: Any) -> Any:
    """The hub's data sets, by name; stands in for `datasets.load_dataset`."""
    from datasets import Dataset, DatasetDict

    n = 2 + SUBJECTS.index(name) if name in SUBJECTS else 3
    splits = {
        "cais/mmlu": {"dev": [mmlu_row(str(name), i) for i in (7, 8)]}
        | {"test": [mmlu_row(str(name), i) for i in range(n)]},
        "ceval/ceval-exam": {"dev": [ceval_row(str(name), i) for i in (7, 8)]}
        | {"val": [ceval_row(str(name), i) for i in range(3)]},
        "haonan-li/cmmlu": {
            split: [cmmlu_row(i) for i in rows]
            for split, rows in (("dev", (7, 8)), ("test", (1, 2)))
        },
        "openai/gsm8k": {"train": [gsm8k_row(i) for i in (7, 8, 9)]}
        | {"test": [gsm8k_row(i) for i in (1, 2)]},
        "openai/openai_humaneval": {"test": [CODE]},
    }[path]
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def cmmlu_row(i: int) -> dict[str, Any]:
    return {"Question": f" 你，{i}？", **dict.fromkeys("ABCD", f"你{i}"), "Answer": "ABCD"[i % 4]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in the authors' own files."""
    root = tmp_path_factory.mktemp("data")

    def table(name: str, rows: list[list[Any]]) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)

    for subject in SUBJECTS:
        for split, rows in hub("cais/mmlu", subject).items():
            lines = [[r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in rows]
            table(f"mmlu/{split}/{subject}_{split}.csv", lines)
    fields = ["id", "question", "A", "B", "C", "D", "answer"]
    for split, rows in hub("ceval/ceval-exam", "law").items():
        lines = [[r[f] for f in fields] for r in rows]
        table(f"ceval/{split}/law_{split}.csv", [fields, *lines])
    for split, rows in hub("haonan-li/cmmlu", "agronomy").items():
        lines = [[i, *r.values()] for i, r in enumerate(rows)]
        table(f"cmmlu/{split}/agronomy.csv", [["", *rows.column_names], *lines])
    for name, dataset in (("gsm8k/", "openai/gsm8k"), ("HumanEval", "openai/openai_humaneval")):
        for split, rows in hub(dataset, "main").items():
            path = root / (f"{name}{split}.jsonl" if "/" in name else f"{name}.jsonl")
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("tasks") / "src", code=False)
    config = json.loads((path / "config.json").read_text())
    config |= {"max_position_embeddings": 4096, "seq_length": 4096}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def loaded(source: Path) -> Any:
    return qquant.load(source, device="cpu", dtype="float32")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What lm-eval gave, run by run."""
    found: list[Any] = []
    original = lm_eval.simple_evaluate

    def spy(*args: Any, **settings: Any) -> Any:
        found.append(original(*args, **settings))
        return found[-1]

    monkeypatch.setattr(lm_eval, "simple_evaluate", spy, raising=False)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # starts pip; slow
    return found


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A group of three of MMLU's subjects, beside lm-eval's own tasks."""
    tmp_path = tmp_path_factory.mktemp("index")
    root = Path(lm_eval.__file__).parent / "tasks"
    group = "group: mmlu_few\ntask:\n" + "".join(f"  - mmlu_{s}\n" for s in SUBJECTS)
    group += "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "few.yaml").write_text(group)
    paths = [*(str(root / folder) for folder in manager._FOLDERS), str(tmp_path / "groups")]
    return TaskManager(include_defaults=False, include_path=paths)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, index: Any) -> None:
    monkeypatch.setattr(manager, "_few", lambda: index)


def asked(found: Any) -> dict[str, list[Any]]:
    """Every prompt, continuation and answer, by task."""
    return {
        name: [(s["doc_id"], s["arguments"], s["resps"], s["filter"]) for s in samples]
        for name, samples in found["samples"].items()
    }


def seeds(config: dict[str, Any]) -> dict[str, int]:
    """As lm-eval's results have them, under our names."""
    generators = ("random", "numpy", "torch", "fewshot")
    return {f"lm_eval_{g}": config[f"{g}_seed"] for g in generators}


@pytest.mark.parametrize(
    ("task", "shots", "chat"),
    [
        ("mmlu_few", 2, False),
        ("ceval-valid_law", 1, False),
        ("ceval-valid_law", 2, True),
        ("cmmlu_agronomy", 0, False),
        ("gsm8k", None, False),
    ],
)
def test_prompts_and_scores_are_lm_evals_own(
    task: str,
    shots: int | None,
    chat: bool,
    source: Path,
    loaded: Any,
    data: Path,
    evaluated: list[Any],
    few: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ours: our loader, rows from files. Theirs: `lm_eval --model hf`, rows as the hub has them."""
    shots = 2 if task == "gsm8k" else shots
    spec = TaskSpec(task, shots=shots, chat_template=chat, data_dir=str(data))
    ours = run_task(loaded, spec)
    qquant.register()
    monkeypatch.setattr("datasets.load_dataset", hub)
    lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(source), "dtype": "float32"},
        device="cpu",
        tasks=[task],
        task_manager=manager._few(),
        num_fewshot=shots,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    mine, theirs = evaluated
    assert asked(mine) == asked(theirs)
    (part,) = TaskOptions((task,), data_dir=str(data)).parts()
    for found in (mine, theirs):  # what both drew with is what `profile.json` says
        assert seeds(found["config"]) == part.seeds()
    assert mine["results"] == theirs["results"] and mine.get("groups") == theirs.get("groups")
    scores = theirs["results"][task]
    key = ours["metric"] if "," in ours["metric"] else f"{ours['metric']},none"
    assert ours["score"][0] == scores[key]
    assert ours["score"][1] == scores[key.replace(",", "_stderr,")]
    assert ours["n"] == len(ours["questions"]) == sum(size for _, size in ours["subjects"])
    assert ours["score"][0] == pytest.approx(sum(ours["questions"]) / ours["n"])
    assert ours["harness"] == f"lm-eval {lm_eval.__version__}" and ours["source"] == "local"
    if chat:
        prompt = mine["samples"][task][0]["arguments"][0][0]
        assert prompt.count("<|im_start|>user") == 3 and prompt.endswith("assistant\n")


def test_without_the_hub_the_cure_is_named(
    loaded: Any, source: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreached)
    (gsm8k,) = TaskOptions(("gsm8k",), limit=1).parts()
    subject = Subject(Model(str(source)), device="cpu", _loaded=loaded)
    with pytest.raises(RunError, match=r"gsm8k.*got Couldn't reach .*with --data-dir"):
        gsm8k.measure(subject)


def test_what_lm_eval_prints_is_not_on_stdout(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so when it bootstraps an error; stdout is for results, under --log-json for JSON."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    (tmp_path / "rows.jsonl").write_text('{"q": "The user", "a": " there"}\n' * 2)
    files = {"test": str(tmp_path / "rows.jsonl")}
    config = {"task": "goes_on", "dataset_path": "json", "output_type": "loglikelihood"}
    config |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")}}
    config |= {"test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    config |= {"metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}]}
    (tmp_path / "goes_on.yaml").write_text(json.dumps(config))
    spec = TaskSpec(str(tmp_path / "goes_on.yaml"))
    result = run_task(loaded, spec, lambda done, total: print(done, "of", total))
    assert result["metric"] == "perplexity" and result["score"][1] is not None
    said = capsys.readouterr()
    assert said.out == "1 of 2\n2 of 2\n" and "bootstrapping" in said.err  # progress is ours
    # lm-eval's figure of a question is a log-likelihood here: better if higher, unlike the score
    assert "questions" not in result and result["higher_is_better"] is False


def test_the_hub_is_asked_without_local_files(
    loaded: Any, data: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", hub)
    online = run_task(loaded, TaskSpec("ceval-valid_law", shots=1, limit=2))
    local = run_task(loaded, TaskSpec("ceval-valid_law", shots=1, limit=2, data_dir=str(data)))
    assert online.pop("source") == "hub" and local.pop("source") == "local"
    assert online == local and local["n"] == local["limit"] == 2


def test_qwens_chat_protocol(
    loaded: Any, data: Path, evaluated: list[Any], few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ChatML with the usual system message, no examples, greedy; the answer is read as told."""
    answers = {"mmlu_anatomy": "The answer is B.", "gsm8k": "So it has $4.00 in all."}
    turn = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn += "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    row = mmlu_row("anatomy", 0)
    listed = "".join(f"{k}. {v}\n" for k, v in zip("ABCD", row["choices"], strict=True))
    prompts = {
        "mmlu_anatomy": "The following is a multiple-choice question. Please choose the most "
        "suitable one among A, B, C and D as the answer to this question.\n\n"
        f"{row['question']}\n{listed}",
        "gsm8k": gsm8k_row(1)["question"],
        "ceval-valid_law": "你user____law\n\nA. A你0\nB. B你0\nC. C你0\nD. D你0\n",
    }
    for task, prompt in prompts.items():
        with monkeypatch.context() as patch:
            if task in answers:
                given = answers[task]
                patch.setattr(
                    manager.lm_eval.models.huggingface.HFLM,
                    "generate_until",
                    lambda self, requests, disable_tqdm=False, given=given: [given] * len(requests),
                )
            result = run_task(loaded, TaskSpec(task, preset="qwen-chat", data_dir=str(data)))
        sample = evaluated[-1]["samples"][task][0]
        assert sample["arguments"][0][0] == turn.format(prompt)
        settings = sample["arguments"][0][1]
        assert settings["do_sample"] is False and settings["repetition_penalty"] == 1.0
        assert result["shots"] == 0 and result["chat_template"] and result["preset"] == "qwen-chat"
        if task in answers:  # right for the second question each
            assert result["questions"][:2] == [0, 1] and result["metric"] == "acc"
    with pytest.raises(SpecError, match="cmmlu_agronomy"):
        TaskOptions(("cmmlu_agronomy",), preset="qwen-chat").parts()


def test_cevals_score_under_the_preset_is_the_mean_of_its_subjects() -> None:
    from qquant.tasks import preset

    config = {"group": "ceval-valid", "aggregate_metric_list": [{"metric": "acc"}]}
    assert preset.group(config)["aggregate_metric_list"][0]["weight_by_size"] is False
    found = manager.manager(spec := TaskSpec("ceval-valid", preset="qwen-chat"))
    assert manager.mean_over(found, spec, "acc") == "subjects"
    assert manager.mean_over(found, TaskSpec("ceval-valid"), "acc") == "questions"
    config["group"] = "mmlu"
    assert preset.group(config)["aggregate_metric_list"][0]["weight_by_size"] is True


# --- HumanEval ------------------------------------------------------------------------------------


def test_code_is_run_only_when_asked_for(
    source: Path, data: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is loaded or written."""

    def never(*_: Any) -> None:
        raise AssertionError("ran code")

    monkeypatch.setattr(sandbox, "run_code", never)
    monkeypatch.setattr("qquant.runtime.load", never)
    with pytest.raises(SpecError, match=r"--run-code.*Add --run-code.*leave the task out"):
        TaskOptions(("humaneval",), data_dir=str(data)).parts()
    words = ["profile", str(source), "--task", "humaneval", "--device", "cpu"]
    result = CliRunner().invoke(cli, [*words, "-o", str(data / "out")])
    assert result.exit_code == 2 and "Add --run-code" in result.stderr
    assert not (data / "out").exists()


@pytest.mark.parametrize(
    ("task", "preset", "answer", "score"),
    [
        ("humaneval", None, "    return 2 * x\n", 1),
        ("humaneval", None, "    return 3 * x\n", 0),
        ("humaneval", None, "    while True: pass\n", 0),
        ("humaneval_instruct", None, "    return x + x\n```\nThis doubles.", 1),
        ("humaneval", "qwen-chat", "```python\ndef twice(x):\n    return x + x\n```", 1),
        ("humaneval", "qwen-chat", "I cannot.", 0),
    ],
)
def test_humaneval(
    task: str,
    preset: str | None,
    answer: str,
    score: int,
    loaded: Any,
    data: Path,
    few: None,
    evaluated: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        sandbox.check()
    except InputError as error:
        pytest.skip(str(error))
    original = sandbox.run_code
    monkeypatch.setattr(sandbox, "check", lambda: None)
    monkeypatch.setattr(sandbox, "run_code", lambda code: original(code, sandbox.Limits(3.0)))
    monkeypatch.setattr(
        manager.lm_eval.models.huggingface.HFLM,
        "generate_until",
        lambda self, requests, disable_tqdm=False: [answer] * len(requests),
    )
    spec = TaskSpec(task, preset=preset, data_dir=str(data), run_code=True)
    result = run_task(loaded, spec)
    assert result["questions"] == [score] and result["metric"].startswith("pass@1")
    if task == "humaneval" and preset is None:
        assert evaluated[-1]["samples"][task][0]["arguments"][0][0] == CODE["prompt"]


def test_pass_at_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four programs two pass: two drawn hold a right one with 1 - 1/6."""
    passed = sandbox.Verdict
    monkeypatch.setattr(sandbox, "run_code", lambda code: passed(code.startswith("good")))
    programs = [["good", "bad", "good", "bad"]]
    found = manager.pass_at_k(["test"], programs, k=[1, 2, 4, 8])
    assert found == pytest.approx({"pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1.0})


# --- paired differences ---------------------------------------------------------------------------


def test_paired_differences() -> None:
    same = lost([1, 0, 1], [1, 0, 1])
    assert (same.value, same.stderr, same.interval) == (0, 0, [0, 0])
    found = lost([1, 1, 0, 1], [1, 0, 1, 0])  # differences 0 1 -1 1: mean 1/4, variance 11/12
    assert found.value == 0.25 and found.stderr == pytest.approx((11 / 48) ** 0.5)
    wide = 1.959964 * (11 / 48) ** 0.5
    assert found.interval == pytest.approx([0.25 - wide, 0.25 + wide])
    assert lost([1, 2], [3, 2], higher_is_better=False).value == 1
    macro = lost([1, 1, 1, 1], [0, 1, 1, 1], subjects=[2, 2])
    assert macro.value == 0.25 and macro.stderr == pytest.approx(0.25)  # half of sqrt(.5 / 2)
    assert lost([1], [0]).stderr is None and lost([1], [0]).interval is None
    with pytest.raises(ValueError, match="2 questions"):
        lost([1, 0], [1, 0], subjects=[1])


def test_pairing_beats_comparing_scores() -> None:
    """Two models that mostly agree: the difference is known ten times better than either score."""
    reference = [float(i % 2) for i in range(1000)]
    candidate = [0.0 if i in (1, 3, 5, 7, 9, 11) else x for i, x in enumerate(reference)]
    found = lost(reference, candidate)
    assert found.value == pytest.approx(0.006) and found.stderr is not None
    assert found.stderr < 0.1 * 0.0158 * 2 and found.interval is not None
    assert found.interval[0] > 0


# --- refusals --------------------------------------------------------------------------------


def test_refusals(data: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_all", manager._few)  # the whole of lm-eval takes its time
    for settings, match in (
        ({"tasks": ("mmlu_anatomi",)}, r"mmlu_anatomi.*Near it: mmlu_anatomy"),
        ({"tasks": ("mmlu_virology",), "data_dir": str(data)}, "virology"),
        ({"tasks": ("gsm8k",), "limit": 0}, "--limit"),
        ({"tasks": ("gsm8k",), "preset": "other"}, "--preset"),
        ({"tasks": ("gsm8k",), "preset": "qwen-chat", "shots": 3}, "no examples"),
        ({"limit": 3}, "--limit: expected a task"),
    ):
        with pytest.raises(InputError, match=match):
            TaskOptions(**settings).parts()  # type: ignore[arg-type]
    monkeypatch.setattr(part, "version", raise_missing)
    with pytest.raises(MissingDependencyError, match=r"qquant\[eval\]"):
        TaskOptions(("gsm8k",)).parts()


def raise_missing(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_a_model_without_a_chat_template_is_refused(loaded: Any, data: Path, few: None) -> None:
    class Bare:
        chat_template = None

    with pytest.raises(InputError, match="chat template"):
        run_task(loaded._replace(tokenizer=Bare()), TaskSpec("gsm8k", chat_template=True))
    with pytest.raises(InputError, match="tokenizer"):
        run_task(loaded._replace(tokenizer=None), TaskSpec("gsm8k"))
