"""One measurement of `methods.py`, in a process of its own; the last line on stdout is JSON.

    python methods_worker.py kl SOURCE DIR HELDOUT ROWS  accuracy, float32 arithmetic for both,
                                                       on ROWS sequences of 512 tokens
    python methods_worker.py memory DIR                peak of loading and of a forward, bfloat16
    python methods_worker.py speed DIR                 prefill and decode, the default dtype

Everything is loaded as a user of qquant loads it (`qquant.load`), so kernels are those that a user
gets; for accuracy the exact one, since rounding of inputs is the kernel's affair. Memory counts
anonymous pages only (pages mapped from the weights' files can be dropped at will), polled, less
what there was after all imports.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import qquant
from qquant.profile import compare, heldout_ids
from qquant.speed import speed

SEQLEN = 512
FORWARD = 512  # tokens of the forward whose memory is counted
PROMPT, NEW, REPEATS = 32, 33, 5


def anonymous() -> int:
    """Resident bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell RssAnon")


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list whose only element becomes the peak within, less what there was before, in bytes."""
    base, peak = anonymous(), [0]
    done = threading.Event()

    def poll() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous() - base)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], anonymous() - base)


def kl(source: Path, directory: Path, heldout: Path, rows: int) -> dict[str, Any]:
    reference = qquant.load(source, device="cpu", dtype="float32")
    quant = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    exact = {}
    if quant.get("quant_method") == "gptq":
        exact = {"kernel": "dense"}
    elif quant.get("load_in_4bit"):
        exact = {"compute_dtype": "float32"}
    candidate = qquant.load(directory, device="cpu", dtype="float32", **exact).model
    text = heldout.read_text(encoding="utf-8")
    ids = heldout_ids(reference.tokenizer, text, SEQLEN, SEQLEN * rows)
    return asdict(compare(reference.model, candidate, ids))


def memory(directory: Path) -> dict[str, Any]:
    warm()
    with watched() as loading:
        loaded = qquant.load(directory, device="cpu", dtype="bfloat16")
    with watched() as running, torch.inference_mode():
        vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, vocabulary, (1, FORWARD), generator=torch.Generator().manual_seed(0))
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return {
        "load_peak_bytes": loading[0],
        "forward_extra_bytes": running[0],
        "weight_bytes": loaded.kernel.weight_bytes,
        "kernel": str(loaded.kernel),
    }


def fast(directory: Path) -> dict[str, Any]:
    loaded = qquant.load(directory, device="cpu")
    measured = speed(loaded.model, PROMPT, NEW, REPEATS)
    found = {
        "prompt_len": measured.context,
        "new_tokens": measured.new_tokens,
        "prefill_s": measured.prefill_s,
        "decode_tokens_per_s": measured.decode_tokens_per_s,
        "prefill_runs_s": [run.prefill_s for run in measured.runs],
        "decode_runs_s": [run.decode_s for run in measured.runs],
    }
    kernel = loaded.kernel
    dtypes = {"dtype": str(kernel.dtype), "compute_dtype": str(kernel.compute_dtype)}
    return {**found, "kernel": str(kernel), **dtypes}


def warm() -> None:
    """All imports that loading makes, so that they are in the base line of the memory."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401
    from transformers.integrations import bitsandbytes as integration  # noqa: F401

    qquant.register()
    torch.mm(torch.zeros(64, 64), torch.zeros(64, 64))


def main() -> None:
    # bitsandbytes says at every Int8 product that it casts the input.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    what, *words = sys.argv[1:]
    started = time.perf_counter()
    if what == "kl":
        source, directory, heldout, rows = words
        found = kl(Path(source), Path(directory), Path(heldout), int(rows))
    else:
        found = {"memory": memory, "speed": fast}[what](Path(words[0]))
    print(json.dumps({**found, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
