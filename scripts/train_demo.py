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

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch
from demo_bpe import encoding, to_ranks, train_bpe
from demo_corpus import SYSTEM, Corpus, read_corpus
from demo_net import DemoNet, Shape, optimizers
from safetensors.torch import load_file, save_file
from torch import Tensor

SAVE_EVERY = 50


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result beside the text."""

    shape: Shape = field(default_factory=Shape)
    steps: int = 900
    batch: int = 6
    chat_share: float = 0.12
    warmup: int = 40
    matrix_lr: float = 0.02
    other_lr: float = 0.004
    clip: float = 1.0
    seed: int = 20
    files: int | None = None


TINY = Plan(
    shape=Shape(hidden=128, ffn=128, layers=1, ranks=384, rows=640, seq_length=64),
    steps=3,
    batch=2,
    warmup=1,
    files=8,
)
"""The same run in a second or two, for the test of determinism."""


def windows(corpus: Corpus, tokens: tiktoken.Encoding, plan: Plan) -> Tensor:
    """The training windows `[steps * batch, seq_length + 1]` int64 in the order they are used.

    Documents end with <|endoftext|> and are cut where a window ends; chats are packed the same way.
    Raises `ValueError` when the text is too short for the plan.
    """
    eod = tokens.eot_token
    rng = random.Random(plan.seed)
    texts = list(corpus.train)
    rng.shuffle(texts)
    length = plan.shape.seq_length + 1
    wanted = plan.steps * plan.batch
    chat_rows = int(wanted * plan.chat_share)
    plain = _cut(([*tokens.encode_ordinary(text), eod] for _, text in texts), length)
    rng.shuffle(plain)
    chats = _cut(([*chat_ids(tokens, turns), eod] for turns in corpus.chats), length)
    rows = plain[: wanted - chat_rows] + chats[:chat_rows]
    if len(rows) < wanted:
        raise ValueError(
            f"the text gives {len(rows)} windows, the plan needs {wanted}; lower --steps"
        )
    rng.shuffle(rows)
    return torch.tensor(rows)


def chat_ids(tokens: tiktoken.Encoding, turns: tuple[tuple[str, str], ...]) -> list[int]:
    """A conversation as ChatML ids, special forms in its text encoded as plain text."""
    start, end = (tokens.encode_single_token(f"<|im_{side}|>") for side in ("start", "end"))
    newline = tokens.encode_ordinary("\n")
    ids = [start, *tokens.encode_ordinary(f"system\n{SYSTEM}"), end]
    for question, answer in turns:
        for role, text in (("user", question), ("assistant", answer)):
            head = [*tokens.encode_ordinary(role), *newline]
            ids += [*newline, start, *head, *tokens.encode_ordinary(text), end]
    return ids


def _cut(documents: Iterable[list[int]], length: int) -> list[list[int]]:
    """Join documents and cut windows of `length` ids that overlap by one, the last one's label."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length - 1)]


def rate(step: int, plan: Plan) -> float:
    """The share of the learning rate at a step: linear warm-up, then cosine to a hundredth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


class Run:
    """A training run whose whole state (weights, optimizers, losses) can be saved and taken up."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan = plan
        self.net = DemoNet(plan.shape, plan.seed)
        self.optimizers = optimizers(self.net, plan.matrix_lr, plan.other_lr)
        self.peaks = [[g["lr"] for g in each.param_groups] for each in self.optimizers]
        self.losses: list[float] = []
        self.seconds = 0.0
        self.state, self.log = work / "state.safetensors", work / "log.json"

    def step(self, rows: Tensor) -> float:
        """One step on `rows` `[batch, seq_length + 1]`; returns the loss before it, in nats."""
        share = rate(len(self.losses), self.plan)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
        loss = self.net.loss(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        return self.losses[-1]

    def save(self) -> None:
        """Write the state beside the last one, then in its place."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, values in optimizer.state_dict()["state"].items():
                tensors.update({f"{i}.{j}.{key}": value for key, value in values.items()})
        note = {"losses": json.dumps(self.losses), "seconds": str(self.seconds)}
        new = self.state.with_suffix(".new")
        save_file({key: value.contiguous() for key, value in tensors.items()}, new, note)
        new.replace(self.state)
        self.log.write_text(note["losses"])

    def restore(self) -> bool:
        """Take up a saved state; False when there is none."""
        if not self.state.exists():
            return False
        from safetensors import safe_open

        tensors = load_file(self.state)
        with safe_open(self.state, "pt") as opened:
            note = opened.metadata()
        self.losses, self.seconds = json.loads(note["losses"]), float(note["seconds"])
        weights = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
        self.net.load_state_dict(weights)
        for i, optimizer in enumerate(self.optimizers):
            whole = optimizer.state_dict()
            for key, value in tensors.items():
                if key.startswith(f"{i}."):
                    _, j, name = key.split(".")
                    whole["state"].setdefault(int(j), {})[name] = value
            optimizer.load_state_dict(whole)
        return True


def main() -> None:
    """Parse the command line and run the story."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the bundle; without it, none")
    parser.add_argument("--work", type=Path, default=Path("build/train-demo"), help="saved states")
    parser.add_argument("--steps", type=int, help="stop after this many steps (schedule unchanged)")
    parser.add_argument("--tiny", action="store_true", help="a trial with a tiny network")
    parser.add_argument("--export", action="store_true", help="write the last state, no training")
    given = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    plan = TINY if given.tiny else Plan()
    given.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(plan.seed, limit=plan.files)
    ranks = to_ranks(train_bpe((text for _, text in corpus.train), plan.shape.ranks))
    tokens = encoding(ranks)
    rows = windows(corpus, tokens, plan)
    data_sha256 = hashlib.sha256(rows.numpy().tobytes()).hexdigest()

    run = Run(plan, given.work)
    run.restore()
    last = len(run.losses) if given.export else min(given.steps or plan.steps, plan.steps)
    while (step := len(run.losses)) < last:
        started = time.perf_counter()
        loss = run.step(rows[step * plan.batch : (step + 1) * plan.batch])
        run.seconds += time.perf_counter() - started
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}/{plan.steps} loss {loss:.4f} {run.seconds:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
            run.save()
    result = {
        "steps": len(run.losses),
        "losses": [round(loss, 6) for loss in run.losses[-3:]],
        "text_sha256": corpus.sha256,
        "windows_sha256": data_sha256,
        "seconds": round(run.seconds, 1),
    }
    if given.out:
        from demo_export import write_bundle

        result |= write_bundle(given.out, run.net, ranks, corpus, plan, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
