"""Qwen's zero-shot chat protocol as configurations of lm-eval's tasks.

Only what the protocol says is changed: prompt, decoding, how an answer is read and scored. Data
sets, splits, groups and the harness stay lm-eval's. The texts are in `chat`. C-Eval's score is the
mean of its subjects' means here, as Qwen has it; lm-eval's own weighs subjects by their questions.
"""

from __future__ import annotations

from typing import Any

from . import chat, sandbox

# Greedy, whatever the checkpoint's own settings are. 512 tokens is Qwen's chat default; to
# transformers, `max_new_tokens` of a checkpoint's generation config goes before it.
DECODING: dict[str, Any] = {
    "until": ["<|im_end|>", "<|im_start|>"],
    "do_sample": False,
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "max_gen_toks": 512,
}


def of(dataset: str | None) -> dict[str, Any] | None:
    """What the protocol changes in a task on this data set; None where it says nothing of it."""
    if dataset not in _TASKS:
        return None
    ask, target, score, metric = _TASKS[dataset]
    return {
        "output_type": "generate_until",
        "description": "",
        "doc_to_text": ask,
        "doc_to_target": target,
        "doc_to_choice": None,
        "gen_prefix": None,
        "process_results": score,
        "generation_kwargs": {**DECODING, "until": list(DECODING["until"])},
        "filter_list": None,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "training_split": None,
        "fewshot_split": None,
        "fewshot_config": None,
        "repeats": 1,
    }


def group(config: dict[str, Any]) -> dict[str, Any]:
    """A group's configuration under the protocol."""
    macro = str(config.get("group", "")).startswith("ceval")
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": not macro}
    return {**config, "aggregate_metric_list": [mean]}


def _mmlu_text(doc: dict[str, Any]) -> str:
    return chat.mmlu_prompt(doc["question"], doc["choices"])


def _mmlu_target(doc: dict[str, Any]) -> str:
    return chat.LETTERS[doc["answer"]]


def _mmlu_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"acc": float(chat.mmlu_answer(results[0], doc["choices"]) == _mmlu_target(doc))}


def _choices(doc: dict[str, Any]) -> list[str]:
    return [doc[letter] for letter in chat.LETTERS]


def _ceval_text(doc: dict[str, Any]) -> str:
    return chat.ceval_prompt(doc["question"], _choices(doc))


def _ceval_target(doc: dict[str, Any]) -> str:
    return str(doc["answer"])


def _ceval_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    answer = chat.ceval_answer(results[0], doc["question"], _choices(doc))
    return {"acc": float(answer == doc["answer"])}


def _gsm8k_text(doc: dict[str, Any]) -> str:
    return str(doc["question"])


def _gsm8k_target(doc: dict[str, Any]) -> str:
    return str(doc["answer"])


def _gsm8k_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"acc": float(chat.same_number(results[0], doc["answer"]))}


def _code_text(doc: dict[str, Any]) -> str:
    return chat.code_prompt(doc["prompt"], doc["entry_point"])


def _code_target(doc: dict[str, Any]) -> str:
    return f"{doc['test']}\ncheck({doc['entry_point']})"


def _code_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    body = chat.code_body(results[0], doc["entry_point"])
    verdict = sandbox.run_code(f"{doc['prompt']}{body}\n{_code_target(doc)}")
    return {"pass@1": float(verdict.passed)}


_TASKS: dict[str | None, tuple[Any, Any, Any, str]] = {
    "cais/mmlu": (_mmlu_text, _mmlu_target, _mmlu_score, "acc"),
    "ceval/ceval-exam": (_ceval_text, _ceval_target, _ceval_score, "acc"),
    "openai/gsm8k": (_gsm8k_text, _gsm8k_target, _gsm8k_score, "acc"),
    "openai/openai_humaneval": (_code_text, _code_target, _code_score, "pass@1"),
}
