"""Loads native directories with plain transformers and no remote code, for test_native.

Run as a script by a Python that cannot import qquant (`reader_process.NoQquant`). Takes a JSON file
that names, by job, a directory and a safetensors file of inputs; writes what was seen and the
logits.

    python native_reader.py JOBS.json RESULT.json LOGITS.safetensors
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from reader_process import NoQquant


def read(job: dict) -> tuple[dict, dict]:
    """(what was seen, logits float32 by input) of one directory."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"dtype": torch.float32} if job["dense"] else {"device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(job["path"], **options).eval()
    inputs = load_file(job["inputs"])
    seen = {"model": type(model).__name__, "from": type(model).__module__, "greedy": {}}
    logits = {}
    for key in sorted({name.partition(".")[0] for name in inputs}):
        ids = inputs[f"{key}.input_ids"]
        mask = inputs.get(f"{key}.attention_mask", torch.ones_like(ids))
        with torch.no_grad():
            logits[key] = model(input_ids=ids, attention_mask=mask).logits.float()
        if key.startswith("greedy"):
            made = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=job["steps"],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            seen["greedy"][key] = made[0, ids.shape[1] :].tolist()
    if job["messages"]:
        tokenizer = AutoTokenizer.from_pretrained(job["path"])
        chat = tokenizer.apply_chat_template(
            job["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**chat, do_sample=False, top_p=None, top_k=None)
        seen["prompt"] = chat["input_ids"][0].tolist()
        seen["answer"] = made[0, chat["input_ids"].shape[1] :].tolist()
        seen["ids"] = tokenizer.encode(job["text"])
        seen["tokenizer"] = type(tokenizer).__name__
    return seen, logits


def main() -> None:
    sys.meta_path.insert(0, NoQquant())
    from safetensors.torch import save_file

    jobs, result, logits_file = map(Path, sys.argv[1:])
    found: dict[str, dict] = {}
    logits = {}
    for name, job in json.loads(jobs.read_text()).items():
        try:
            found[name], tensors = read(job)
            logits |= {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    assert "qquant" not in sys.modules
    save_file(logits, logits_file)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
