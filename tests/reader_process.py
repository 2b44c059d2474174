"""Loads GPTQ directories with plain transformers (and optimum, gptqmodel), for test_readers.

Those with `"with": "gptqmodel"` are loaded by gptqmodel itself, which reads bits per module; for
those with `"with": "defuser"` transformers' class of that family gets its experts apart first.

Run as a script by a Python that cannot import qquant: it refuses to, whatever is installed. Takes a
JSON file that names the directories and the token ids, writes logits and what else was seen.

    python reader_process.py JOBS.json RESULT.json LOGITS.safetensors
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib.abc import MetaPathFinder
from pathlib import Path


class NoQquant(MetaPathFinder):
    """Makes `import qquant` fail."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qquant":
            raise ImportError("qquant is not to be had in this process")
        return None


def load(directory: str, reader: str):
    """The model, by the reader's own usual way."""
    if reader == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(directory, device="cpu", trust_remote_code=True).model
    from transformers import AutoConfig, AutoModelForCausalLM

    if reader == "defuser":
        from defuser import replace_fused_blocks

        assert replace_fused_blocks(AutoConfig.from_pretrained(directory).model_type)
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", trust_remote_code=True)


def read(directory: str, ids, chat: bool, reader: str) -> tuple[dict, object]:
    """(what was seen, logits [b, t, vocab] float32) of one directory."""
    import torch
    from transformers import AutoTokenizer

    model = load(directory, reader)
    kernels: dict[str, int] = {}
    bits: dict[str, int] = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("gptqmodel"):
            name = type(module).__name__
            kernels[name] = kernels.get(name, 0) + 1
            bits[path] = int(getattr(module, "bits", 0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
        made = model.generate(ids[:1, :4], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    seen = {
        "model": type(model).__name__,
        "from": type(model).__module__,
        "dtype": str(model.dtype),
        "kernels": kernels,
        "bits": bits,
        "generated": made[0].tolist(),
    }
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        response, history = model.chat(tokenizer, "Hi", history=None)
        seen |= {"response": response, "history": history}
    return seen, logits


def main() -> None:
    sys.meta_path.insert(0, NoQquant())
    import torch
    from safetensors.torch import save_file

    jobs, result, logits_file = map(Path, sys.argv[1:])
    todo = json.loads(jobs.read_text())
    ids = torch.tensor(todo["ids"])
    found: dict[str, dict] = {}
    logits = {}
    for name, job in todo["directories"].items():
        try:
            found[name], tensor = read(job["path"], ids, job["chat"], job["with"])
            logits[name] = tensor.contiguous()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    assert "qquant" not in sys.modules
    save_file(logits, logits_file)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
