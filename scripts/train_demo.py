"""Train the bundled demo checkpoint: `python scripts/train_demo.py --out demo`.

The run as one story: read the Python library, train the merges, cut text and chats into windows,
train the network, and write the bundle in the original Qwen layout.  It is CPU-only and
deterministic: one thread, float32, fixed seeds, a fixed number of steps, windows drawn without
looking at a clock.  The same machine, Python and torch give the same bytes; elsewhere the text
(another library version) or the last bits of a matrix product differ, and the result differs with
them.  The text's hash and the versions are written to the card.

The state is saved every 50 steps under `--work` and an interrupted run goes on from there.
`--export` writes the bundle from the last saved state without training further.

The last line printed is JSON.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
from demo_bpe import encoding, to_ranks, train_bpe
from demo_corpus import read_corpus
from demo_net import DemoNet, Shape
from training import Plan, Run, Vocabulary, command_line, deterministic, optimizers, windows


@dataclass(frozen=True)
class DemoPlan(Plan):
    """Everything that decides the result beside the text."""

    shape: Shape = field(default_factory=Shape)
    files: int | None = None


TINY = DemoPlan(
    shape=Shape(hidden=128, ffn=128, layers=1, ranks=384, rows=640, seq_length=64),
    steps=3,
    batch=2,
    warmup=1,
    files=8,
)
"""The same run in a second or two, for the test of determinism."""


def vocabulary(tokens: tiktoken.Encoding) -> Vocabulary:
    """The demo's encoding as `training` wants it."""
    start, end = (tokens.encode_single_token(f"<|im_{side}|>") for side in ("start", "end"))
    return Vocabulary(tokens.encode_ordinary, tokens.eot_token, start, end)


def main() -> None:
    """Parse the command line and run the story."""
    given = command_line((__doc__ or "").split("\n\n")[0], Path("build/train-demo"))
    deterministic(threads=1)
    plan = TINY if given.tiny else DemoPlan()
    corpus = read_corpus(plan.seed, limit=plan.files)
    ranks = to_ranks(train_bpe((text for _, text in corpus.train), plan.shape.ranks))
    rows = windows(corpus, vocabulary(encoding(ranks)), plan, plan.shape.seq_length)

    net = DemoNet(plan.shape, plan.seed)
    parts = optimizers(net, plan, "transformer.h.", fused="c_attn.weight")
    run = Run(net, net.loss, parts, plan, given.work)
    run.restore()
    last = len(run.losses) if given.export else min(given.steps or plan.steps, plan.steps)
    run.train(rows, last)
    result = {
        "steps": len(run.losses),
        "losses": [round(loss, 6) for loss in run.losses[-3:]],
        "text_sha256": corpus.sha256,
        "windows_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "seconds": round(run.seconds, 1),
    }
    if given.out:
        from demo_export import write_bundle

        result |= write_bundle(given.out, net, ranks, corpus, plan, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
