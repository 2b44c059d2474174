"""Loads a directory in one of three ways and measures it: perplexity, decoding speed, some text.

    python scripts/demo_measure_dir.py {bf16,plain,qquant} DIRECTORY --heldout FILE

`plain` is what a user without qquant has: transformers with gptqmodel and optimum. To prove it, an
import of qquant is made impossible before anything else is loaded, until the model is loaded and
has written some text. Then all three ways are measured alike, by `qquant.profile`. The last line on
stdout is JSON.
"""

from __future__ import annotations

import argparse
import importlib.abc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

PROMPT = 32  # tokens


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
    if mode == "plain" and kinds == {"Linear"}:
        raise RuntimeError("no linear is quantized")
    kernel = f"linears run by {', '.join(sorted(kinds))} in {str(model.dtype).split('.')[-1]}"
    return model.eval(), tokenizer, kernel


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def without_qquant() -> Iterator[None]:
    """No import of qquant succeeds inside; that it was not there before is checked at the end."""
    finder = NoQQuant()
    sys.meta_path.insert(0, finder)
    try:
        yield
        if "qquant" in sys.modules:
            raise RuntimeError("qquant was imported by what should not need it")
    finally:
        sys.meta_path.remove(finder)


def some_text(model: Any, tokenizer: Any, text: str) -> str:
    """What the model writes after the beginning of `text`, greedily."""
    import torch

    prompt = torch.tensor([tokenizer(text[:400])["input_ids"][:PROMPT]])
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            do_sample=False,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
        )
    return str(tokenizer.decode(output[0][prompt.shape[1] :].tolist()))


def measure(model: Any, tokenizer: Any, text: str, *, window: int, most: int) -> dict[str, Any]:
    """Perplexity with its standard error over windows, and decoding speed after a warm-up."""
    import torch

    from qquant import profile
    from qquant.speed import speed

    ids = profile.heldout_ids(tokenizer, text, window, window * most)
    if len(ids) < 2:
        raise SystemExit(f"the held-out text has fewer than two windows of {window} tokens")
    perplexity = profile.perplexity(model, ids)
    timed = speed(model, PROMPT, new_tokens=64, repeats=5)
    rates = sorted((timed.new_tokens - 1) / run.decode_s for run in timed.runs)
    return {
        "perplexity": perplexity.value,
        "perplexity_se": perplexity.stderr,
        "tokens": ids.shape[0] * (window - 1),
        "window": window,
        "tokens_per_s": [rates[0], timed.decode_tokens_per_s, rates[-1]],
        "new_tokens": timed.new_tokens,
        "repeats": len(rates),
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
    text = given.heldout.read_text(encoding="utf-8")
    with without_qquant() if given.mode == "plain" else nullcontext():
        model, tokenizer, kernel = load(given.mode, given.directory)
        written = some_text(model, tokenizer, text)
    found = measure(model, tokenizer, text, window=given.window, most=given.most)
    print(json.dumps({"kernel": kernel, "text": written, **found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
