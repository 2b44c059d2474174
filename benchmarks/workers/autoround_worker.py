"""Quantizes with AutoRound (sign-gradient tuning of the rounding) and its `auto_gptq` export.

Its defaults unless the job's options say otherwise: 200 iterations, batches of 8, the export its
documentation names for GPTQ readers. `options` are its own settings (`iters=50`). Mixed precision
is off where the job's dtype is float32: on a CPU without native bfloat16 it is emulated, and
several times slower. Quantizing and saving are one call of it and count as `quantize`.

It masks the last position of every row and what equals the padding token; the rows here are full,
so they come with a mask of ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common import Job


def main() -> None:
    job = Job.from_argv()
    with job.clock("import"):
        import torch
        from auto_round import AutoRound
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(job.threads)
    options = {"iters": 200, "batch_size": 8, **job.options}
    with job.clock("load"):
        tokens = job.read_tokens()
        model = AutoModelForCausalLM.from_pretrained(
            str(job.checkpoint), dtype=getattr(torch, job.dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(str(job.checkpoint))
        rows = [
            {"input_ids": part, "attention_mask": torch.ones_like(part)}
            for part in tokens.split(int(options["batch_size"]))
        ]
    scratch = job.out.with_name(job.out.name + ".writing")
    with job.clock("quantize"):
        tool = AutoRound(
            model,
            tokenizer,
            scheme=f"W{job.bits}A16",
            group_size=job.group_size,
            sym=True,
            dataset=rows,
            nsamples=tokens.shape[0],
            seqlen=tokens.shape[1],
            device_map="cpu",
            amp=job.dtype != "float32",
            **options,
        )
        tool.quantize_and_save(str(scratch), format="auto_gptq")
    written = _written(scratch)
    shutil.move(str(written), str(job.out))
    shutil.rmtree(scratch, ignore_errors=True)
    job.finish(
        ("auto-round", "torch", "transformers"),
        {
            "bits": job.bits,
            "group_size": job.group_size,
            "sym": True,
            **options,
            "format": "auto_gptq",
            "dtype": job.dtype,
            "threads": torch.get_num_threads(),
        },
    )


def _written(scratch: Path) -> Path:
    """The directory with the model: the one asked for, or one it made inside.

    Raises:
        RuntimeError: there is not exactly one.
    """
    found = sorted({path.parent for path in scratch.rglob("config.json")})
    if len(found) != 1:
        raise RuntimeError(f"expected one model directory, got {[p.name for p in found]}")
    return found[0]


if __name__ == "__main__":
    main()
