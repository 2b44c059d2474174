"""Quantizes with llm-compressor's `GPTQModifier` and its sequential pipeline.

Its defaults unless the job's options say otherwise: damping 0.01, static activation order, minmax
observer. `options`: `batch_size` (default 1, its own), `dampening_frac`, `actorder`, `observer`.
It writes compressed-tensors (`pack-quantized`), whose scales have the compute type.
"""

from __future__ import annotations

from common import Job


def main() -> None:
    job = Job.from_argv()
    with job.clock("import"):
        import torch
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(job.threads)
    options = dict(job.options)
    batch_size = int(options.pop("batch_size", 1))
    observer = str(options.pop("observer", "memoryless_minmax"))
    with job.clock("load"):
        tokens = job.read_tokens()
        model = AutoModelForCausalLM.from_pretrained(
            str(job.checkpoint), dtype=getattr(torch, job.dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(str(job.checkpoint))
        rows = tokens.tolist()
        data = Dataset.from_dict(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        )
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": job.group_size,
        "observer": observer,
    }
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        **options,
    )
    with job.clock("quantize"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=recipe,
            max_seq_length=tokens.shape[1],
            num_calibration_samples=tokens.shape[0],
            batch_size=batch_size,
            shuffle_calibration_samples=False,
        )
    with job.clock("save"):
        model.save_pretrained(str(job.out), save_compressed=True)
    job.finish(
        ("llmcompressor", "compressed-tensors", "torch", "transformers"),
        {
            **weights,
            "dampening_frac": recipe.dampening_frac,
            "actorder": str(options.get("actorder", "static")),
            "batch_size": batch_size,
            "dtype": job.dtype,
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    main()
