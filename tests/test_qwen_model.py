"""The network equals the original code's golden outputs, and every way to run it agrees."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_tiny import GOLDEN, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from qquant.models.qwen.configuration_qwen import QWenConfig
from qquant.models.qwen.modeling_qwen import QWenBlock, QWenLMHeadModel, QWenRotaryEmbedding

TINY = GOLDEN / "qwen1-tiny"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> QWenLMHeadModel:
    return QWenLMHeadModel.from_pretrained(TINY, attn_implementation=request.param).eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(seed))


# --- golden -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["short", "long", "leftpad"])
def test_logits_equal_the_original(
    model: QWenLMHeadModel, golden: dict[str, Tensor], case: str
) -> None:
    mask = golden.get(f"{case}.attention_mask")
    with torch.no_grad():
        logits = model(golden[f"{case}.input_ids"], attention_mask=mask).logits
    assert logits.dtype == torch.float32
    error = (logits - golden[f"{case}.logits"]).abs().amax(-1)
    if mask is not None:
        assert mask[0].sum() == 27
        error = error[mask.bool()]
    assert error.max() < 1e-4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", ["greedy_short", "greedy_long"])
def test_greedy_equals_the_original(
    model: QWenLMHeadModel, golden: dict[str, Tensor], case: str, cache: str
) -> None:
    prompt, expected = golden[f"{case}.input_ids"], golden[f"{case}.output_ids"]
    steps = expected.shape[1]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, prompt.shape[1] :], expected)
    logits = torch.stack(out.logits, dim=1)
    assert (logits - golden[f"{case}.step_logits"]).abs().max() < 1e-4


def test_tensor_names_are_the_published_ones(model: QWenLMHeadModel) -> None:
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        published = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == published
    assert not list(model.buffers())


# --- the two tricks for long prompts -------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 127, 128, 129, 300])
def test_ntk_factor_follows_the_formula(length: int) -> None:
    model = tiny_model()
    doublings = model.transformer.ntk_doublings(torch.arange(length)[None])
    k = 0 if doublings is None else int(doublings)
    alpha = max(2 ** math.ceil(math.log2(length / 32) + 1) - 1, 1)
    assert 2 ** (k + 1) - 1 == alpha
    cos, sin = QWenRotaryEmbedding(model.config)(torch.arange(length)[None], doublings)
    base = 10000 * alpha ** (32 / 30)
    angles = torch.outer(
        torch.arange(length).double(), base ** (-torch.arange(0, 32, 2).double() / 32)
    )
    assert (cos[0, :, :16] - angles.cos()).abs().max() < 1e-4
    assert (sin[0, :, 16:] - angles.sin()).abs().max() < 1e-4


def test_ntk_factor_stays_that_of_the_prompt() -> None:
    """Decoding past seq_length keeps the prompt's factor; with a prompt that long it is another."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    text = ids(1, 40)
    with torch.no_grad():
        model(text[:, :30], past_key_values=cache)
        kept = torch.cat(
            [model(text[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)], 1
        )
        whole = model(text).logits[:, 30:]
        model.config.use_dynamic_ntk = False
        without = model(text).logits[:, 30:]
    assert (kept - without).abs().max() < 1e-4
    assert (kept - whole).abs().max() > 1e-2


def test_reset_cache_forgets_the_factor() -> None:
    model = tiny_model()
    with torch.no_grad():
        expected = model(ids(1, 20, seed=2)).logits
        cache = StaticCache(config=model.config, max_cache_len=80)
        model(ids(1, 70), past_key_values=cache)
        cache.reset()
        assert torch.allclose(
            model(ids(1, 20, seed=2), past_key_values=cache).logits, expected, atol=1e-5
        )


def greedy(model: QWenLMHeadModel, prompt: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | options
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, attention_mask=mask, pad_token_id=511, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_read_in_parts_has_the_factor_of_all_of_it(cache: str) -> None:
    """Two rows of 100 and 40 tokens in parts of 24: seq_length, 32, is passed within the third."""
    model = tiny_model()
    prompt, mask = ids(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[1, :60] = 0
    options = {"attention_mask": mask, "cache_implementation": cache}
    parts = greedy(model, prompt, prefill_chunk_size=24, **options)
    assert torch.equal(parts, greedy(model, prompt, **options))
    model.config.use_dynamic_ntk = False
    assert not torch.equal(parts, greedy(model, prompt, **options))


def test_a_beginning_read_first_needs_the_length_of_the_prompt() -> None:
    model = tiny_model()
    prompt = ids(1, 40)
    expected = greedy(model, prompt)
    for said in (True, False):
        cache = DynamicCache(config=model.config)
        if said:
            model.transformer.expect_prompt(cache, 40)
        with torch.no_grad():
            model(prompt[:, :20], past_key_values=cache)
        if said:
            assert torch.equal(greedy(model, prompt, past_key_values=cache), expected)
            continue
        with pytest.warns(UserWarning, match="begun for a shorter prompt than this one of 40"):
            greedy(model, prompt, past_key_values=cache)


def test_candidates_do_not_change_the_factor() -> None:
    """A prompt of 30 tokens and its candidates are more than seq_length, the prompt is not."""
    model = tiny_model()
    prompt = ids(1, 6).repeat(1, 5)
    seen: list[Any] = []
    read = model.transformer.rotary_emb.forward

    def spy(positions: Tensor, doublings: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen.append((positions.shape[1], doublings))
        return read(positions, doublings)

    model.transformer.rotary_emb.forward = spy  # type: ignore[method-assign]
    found = greedy(model, prompt, prompt_lookup_num_tokens=6)
    assert max(length for length, _ in seen) > 32 and all(k is None for _, k in seen)
    assert torch.equal(found, greedy(model, prompt))


def test_a_caller_s_cache_is_not_held_to_the_last_prompt() -> None:
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=80)
    greedy(model, ids(1, 70), past_key_values=cache, max_new_tokens=1, min_new_tokens=1)
    cache.reset()
    with torch.no_grad():
        found = model(ids(1, 20, seed=2), past_key_values=cache).logits
        assert torch.allclose(found, model(ids(1, 20, seed=2)).logits, atol=1e-5)


@pytest.mark.parametrize("on", ["use_dynamic_ntk", "use_logn_attn"])
def test_continuous_batching_is_refused(on: str) -> None:
    """All requests in one row: neither trick could tell them apart."""
    both = {"use_dynamic_ntk": False, "use_logn_attn": False}
    model = tiny_model(**(both | {on: True}))
    with pytest.raises(ValueError, match=rf"where {on} cannot tell prompts apart.*to False"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="continuous batching"), torch.no_grad():
        model(ids(1, 5), cache=object())
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match="continuous batching"), torch.no_grad():
        model(ids(1, 5))
    assert tiny_model(**both).init_continuous_batching() is not None


@pytest.mark.parametrize("switch", ["use_dynamic_ntk", "use_logn_attn"])
def test_tricks_act_only_beyond_seq_length_and_in_inference(switch: str) -> None:
    on, off = tiny_model(), tiny_model(**{switch: False})
    with torch.no_grad():
        assert torch.equal(on(ids(1, 32)).logits, off(ids(1, 32)).logits)
        assert not torch.allclose(on(ids(1, 50)).logits, off(ids(1, 50)).logits, atol=1e-3)
        on.train(), off.train()
        assert torch.equal(on(ids(1, 50)).logits, off(ids(1, 50)).logits)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_padded_batch_equals_single_rows(attn: str) -> None:
    """Rows of 10, 40 and 100 tokens, seq_length 32: each its own factor and positions."""
    model = tiny_model(attn=attn)
    lengths, width = [10, 40, 100], 100
    batch = torch.full((3, width), 300)
    mask = torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch[row, -length:] = ids(length, seed=row)
        mask[row, -length:] = 1
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 511}
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
    together = model.generate(batch, attention_mask=mask, **options)
    static = model.generate(batch, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(together, static)
    for row, length in enumerate(lengths):
        single = batch[row : row + 1, -length:]
        with torch.no_grad():
            alone = model(single).logits
        assert (logits[row : row + 1, -length:] - alone).abs().max() < 1e-4
        out = model.generate(single, attention_mask=torch.ones_like(single), **options)
        assert torch.equal(together[row, -8:], out[0, -8:])


def test_cache_of_another_batch_size_is_refused() -> None:
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(2, 40), attention_mask=torch.ones(2, 40).long(), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows"):
        model.transformer.ntk_doublings(torch.zeros(3, 1, dtype=torch.long), cache)


# --- caches, back-ends, training -----------------------------------------------------------------


def test_eager_equals_sdpa() -> None:
    eager, sdpa = tiny_model(attn="eager"), tiny_model(attn="sdpa")
    with torch.no_grad():
        assert (eager(ids(2, 60)).logits - sdpa(ids(2, 60)).logits).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["fp8", "hqq", "quanto"])
def test_quantized_cache_runs(backend: str) -> None:
    model = tiny_model(hidden_size=128, kv_channels=64)
    package = {"hqq": "hqq", "quanto": "optimum.quanto"}.get(backend)
    try:
        found = package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip(f"QuantizedCache backend {backend} needs {package}, which is not installed")
    options = {"nbits": 4, "axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    try:
        cache = QuantizedCache(backend=backend, config=model.config, **options)
    except ValueError as error:
        pytest.skip(f"this transformers has no QuantizedCache backend {backend}: {error}")
    prompt = ids(1, 60)
    exact = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    out = model.generate(
        prompt, past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert out.shape == exact.shape
    assert out[0, 60] == exact[0, 60]  # the prompt itself is read in full precision


@pytest.mark.parametrize("length", [20, 40])
def test_decoding_compiles_without_graph_breaks(length: int) -> None:
    """Accelerators compile the decode of a static cache; also where both tricks are on."""
    model = tiny_model(attn="sdpa")
    text, cache = ids(1, length + 3), StaticCache(config=model.config, max_cache_len=64)
    other = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        step = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        for kept in (cache, other):
            model(text[:, :length], past_key_values=kept)
        for i in range(length, length + 3):
            inputs = {"input_ids": text[:, i : i + 1], "position_ids": torch.tensor([[i]])}
            compiled = step(**inputs, past_key_values=cache).logits
            plain = model(**inputs, past_key_values=other).logits
            assert torch.allclose(compiled, plain, atol=1e-5)


def test_a_reset_cache_forgets_the_factor_where_the_prompt_is_compiled_too() -> None:
    model = tiny_model(attn="sdpa")
    cache = StaticCache(config=model.config, max_cache_len=80)
    text = ids(1, 20, seed=2)
    with torch.no_grad():
        expected = model(text).logits
        model(ids(1, 70), past_key_values=cache)
        cache.reset()
        step = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        inputs = {"input_ids": text, "position_ids": torch.arange(20)[None]}
        try:
            found = step(**inputs, past_key_values=cache).logits
        except torch._dynamo.exc.Unsupported as error:
            if "masking_utils.py" not in str(error):
                raise
            pytest.skip("transformers' own masks cannot be compiled for a prompt (5.18)")
        assert torch.allclose(found, expected, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tiny_model().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name in 5.23
            (enable or model.gradient_checkpointing_enable)()
        model(ids(2, 20), labels=ids(2, 20), use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert all(bool(g.abs().sum() > 0) for g in plain)


def test_loss_is_next_token_cross_entropy() -> None:
    model = tiny_model()
    text = ids(2, 20)
    with torch.no_grad():
        out = model(text, labels=text)
        tail = model(text, logits_to_keep=3).logits
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()
    )
    assert torch.allclose(out.loss, expected)
    assert torch.allclose(tail, out.logits[:, -3:], atol=1e-6)


def test_hidden_states_and_attentions_can_be_had() -> None:
    model = tiny_model()
    with torch.no_grad():
        out = model(ids(1, 9), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(1, 9, 64)] * 3
    assert [tuple(a.shape) for a in out.attentions] == [(1, 2, 9, 9)] * 2
    assert torch.allclose(out.attentions[0].sum(-1), torch.ones(1, 2, 9))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_training_dropout_changes_the_loss() -> None:
    model = tiny_model(emb_dropout_prob=0.5).train()
    assert not torch.equal(model(ids(1, 9)).logits, model(ids(1, 9)).logits)


# --- what the quantizer relies on ----------------------------------------------------------------


def test_block_runs_alone_with_what_the_model_passes() -> None:
    model = tiny_model()
    calls: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda _m, args, kwargs, out: calls.append((args[0], kwargs, out)), with_kwargs=True
        )
    with torch.no_grad():
        model(ids(2, 40), use_cache=False)
        assert len(calls) == 2
        for block, (hidden, kwargs, out) in zip(model.transformer.h, list(calls), strict=True):
            again = block(hidden, **kwargs)
            assert isinstance(again, Tensor) and torch.equal(again, out)


def test_linears_get_one_tensor_and_the_pair_shares_it() -> None:
    model = tiny_model()
    seen: list[tuple[str, tuple[Any, ...]]] = []
    for name, module in model.transformer.h[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.append((name, args)))
    with torch.no_grad():
        model(ids(1, 5))
    assert [name for name, _ in seen] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.w1",
        "mlp.w2",
        "mlp.c_proj",
    ]
    assert all(len(args) == 1 and isinstance(args[0], Tensor) for _, args in seen)
    assert seen[2][1][0] is seen[3][1][0]


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = QWenLMHeadModel(tiny_config())
    assert all(p.is_meta for p in model.parameters())
    cos, _ = model.transformer.rotary_emb(torch.arange(4)[None])
    assert cos.device.type == "cpu"


def test_fresh_weights_follow_initializer_range() -> None:
    model = tiny_model(hidden_size=256, kv_channels=128, initializer_range=0.05)
    block = model.transformer.h[0]
    assert isinstance(block, QWenBlock)
    for weight in (
        block.attn.c_attn.weight,
        block.mlp.w2.weight,
        model.lm_head.weight,
        model.transformer.wte.weight,
    ):
        assert abs(weight.std().item() - 0.05) < 0.002
    for linear in (block.attn.c_proj, block.mlp.c_proj):
        assert abs(linear.weight.std().item() - 0.05 / 2) < 0.002  # over sqrt(2 * 2 layers)
    assert not block.attn.c_attn.bias.any() and bool((block.ln_1.weight == 1).all())


def test_no_bias_false_gives_biases_and_partial_rotation_works() -> None:
    model = tiny_model(no_bias=False, rotary_pct=0.5)
    assert model.transformer.h[0].mlp.w1.bias is not None
    assert model.transformer.h[0].attn.c_proj.bias is not None
    with torch.no_grad():
        assert model(ids(1, 40)).logits.isfinite().all()
        full = tiny_model(no_bias=False)(ids(1, 40)).logits
        assert not torch.allclose(model(ids(1, 40)).logits, full, atol=1e-3)


# --- loading, saving, configuration --------------------------------------------------------------


def test_save_and_reload(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = QWenLMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(model(ids(1, 9)).logits, again(ids(1, 9)).logits)
    first, second = model.config.to_dict(), again.config.to_dict()
    assert {k: v for k, v in first.items() if not k.startswith("_")} == {
        k: v for k, v in second.items() if not k.startswith("_")
    }
    assert not again._tied_weights_keys or again.lm_head.weight is not again.transformer.wte.weight


def test_tied_weights_when_the_config_says_so(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = QWenLMHeadModel.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        ({"fp16": True}, {}, torch.float16),
        ({"bf16": True, "torch_dtype": "float16"}, {}, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, {}, torch.bfloat16),
        ({}, {}, torch.float32),
        ({"bf16": True}, {"fp32": True}, torch.float32),
        ({"bf16": True}, {"fp16": True}, torch.float16),
        ({"bf16": True}, {"dtype": torch.float16}, torch.float16),
        ({"bf16": True}, {"dtype": "auto"}, torch.bfloat16),
        ({"fp16": True, "torch_dtype": "float16"}, {"dtype": torch.float32}, torch.float32),
    ],
)
def test_precision(
    tmp_path: Path, file: dict[str, Any], given: dict[str, Any], expected: torch.dtype
) -> None:
    """The argument wins over the file, and afterwards flags, dtype and weights agree."""
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "torch_dtype", "bf16", "fp16", "fp32"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config | file))
    model = QWenLMHeadModel.from_pretrained(tmp_path, **given)
    assert {p.dtype for p in model.parameters()} == {expected}
    flags = {name for name in ("bf16", "fp16", "fp32") if getattr(model.config, name)}
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    assert flags == {names[expected]} and model.config.dtype == expected
    model.float().save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (saved["fp32"], saved["fp16"], saved["bf16"]) == (True, False, False)


def test_low_precision_keeps_norm_and_rotation_in_float32() -> None:
    model = tiny_model().to(torch.bfloat16)
    block = model.transformer.h[0]
    x = torch.full((1, 1, 64), 3e19, dtype=torch.bfloat16)  # its square overflows bf16
    assert block.ln_1(x).isfinite().all() and block.ln_1(x).dtype == torch.bfloat16
    cos, _ = model.transformer.rotary_emb(torch.tensor([[300]]))
    assert cos.dtype == torch.float32
    with torch.no_grad():
        assert model(ids(1, 40)).logits.dtype == torch.bfloat16


def test_two_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="at most one of bf16, fp16, fp32"):
        QWenConfig(bf16=True, fp16=True)
    with pytest.raises(ValueError, match="not both"):
        QWenConfig.from_dict({}, fp16=True, dtype=torch.bfloat16)


def test_first_release_names() -> None:
    old = {
        "n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 6144, "ffn_hidden_size": 192,
        "padded_vocab_size": 512, "vocab_size": 500, "attn_pdrop": 0.0, "embd_pdrop": 0.1,
        "kv_channels": 32, "layer_norm_epsilon": 1e-05, "params_dtype": "torch.bfloat16",
        "pos_emb": "rotary", "activation": "swiglu", "seq_length": 2048,
        "tokenizer_type": "QWenTokenizer",
        "bf16": False, "fp16": False, "fp32": False, "use_flash_attn": "auto", "model_type": "qwen",
    }  # fmt: skip
    config = QWenConfig.from_dict(dict(old))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 2)
    assert (config.intermediate_size, config.ffn_size, config.vocab_size) == (192, 96, 512)
    assert (config.max_position_embeddings, config.emb_dropout_prob) == (6144, 0.1)
    assert (
        config.dtype == torch.bfloat16 and config.n_embd == 64 and config.padded_vocab_size == 512
    )
    written = config.to_dict()
    assert written["hidden_size"] == 64 and "n_embd" not in written
    model = QWenLMHeadModel(config)
    assert model.transformer.h[2].mlp.w1.weight.shape == (96, 64)
    assert model.transformer.wte.weight.shape == (512, 64)


@pytest.mark.parametrize(
    "wrong", [{"intermediate_size": 191}, {"kv_channels": 33}, {"rotary_pct": 0.01}]
)
def test_impossible_shapes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"even"):
        tiny_config(**wrong)


def test_device_map_splits_between_blocks(tmp_path: Path) -> None:
    """One block on disk, the rest in memory: accelerate places whole blocks only."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    placed = QWenLMHeadModel.from_pretrained(
        tmp_path,
        device_map={"transformer.wte": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk",
                    "transformer.ln_f": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
        attn_implementation="eager",
    ).eval()  # fmt: skip
    assert placed._no_split_modules and set(placed._no_split_modules) == {"QWenBlock"}
    with torch.no_grad():
        assert torch.equal(placed(ids(1, 40)).logits, model(ids(1, 40)).logits)
