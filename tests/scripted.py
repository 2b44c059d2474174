"""Checkpoints that say one known thing: each token is followed by the next of a text.

The embedding gives every token a random direction, the blocks add next to nothing, and the head's
row for a token is the direction of the token before it in the text. So the answer is known without
any patching of code, survives quantizing, sampling and other processes, and ends with
`<|im_end|>`. No token may come twice, or what follows it would not be known.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from qwen_tiny import N_RANKS, tiny_config, write_checkpoint, write_ranks
from torch import Tensor

from qquant.models.qwen.modeling_qwen import QWenLMHeadModel
from qquant.models.qwen.tokenization_qwen import QWenTokenizer

# The Chinese character is three tokens of the tiny vocabularies, none of them a whole character.
SAYS = "Oui, 好é!"


def teach(embedding: Tensor, head: Tensor, chain: list[int]) -> None:
    """Fill `[rows, hidden]` embedding and head so that each id of `chain` leads to the next."""
    assert len(set(chain)) == len(chain), "a token that comes twice"
    directions = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    embedding.copy_(directions / directions.norm(dim=-1, keepdim=True))
    head.zero_()
    for before, after in pairwise(chain):
        head[after] = 8.0 * embedding[before]


def write_scripted_qwen(path: Path, says: str = SAYS) -> Path:
    """An original Qwen chat checkpoint (without code files) that answers `says` to everything."""
    write_checkpoint(path, code=False)
    tokenizer = QWenTokenizer(write_ranks(path / "qwen.tiktoken"))
    torch.manual_seed(0)
    model = QWenLMHeadModel(tiny_config(hidden_size=64, initializer_range=1e-3)).eval()
    chain = [*tokenizer.encode("\n"), *tokenizer.encode(says), tokenizer.im_end_id]
    with torch.no_grad():
        teach(model.transformer.wte.weight, model.lm_head.weight, chain)
    kept = (path / "generation_config.json").read_text()
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(kept)
    config = json.loads((path / "config.json").read_text())
    config.pop("auto_map", None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_scripted_qwen2(path: Path, says: str = SAYS) -> Path:
    """A native Qwen2 chat checkpoint with a byte-level tokenizer that answers `says`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from qquant.models.qwen.tokenization_qwen import BYTE_TO_CHAR, CHAT_TEMPLATE, SPECIAL_TOKENS

    rust = Tokenizer(models.BPE({char: i for i, char in enumerate(BYTE_TO_CHAR)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS[:3]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=1e-3,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = Qwen2ForCausalLM(config).eval()
    chain = [10, *says.encode(), end]
    with torch.no_grad():
        teach(model.model.embed_tokens.weight, model.lm_head.weight, chain)
    model.generation_config.max_new_tokens = 40
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def calibration_ids() -> Tensor:
    """`[4, 64]` calibration ids within both vocabularies."""
    return torch.randint(0, min(N_RANKS, 256), (4, 64), generator=torch.Generator().manual_seed(2))
