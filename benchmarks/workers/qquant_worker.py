"""Quantizes with qquant, as its command does, given the tokens.

qquant imports late what a run may not need; transformers' modelling code is imported here with
the rest, as the other tools' own imports do, so that `work` means the same for all. `wall` counts
everything anyway.

`options`: `recipe` (default `default`) and any `QuantSpec` field. One call reads, quantizes,
writes, reopens and verifies, so all of that counts as `quantize` and `load` and `save` are 0:
beside the other tools, whose parts are timed apart, this is to be compared with the sum of
theirs. The events of the run also give its own breakdown, in `stages`. The job's dtype may be
`auto`, which is its default.
"""

from __future__ import annotations

import time
from typing import Any

from common import Job


def main() -> None:
    job = Job.from_argv()
    with job.clock("import"):
        import torch
        import transformers.activations
        import transformers.modeling_layers
        import transformers.modeling_utils  # noqa: F401

        from qquant.config import CalibrationSpec, OutputSpec, spec_from_recipe
        from qquant.convert import quantize
        from qquant.events import Stage

        torch.set_num_threads(job.threads)
    options = dict(job.options)
    recipe = str(options.pop("recipe", "default"))
    spec = spec_from_recipe(recipe, bits=job.bits, group_size=job.group_size, **options)
    stages: dict[str, float] = {}
    current = ["start", time.perf_counter()]

    def watch(event: Any) -> None:
        if isinstance(event, Stage):
            now = time.perf_counter()
            stages[current[0]] = stages.get(current[0], 0.0) + now - current[1]
            current[:] = [event.name, now]

    with job.clock("quantize"):
        tokens = job.read_tokens()
        made = quantize(
            job.checkpoint,
            job.out,
            spec,
            CalibrationSpec(samples=tokens.shape[0], seqlen=tokens.shape[1]),
            OutputSpec(),
            device="cpu",
            compute_dtype=job.dtype,
            progress=watch,
            tokens=tokens,
        )
        watch(Stage("end"))
    settings = {"recipe": recipe, **spec.to_dict(), "threads": torch.get_num_threads()}
    settings["dtype"] = made.compute_dtype
    job.finish(("qquant", "torch", "transformers"), {**settings, "stages": stages})


if __name__ == "__main__":
    main()
