"""How the small checkpoints are trained: windows, schedule, optimizer, a run that can be resumed.

Shared by `train_demo.py` (original Qwen's layout) and `train_second.py` (Qwen2's); what differs
(text, tokenizer, network, what is written) is theirs.  Everything is CPU-only and deterministic:
float32, fixed seeds, a fixed number of threads and steps, windows drawn without looking at a
clock.  The same machine, Python and torch give the same bytes; elsewhere the text (other versions
of what it is read from) or the last bits of a matrix product differ, and the result with them.

The blocks' matrices are trained with Muon (momentum orthogonalised by Newton-Schulz, Jordan et al.
2024; done here in float32, because torch's own works in bfloat16, which is slow on most CPUs), the
rest with AdamW. In a short trial the two optimizers ended level.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_corpus import SYSTEM, Corpus
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_EVERY = 50
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plan:
    """What decides a run beside the text and the network."""

    steps: int = 900
    batch: int = 6
    chat_share: float = 0.12
    warmup: int = 40
    matrix_lr: float = 0.02
    other_lr: float = 0.004
    clip: float = 1.0
    seed: int = 20


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the windows need it: plain text to ids, and the ids of the special forms."""

    encode: Callable[[str], list[int]]
    end: int
    im_start: int
    im_end: int

    def chat(self, turns: Turns) -> list[int]:
        """A conversation as ChatML ids, special forms in its text encoded as plain text."""
        newline = self.encode("\n")
        ids = [self.im_start, *self.encode(f"system\n{SYSTEM}"), self.im_end]
        for question, answer in turns:
            for role, text in (("user", question), ("assistant", answer)):
                head = [*self.encode(role), *newline]
                ids += [*newline, self.im_start, *head, *self.encode(text), self.im_end]
        return ids


def windows(corpus: Corpus, words: Vocabulary, plan: Plan, seq_length: int) -> Tensor:
    """The training windows `[steps * batch, seq_length + 1]` int64 in the order they are used.

    Documents end with <|endoftext|> and are cut where a window ends; chats are packed the same way.
    Raises `ValueError` when the text is too short for the plan.
    """
    rng = random.Random(plan.seed)
    texts = list(corpus.train)
    rng.shuffle(texts)
    length = seq_length + 1
    wanted = plan.steps * plan.batch
    chat_rows = int(wanted * plan.chat_share)
    plain = _cut(([*words.encode(text), words.end] for _, text in texts), length)
    rng.shuffle(plain)
    chats = _cut(([*words.chat(turns), words.end] for turns in corpus.chats), length)
    rows = plain[: wanted - chat_rows] + chats[:chat_rows]
    if len(rows) < wanted:
        raise ValueError(
            f"the text gives {len(rows)} windows, the plan needs {wanted}; lower --steps"
        )
    rng.shuffle(rows)
    return torch.tensor(rows)


def _cut(documents: Iterable[list[int]], length: int) -> list[list[int]]:
    """Join documents and cut windows of `length` ids that overlap by one, the last one's label."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length - 1)]


def initialise(net: nn.Module, seed: int, layers: int, deep: tuple[str, ...]) -> None:
    """Seeded weights: matrices normal with 0.02, those named `deep` (which write to the residual
    stream) less by the square root of twice the layers; biases zero; gains stay one."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.dim() == 2:
            std = 0.02 / (2 * layers) ** 0.5 if name.endswith(deep) else 0.02
            nn.init.normal_(weight, std=std, generator=generator)


def rate(step: int, plan: Plan) -> float:
    """The share of the learning rate at a step: linear warm-up, then cosine to a hundredth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """An approximately orthogonal matrix near `x` `[..., m, n]`, by quintic Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    y: Tensor = x.mT if tall else x
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return y.mT if tall else y


class Muon(torch.optim.Optimizer):
    """Muon for matrices: Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns)).

    A matrix that is several in one (original Qwen's `c_attn`) is cut before orthogonalising
    (`parts` in its group).
    """

    def __init__(self, groups: Iterable[dict[str, object]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": 0.01, "parts": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight once; `closure` is not used."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                moving = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(moving, group["momentum"])
                pieces = update.unflatten(0, (group["parts"], -1))
                turned = orthogonalise(pieces)
                scale = max(1.0, pieces.shape[-2] / pieces.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(turned.flatten(0, 1), alpha=-group["lr"] * scale)


def optimizers(
    net: nn.Module, plan: Plan, blocks: str, fused: str = ""
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head, gains and biases.

    `blocks` is what their names contain; `fused` ends the names of those that hold three matrices.
    """
    triple, matrices, others = [], [], []
    for name, weight in net.named_parameters():
        if weight.dim() != 2 or blocks not in name:
            others.append(weight)
        elif fused and name.endswith(fused):
            triple.append(weight)
        else:
            matrices.append(weight)
    groups: list[dict[str, object]] = [{"params": triple, "parts": 3}] if triple else []
    groups.append({"params": matrices})
    return [
        Muon(groups, lr=plan.matrix_lr, momentum=0.95),
        torch.optim.AdamW(others, lr=plan.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Run:
    """A training run whose whole state (weights, optimizers, losses) can be saved and taken up.

    `loss` is the mean next-token cross-entropy of `net` on `[batch, seq_length + 1]` ids, in nats.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor], Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        plan: Plan,
        work: Path,
    ) -> None:
        self.plan, self.net, self.loss, self.optimizers = plan, net, loss, optimizers
        self.peaks = [[g["lr"] for g in each.param_groups] for each in self.optimizers]
        self.losses: list[float] = []
        self.seconds = 0.0
        self.state, self.log = work / "state.safetensors", work / "log.json"
        work.mkdir(parents=True, exist_ok=True)

    def step(self, rows: Tensor) -> float:
        """One step on `rows` `[batch, seq_length + 1]`; returns the loss before it, in nats."""
        share = rate(len(self.losses), self.plan)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
        loss = self.loss(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        return self.losses[-1]

    def train(self, rows: Tensor, last: int) -> None:
        """Steps on `rows` (as `windows` gives them) until `last` have been made, saved on the way.

        A word every ten steps goes to stdout.
        """
        plan = self.plan
        while (step := len(self.losses)) < last:
            started = time.perf_counter()
            loss = self.step(rows[step * plan.batch : (step + 1) * plan.batch])
            self.seconds += time.perf_counter() - started
            if (step + 1) % 10 == 0:
                print(
                    f"step {step + 1}/{plan.steps} loss {loss:.4f} {self.seconds:.0f} s", flush=True
                )
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
                self.save()

    def save(self) -> None:
        """Write the state beside the last one, then in its place."""
        tensors = {f"net.{name}": value.data for name, value in self.net.named_parameters()}
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
        tensors = load_file(self.state)
        with safe_open(self.state, "pt") as opened:
            note = opened.metadata()
        self.losses, self.seconds = json.loads(note["losses"]), float(note["seconds"])
        with torch.no_grad():
            for name, weight in self.net.named_parameters():
                weight.copy_(tensors[f"net.{name}"])
        for i, optimizer in enumerate(self.optimizers):
            whole = optimizer.state_dict()
            for key, value in tensors.items():
                if key.startswith(f"{i}."):
                    _, j, name = key.split(".")
                    whole["state"].setdefault(int(j), {})[name] = value
            optimizer.load_state_dict(whole)
        return True


def command_line(description: str, work: Path) -> argparse.Namespace:
    """The options that both trainings have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="where to write the result; without it, nowhere")
    parser.add_argument("--work", type=Path, default=work, help="saved states")
    parser.add_argument("--steps", type=int, help="stop after this many steps (schedule unchanged)")
    parser.add_argument("--tiny", action="store_true", help="a trial with a tiny network")
    parser.add_argument("--export", action="store_true", help="write the last state, no training")
    return parser.parse_args()


def deterministic(threads: int) -> None:
    """Fixed threads and deterministic kernels, for the rest of this process."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
