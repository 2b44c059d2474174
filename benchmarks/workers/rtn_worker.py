"""Rounds to nearest, the floor every method has to beat.

Symmetric per group, scale 2·amax/(2^bits − 1), as AutoGPTQ's and GPTQModel's grids have it
without search: codes 0 .. 2^bits − 1 around the zero 2^(bits−1). Written here in a few lines on
purpose, so that the baseline owes nothing to the tools compared. The result is stored as plain
float32 weights, scales rounded to float16 first, as a GPTQ file would hold them; so its file size
means nothing.
"""

from __future__ import annotations

import shutil

from common import Job


def main() -> None:
    job = Job.from_argv()
    with job.clock("import"):
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        torch.set_num_threads(job.threads)
    high = 2**job.bits - 1
    zero = 2 ** (job.bits - 1)
    job.out.mkdir(parents=True)
    for file in sorted(job.checkpoint.glob("*.safetensors")):
        with job.clock("load"), safe_open(str(file), framework="pt") as reader:
            part = {name: reader.get_tensor(name).float() for name in reader.keys()}
        with job.clock("quantize"):
            for name, w in part.items():
                if not name.endswith("_proj.weight"):
                    continue
                group = w.shape[1] if job.group_size == -1 else job.group_size
                rows = w.view(w.shape[0], -1, group)
                scale = 2 * rows.abs().amax(-1, keepdim=True) / high
                scale = scale.clamp(min=1e-8).half().float()
                codes = (rows / scale + zero).round().clamp(0, high)
                part[name] = ((codes - zero) * scale).view_as(w)
        with job.clock("save"):
            save_file(part, str(job.out / file.name), metadata={"format": "pt"})
    for file in job.checkpoint.glob("*.json"):
        shutil.copy(file, job.out / file.name)
    job.finish(("torch",), {"bits": job.bits, "group_size": job.group_size, "sym": True})


if __name__ == "__main__":
    main()
