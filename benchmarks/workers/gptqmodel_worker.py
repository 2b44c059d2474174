"""Quantizes with GPTQModel.

Its defaults unless the job's options say otherwise: damping 0.05, group-aware order, one forward
per group of linears. `options` are `QuantizeConfig` fields, and `batch_size` (default 1,
GPTQModel's own). `GPTQMODEL_CPU_WORKERS` must be at least 2 in the environment: on two cores it
computes 1 and then refuses to start. The first run in a fresh environment may compile a packing
extension; the harness warms it up before it times.
"""

from __future__ import annotations

from common import Job


def main() -> None:
    job = Job.from_argv()
    with job.clock("import"):
        import torch
        from gptqmodel import GPTQModel, QuantizeConfig

        torch.set_num_threads(job.threads)
    options = dict(job.options)
    batch_size = int(options.pop("batch_size", 1))
    with job.clock("load"):
        tokens = job.read_tokens()
        config = QuantizeConfig(bits=job.bits, group_size=job.group_size, sym=True, **options)
        model = GPTQModel.load(
            str(job.checkpoint), config, dtype=getattr(torch, job.dtype), device="cpu"
        )
        rows = [{"input_ids": r[None], "attention_mask": torch.ones_like(r)[None]} for r in tokens]
    with job.clock("quantize"):
        model.quantize(rows, batch_size=batch_size)
    with job.clock("save"):
        model.save(str(job.out))
    shown = "bits group_size sym desc_act damp_percent act_group_aware static_groups mse"
    used = {key: getattr(config, key, None) for key in shown.split()}
    job.finish(
        ("gptqmodel", "torch", "transformers"),
        {**used, "batch_size": batch_size, "dtype": job.dtype, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    main()
