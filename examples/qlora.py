"""Q-LoRA: train a LoRA adapter on a quantized directory, save it, put it back on the base.

    python examples/qlora.py Qwen-7B-NF4  --text mine.txt -o adapter
    python examples/qlora.py Qwen-7B-Int4 --text mine.txt -o adapter      # a GPTQ directory
    python examples/qlora.py Qwen-7B      --text mine.txt -o adapter --method nf4

The base stays as it is and is never saved: an adapter is a few megabytes beside it, and belongs to
that base (trained on NF4, it has learned NF4's errors too). Needs peft, and bitsandbytes for
bitsandbytes directories (`pip install 'qquant[bnb]'`), or gptqmodel and optimum for GPTQ ones
(`'qquant[readers]'`).

What to know:

- Targets are every linear of a block, by family; see `TARGETS`. Original Qwen's names end the same
  way twice (`attn.c_proj`, `mlp.c_proj`), which is why they are given with their parent.
- The base is loaded in the dtype that its device computes in, once, and not cast afterwards
  (`prepare_model_for_kbit_training` would turn embedding, head and norms to float32): so the
  reloaded pair gives the very same logits. Only the adapter's own weights are float32.
- Gradient checkpointing costs one more forward and saves most of the activations. It is not
  reentrant here, so no input needs a gradient of its own.
- On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights at a forward in eval mode. Products
  with those have no backward pass and round differently: `load_base` turns that off, for training
  and for the reloaded pair.
- GPTQ needs a kernel with a backward pass: `backend="auto_trainable"`.

Not here: a data loader, a schedule, mixed-length batches. Use a trainer for real runs; what it
needs to know about these models is above.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NATIVE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, list[str]] = {
    "qwen": ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"],
    "qwen2": _NATIVE,
    "qwen3": _NATIVE,
}


def load_base(path: Path, method: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer or None) of a bitsandbytes or GPTQ directory, frozen.

    Args:
        method: quantize a 16-bit directory with bitsandbytes while it is loaded.
    """
    import qquant

    quant = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    if quant.get("quant_method") != "gptq":
        if not quant and method is None:
            sys.exit(f"{path} is not quantized: give --method nf4 to quantize it on loading")
        loaded = qquant.load(path, method=method)
        for module in loaded.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return loaded.model, loaded.tokenizer
    # transformers with gptqmodel, whose kernels peft knows.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    qquant.register()
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=GPTQConfig(bits=quant["bits"], backend="auto_trainable"),
        dtype=torch.float16 if cuda else torch.float32,
        device_map={"": 0 if cuda else "cpu"},
    )
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(path) if has_tokenizer else None


def attach(model: Any, rank: int = 64, alpha: int = 16, dropout: float = 0.05) -> Any:
    """The model with a fresh LoRA adapter on every linear of its blocks, ready to train.

    The defaults are what Qwen's own fine-tuning script used for Q-LoRA.
    """
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    model.config.use_cache = False
    once = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer transformers
        model.activation_checkpointing_enable(once)
    else:
        model.gradient_checkpointing_enable(once)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=TARGETS[model.config.model_type],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(model: Any, ids: Tensor, steps: int, *, batch: int, rate: float) -> list[float]:
    """AdamW on rows of `ids` [n, seqlen] in turn; the loss of every step, before it."""
    device = model.get_input_embeddings().weight.device
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=rate, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        start = step * batch % max(len(ids) - batch + 1, 1)
        rows = ids[start : start + batch].to(device)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step + 1:4}  loss {losses[-1]:.4f}", file=sys.stderr)
    model.eval()
    return losses


@torch.no_grad()
def logits_of(model: Any, rows: Tensor) -> Tensor:
    """[b, t, vocabulary] on the CPU."""
    found: Tensor = model(input_ids=rows.to(model.get_input_embeddings().weight.device)).logits
    return found.cpu()


def token_rows(tokenizer: Any, text: str, seqlen: int) -> Tensor:
    """The text as int64 [n, seqlen], the remainder dropped."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The whole round; the last line on stdout is JSON, which is also returned."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path, help="a quantized directory (or see --method)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the adapter's directory")
    parser.add_argument("--text", type=Path, required=True, help="what to learn, plain text")
    parser.add_argument("--method", choices=("nf4", "fp4", "int8"), help="quantize BASE on the fly")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(args.seed)

    base, tokenizer = load_base(args.base, args.method)
    ids = token_rows(tokenizer, args.text.read_text(encoding="utf-8"), args.seqlen)
    model = attach(base, rank=args.rank)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = logits_of(model.eval(), ids[:1])
    losses = train(model, ids, args.steps, batch=args.batch, rate=args.rate)
    model.save_pretrained(args.output)
    after = logits_of(model, ids[:1])
    del model, base

    from peft import PeftModel

    again, _ = load_base(args.base, args.method)
    reloaded = PeftModel.from_pretrained(again, args.output).eval()
    difference = float((logits_of(reloaded, ids[:1]) - after).abs().max())
    result = {
        "losses": losses,
        "trainable": count,
        "moved": float((after - before).abs().max()),
        "reloaded_difference": difference,
        "adapter_bytes": sum(f.stat().st_size for f in args.output.iterdir() if f.is_file()),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
