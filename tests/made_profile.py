"""A `profile.json` made by hand, with every part of format 2: what reports are tested on.

The figures are made up, and told apart: every model has its own, so that a table that mixes rows
or columns up shows it.
"""

from __future__ import annotations

import copy
from typing import Any

KINDS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
REFERENCE, INT8, INT4 = "Qwen-7B-Chat", "Qwen-7B-Chat-Int8", "Qwen-7B-Chat-Int4"
_QWEN = {  # MMLU, C-Eval, GSM8K, HumanEval; shaped like Qwen's own table
    REFERENCE: (55.8, 59.7, 50.3, 37.2),
    INT8: (55.4, 59.4, 48.3, 34.8),
    INT4: (55.1, 59.2, 49.7, 29.9),
}
_TASKS = {"mmlu": 14042, "ceval-valid": 1346, "gsm8k": 1319, "humaneval": 164}
_COST = {REFERENCE: 0.0, INT8: 0.0004, INT4: 0.0123}
_BYTES = {REFERENCE: 15_442_649_088, INT8: 9_130_000_000, INT4: 5_860_000_000}
_SPEED = {REFERENCE: 40.93, INT8: 37.47, INT4: 50.09}


def _tasks(model: str) -> dict[str, Any]:
    made = {}
    for (task, n), score, ref in zip(_TASKS.items(), _QWEN[model], _QWEN[REFERENCE], strict=True):
        share = score / 100
        se = (share * (1 - share) / n) ** 0.5
        made[task] = {
            "key": "k",
            "model": model,
            "asked": f"hash of {task}",
            "mean": "questions",
            "subjects": [[task, 80]],
            "higher_is_better": True,
            "metric": "pass@1" if task == "humaneval" else "acc",
            "score": [share, se],
            "n": n,
            "shots": 0,
            "chat_template": True,
            "preset": "qwen",
            "limit": None,
            "source": "local",
            "harness": "lm-eval 0.4.9",
            "metrics": {"acc,none": share},
            "questions": [1, 0, 1, 1] * 20,
        }
        if model != REFERENCE:
            lost = (ref - score) / 100
            paired = se * 0.6
            made[task] |= {
                "lost": [lost, paired],
                "lost_interval": [lost - 1.96 * paired, lost + 1.96 * paired],
                "paired_with": REFERENCE,
            }
    return made


def _domain(model: str, factor: float) -> dict[str, Any]:
    cost = _COST[model] * factor
    made: dict[str, Any] = {
        "tokens": 40880,
        "sha256": f"of a text, {factor}",
        "chat": False,
        "seqlen": 512,
        "perplexity": [8.1234 * (1 + cost), 0.21],
        "rows": {"nll": [2.0, 2.1], "kl": [cost, cost], "top1": [1 - cost, 1 - cost]},
    }
    if model != REFERENCE:
        made |= {
            "nll_lost": [cost, 0.0011],
            "nll_lost_interval": [cost - 0.0022, cost + 0.0022],
            "kl": [cost * 1.1, cost / 20],
            "top1": [1 - 3 * cost, cost / 10],
            "topk": {"5": [1 - 2 * cost, cost / 12], "10": [1 - 1.9 * cost, cost / 14]},
            "by_position": [
                {
                    "from": start,
                    "to": start * 2,
                    "kl": [cost * (1 + 32 / start), cost / 9],
                    "top1": [1 - 3 * cost, cost / 7],
                    "nll_lost": [cost, cost / 3],
                    "perplexity": [8.0, 0.3],
                }
                for start in (32, 64, 128, 256)
            ],
        }
    return made


def _speed(model: str) -> dict[str, Any]:
    rate = _SPEED[model]
    made: dict[str, Any] = {}
    for new, factor in ((2048, 1.0), (8192, 0.87)):
        seconds = new / (rate * factor)
        made[f"qwen-1-{new}"] = {
            "key": "k",
            "preset": "qwen",
            "context": 1,
            "new_tokens": new,
            "batch": 1,
            "compile": False,
            "cache": "dynamic",
            "kernel": "torch-int4",
            "runs": [{"prefill_s": 0.03, "decode_s": seconds - 0.03, "total_s": seconds}],
            "ttft_s": [0.03, 0.0],
            "decode_tokens_per_s": (new - 1) / (seconds - 0.03),
            "qwen_tokens_per_s": rate * factor,
        }
    seconds = 3 / rate  # one token has no time between two
    made["qwen-2048-1"] = made["qwen-1-2048"] | {
        "context": 2048,
        "new_tokens": 1,
        "runs": [{"prefill_s": seconds, "decode_s": 0.0, "total_s": seconds}],
        "ttft_s": [seconds, 0.0],
        "decode_tokens_per_s": None,
        "inter_token_ms": dict.fromkeys(("p50", "p90", "p99", "max")),
        "qwen_tokens_per_s": 1 / seconds,
    }
    for compiled in (False, True):
        faster = rate * (1.4 if compiled else 1.05)
        made["modern-b1-c512-n64" + ("-compile" if compiled else "")] = {
            "key": "k",
            "preset": "modern",
            "context": 512,
            "new_tokens": 64,
            "batch": 1,
            "compile": compiled,
            "cache": "static" if compiled else "dynamic",
            "kernel": "torch-int4",
            "runs": [
                {"prefill_s": 0.2, "decode_s": 63 / faster * f, "total_s": 0.2 + 63 / faster * f}
                for f in (1.0, 1.04, 0.97)
            ],
            "ttft_s": [0.2, 0.004],
            "decode_tokens_per_s": faster,
            "inter_token_ms": {
                "p50": 1000 / faster,
                "p90": 1050 / faster,
                "p99": 1200 / faster,
                "max": 1500 / faster,
            },
            "bytes_per_token": _BYTES[model],
            "copy_bytes_per_s": 1.4e12,
            "bandwidth_share": _BYTES[model] * faster / 1.4e12,
        }
    return made


def _memory(model: str) -> dict[str, Any]:
    weights = _BYTES[model]
    rows = {
        "weights": ("weights", 0, 0, "dynamic", weights),
        "encode-2048": ("encode 2048", 2048, 1, "dynamic", weights + 2_800_000_000),
        "generate-8192": ("generate 8192", 1, 8192, "dynamic", weights + 8_700_000_000),
        "generate-8192-int4": (
            "generate 8192",
            1,
            8192,
            "quantized-int4",
            weights + 3_100_000_000,
        ),
    }
    made: dict[str, Any] = {}
    for setting, (what, context, new, cache, peak) in rows.items():
        made[setting] = {
            "key": "k",
            "what": what,
            "context": context,
            "new_tokens": new,
            "cache": cache,
            "weights_bytes": weights,
            "peak_bytes": peak,
            "allocator_peak_bytes": peak,
            "process_peak_bytes": peak + 900_000_000,
            "qwen_gib": (peak + 200_000_000) / 2**30,
        }
        if cache != "dynamic":
            made[setting]["kl"] = [0.0031, 0.0002]
    return made


def _layers(model: str, blocks: int) -> dict[str, Any]:
    made = {}
    for block in range(blocks):
        for place, kind in enumerate(KINDS):
            error = _COST[model] ** 0.5 * (1 + 0.1 * place + 0.2 * ((block * 7 + place * 3) % 5))
            made[f"transformer.h.{block}.{kind}"] = {"relative_error": error}
    return made


def made_profile(blocks: int = 32) -> dict[str, Any]:
    """A BF16 reference with Int8 and Int4, measured for everything."""
    models: dict[str, Any] = {}
    for model in (REFERENCE, INT8, INT4):
        models[model] = {
            "load": {
                "key": "k",
                "kernel": "torch-int4: 160 linears" if model == INT4 else "dequantize",
                "slow_kernel": "Int8 is dequantized at every call" if model == INT8 else None,
                "method": {REFERENCE: "bf16", INT8: "gptq-int8", INT4: "gptq-int4"}[model],
                "weight_bytes": _BYTES[model],
                "file_bytes": _BYTES[model] + 4096,
                "reference": model == REFERENCE,
            },
            "accuracy": {
                "key": "k",
                "domains": {"wiki.txt": _domain(model, 1.0), "code.py": _domain(model, 0.6)},
            },
            "tasks": _tasks(model),
            "speed": _speed(model),
            "memory": _memory(model),
            "long_context": {
                "key": "k",
                "text": "book.txt",
                "rows": [
                    {
                        "length": length,
                        "tokens": 32768,
                        "dynamic_ntk": on,
                        "logn": on,
                        "perplexity": [4.23 + (0 if on else length / 9000), 0.05],
                    }
                    for on in (False, True)
                    for length in (1024, 2048, 4096, 8192, 16384, 32768)
                ],
            },
        }
        if model != REFERENCE:
            models[model]["layers"] = {"key": "k", "linears": _layers(model, blocks)}
    return copy.deepcopy(
        {
            "format": 2,
            "reference": REFERENCE,
            "protocol": {
                "texts": ["wiki.txt", "code.py"],
                "seqlen": 512,
                "max_tokens": 40960,
                "repeats": 3,
            },
            "seeds": {"random_prompt": 0, "qwen_sampling": 1024, "lm_eval_fewshot": 1234},
            "machine": {
                "device": "NVIDIA A100-SXM4-80GB",
                "threads": 8,
                "versions": {"qquant": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
                "gpu": {"name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 85_899_345_920},
                "driver": "560.35",
                "date": "2026-11-28",
            },
            "models": models,
        }
    )
