"""Train the second small checkpoint: `python scripts/train_second.py --out DIRECTORY`.

A language model in Qwen2's layout (grouped-query attention, tied embeddings, plain transformers),
trained on other text than the bundled demo (`second_corpus.py`), so that what is measured on the
demo can be confirmed on a model that shares neither layout, text nor vocabulary with it.  It is not
bundled: eleven minutes on two cores make it, the same bytes every time on one machine (see
`training.py`, which does the work).

DIRECTORY gets `model` (a checkpoint that `from_pretrained` reads), `heldout.txt` (files that
neither the network nor its vocabulary saw), `domain.txt` (training text, to calibrate on text of
the model's own domain) and `measured.json`.

The state is saved every 50 steps under `--work` and an interrupted run goes on from there.
`--export` writes the last saved state without training further.  The last line printed is JSON.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from demo_bpe import train_bpe
from demo_corpus import Corpus
from demo_measure import held_out_loss, rounded_blocks
from second_corpus import read_docs
from tokenizers import Tokenizer, decoders
from torch import Tensor
from training import (
    Plan,
    Run,
    Vocabulary,
    command_line,
    deterministic,
    initialise,
    optimizers,
    windows,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""As Qwen2 has them; their ids follow the merges'."""
VOCABULARY_CHARACTERS = 3_000_000
DOMAIN_CHARACTERS = 1_200_000


@dataclass(frozen=True)
class SecondPlan(Plan):
    """Everything that decides the result beside the text."""

    steps: int = 580
    chat_share: float = 0.08
    warmup: int = 30
    hidden: int = 256
    ffn: int = 640
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    rows: int = 2048
    seq_length: int = 512
    threads: int = 2
    files: int | None = None

    def config(self) -> Qwen2Config:
        """The network's configuration."""
        return Qwen2Config(
            vocab_size=self.rows,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4 * self.seq_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=self.rows - len(SPECIALS),
            pad_token_id=self.rows - len(SPECIALS),
        )


TINY = SecondPlan(
    steps=6, batch=2, warmup=1, hidden=128, ffn=128, layers=1, heads=2, kv_heads=1, rows=384,
    seq_length=64, files=60,
)  # fmt: skip
"""The same run in a second or two, for the test of determinism."""


@dataclass
class Second:
    """Text, tokenizer and network of one plan, before training."""

    plan: SecondPlan
    corpus: Corpus = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    net: Qwen2ForCausalLM = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        self.corpus = read_docs(plan.seed, limit=plan.files)
        self.tokenizer = train_bpe(
            sample(self.corpus, VOCABULARY_CHARACTERS, plan.seed), plan.rows - len(SPECIALS)
        )
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens(list(SPECIALS))
        if self.tokenizer.get_vocab_size() != plan.rows:
            raise ValueError(
                f"expected {plan.rows} tokens, got {self.tokenizer.get_vocab_size()}; "
                "train on more text"
            )
        self.net = Qwen2ForCausalLM(plan.config())
        initialise(self.net, plan.seed, plan.layers, ("o_proj.weight", "down_proj.weight"))

    def vocabulary(self) -> Vocabulary:
        """The tokenizer as `training` wants it."""
        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.encode_special_tokens = True
        ids = (self.tokenizer.token_to_id(form) for form in SPECIALS)
        return Vocabulary(lambda text: list(plain.encode(text).ids), *ids)

    def logits(self, ids: Tensor) -> Tensor:
        """ids `[batch, length]` to logits `[batch, length, rows]`."""
        out: Tensor = self.net(input_ids=ids, use_cache=False).logits
        return out

    def loss(self, ids: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats over `ids` `[batch, length + 1]`."""
        return F.cross_entropy(self.logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def write(self, out: Path, run: dict[str, object]) -> dict[str, object]:
        """Write model, texts and measurements; the measurements are of the bfloat16 weights.

        How long it took is left out, so that the same run writes the same bytes.
        """
        model, plan = out / "model", self.plan
        model.mkdir(parents=True, exist_ok=True)
        self.net.to(torch.bfloat16).save_pretrained(str(model))
        self.tokenizer.save(str(model / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIALS[0],
            "pad_token": SPECIALS[0],
            "model_max_length": 4 * plan.seq_length,
        }
        _write_json(model / "tokenizer_config.json", settings)
        held_out = self.corpus.held_out_text()
        (out / "heldout.txt").write_text(held_out, encoding="utf-8")
        domain = "\n\n".join(sample(self.corpus, DOMAIN_CHARACTERS, plan.seed + 1))
        (out / "domain.txt").write_text(domain + "\n", encoding="utf-8")

        ids = self.vocabulary().encode(held_out)
        self.net.float().eval()
        tensors = {name: value.data for name, value in self.net.named_parameters()}
        measured: dict[str, object] = {"heldout_tokens": len(ids)}
        measured["bf16"] = held_out_loss(self.net, ids, plan.seq_length, 80).rounded()
        rough = rounded_blocks(tensors, blocks="model.layers.")
        self.net.load_state_dict(rough, strict=False)
        measured["rtn3_g128"] = held_out_loss(self.net, ids, plan.seq_length, 80).rounded()
        measured |= {
            "parameters": sum(value.numel() for value in tensors.values()),
            "training_tokens": int(str(run["steps"])) * plan.batch * plan.seq_length,
            **{key: value for key, value in run.items() if key != "seconds"},
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        }
        _write_json(out / "measured.json", measured)
        return measured


def sample(corpus: Corpus, characters: int, seed: int) -> list[str]:
    """Training documents in a seeded order, until they have that many characters."""
    texts = [text for _, text in corpus.train]
    random.Random(seed).shuffle(texts)
    kept, size = [], 0
    for text in texts:
        if size >= characters:
            break
        kept.append(text)
        size += len(text)
    return kept


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and run the story."""
    given = command_line((__doc__ or "").split("\n\n")[0], Path("build/train-second"))
    plan = TINY if given.tiny else SecondPlan()
    deterministic(plan.threads)
    second = Second(plan)
    rows = windows(second.corpus, second.vocabulary(), plan, plan.seq_length)
    parts = optimizers(second.net, plan, "model.layers.")
    run = Run(second.net, second.loss, parts, plan, given.work)
    run.restore()
    last = len(run.losses) if given.export else min(given.steps or plan.steps, plan.steps)
    run.train(rows, last)
    result: dict[str, object] = {
        "steps": len(run.losses),
        "losses": [round(loss, 6) for loss in run.losses[-3:]],
        "text_sha256": second.corpus.sha256,
        "windows_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "seconds": round(run.seconds, 1),
    }
    if given.out:
        result |= second.write(given.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
