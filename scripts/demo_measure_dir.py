"""Loads a directory in one of three ways and measures it: perplexity, decoding speed, some text.

    python scripts/demo_measure_dir.py {bf16,plain,qquant} DIRECTORY --heldout FILE

`plain` is what a user without qquant has: transformers with gptqmodel and optimum. To prove it, an
import of qquant is made impossible before anything else is loaded. All three ways go through the
same `measure`. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import importlib.abc
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class NoQQuant(importlib.abc.MetaPathFinder):
    """Makes `import qquant` fail, as where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "qquant" or name.startswith("qquant."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(mode: str, directory: Path) -> tuple[Any, Any, str]:
    """`(model, tokenizer, what runs the linears)`."""
    if mode == "qquant":
        import qquant

        model, tokenizer, kernel = qquant.load(directory, device="cpu")
        return model, tokenizer, str(kernel)
    if mode == "plain":
        sys.meta_path.insert(0, NoQQuant())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"device_map": "cpu"}
    trust = mode == "plain"
    if not native_bfloat16():  # 16-bit arithmetic is emulated there, and several times slower
        options["dtype"] = "float32"
    if mode == "bf16":
        import qquant

        qquant.register()
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust, **options)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    kinds = {
        type(module).__name__
        for module in model.modules()
        if type(module).__name__.endswith("Linear")
    }
    if mode == "plain":
        if "qquant" in sys.modules:
            raise RuntimeError("qquant was imported by what should not need it")
        if kinds == {"Linear"}:
            raise RuntimeError("no linear is quantized")
    kernel = f"linears run by {', '.join(sorted(kinds))} in {str(model.dtype).split('.')[-1]}"
    return model.eval(), tokenizer, kernel


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def windows(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """At most `most` windows of `length` ids, side by side."""
    count = min(most, len(ids) // length)
    return [list(ids[i * length : (i + 1) * length]) for i in range(count)]


def measure(model: Any, tokenizer: Any, text: str, *, window: int, most: int) -> dict[str, Any]:
    """Perplexity with its standard error over windows, and decoding speed after a warm-up."""
    import torch

    new_tokens, repeats = 64, 5
    losses = []
    parts = windows(tokenizer(text)["input_ids"], window, most)
    if len(parts) < 2:
        raise SystemExit(f"the held-out text has fewer than two windows of {window} tokens")
    with torch.inference_mode():
        for part in parts:
            ids = torch.tensor([part])
            logits = model(input_ids=ids).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        mean = statistics.fmean(losses)
        error = statistics.stdev(losses) / math.sqrt(len(losses))
        prompt = torch.tensor([parts[0][:32]])
        times = []
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
            )
            if repeat:
                times.append(time.perf_counter() - start)
    speeds = sorted(new_tokens / seconds for seconds in times)
    return {
        "perplexity": math.exp(mean),
        "perplexity_se": math.exp(mean) * error,
        "tokens": len(parts) * (window - 1),
        "window": window,
        "tokens_per_s": [speeds[0], statistics.median(speeds), speeds[-1]],
        "new_tokens": new_tokens,
        "repeats": repeats,
        "text": tokenizer.decode(output[0][prompt.shape[1] :][:24].tolist()),
        "threads": torch.get_num_threads(),
        "note": ""
        if native_bfloat16()
        else "This CPU has no bfloat16 arithmetic: what is not quantized is computed in float32.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("bf16", "plain", "qquant"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--most", type=int, default=64, help="windows at the most")
    given = parser.parse_args()
    model, tokenizer, kernel = load(given.mode, given.directory)
    text = given.heldout.read_text(encoding="utf-8")
    found = measure(model, tokenizer, text, window=given.window, most=given.most)
    print(json.dumps({"kernel": kernel, **found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
