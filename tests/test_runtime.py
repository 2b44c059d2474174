"""Loading a directory: every kernel against the weights the codes stand for, and refusals."""

from __future__ import annotations

import importlib.util
import json
import logging
import platform
import sys
from pathlib import Path

import handmade
import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import avx2, devices, kernel_choice, kernels
from qquant.devices import choose_device, choose_dtype
from qquant.errors import CheckpointError, SpecError
from qquant.kernel_report import KernelReport
from qquant.kernels import QuantLinear, misfit
from qquant.pack import Packed
from qquant.runtime import load
from qquant.slow import slow_kernel

# By what the machine is and has, not by what the kernel says of itself: that is tested.
THERE = (
    platform.machine() == "x86_64"
    and {"avx2", "fma", "f16c"} <= set(Path("/proc/cpuinfo").read_text().split())
    and importlib.util.find_spec("llvmlite") is not None
)
needs_avx2 = pytest.mark.skipif(not THERE, reason="no processor with AVX2, or no llvmlite")
AVX2 = pytest.param("avx2", marks=needs_avx2)
IDS = torch.randint(1, 320, (2, 48), generator=torch.Generator().manual_seed(0))


def linear(out, inp, *, bias=False, v2=False, seed=0, **kwargs):
    tensors, weight = handmade.random_linear(out, inp, v2=v2, seed=seed, **kwargs)
    packed = Packed(*(tensors[name] for name in Packed._fields))
    added = torch.randn(out, dtype=torch.float16) if bias else None
    made = QuantLinear(packed, added, bits=kwargs.get("bits", 4), zero_offset=0 if v2 else 1)
    return made, weight, added


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def edit_config(path, change):
    for name in ("config.json", "quantize_config.json"):
        values = json.loads((path / name).read_text())
        change(values, values.get("quantization_config", values))
        (path / name).write_text(json.dumps(values))


# The kernels


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("out", "inp", "group_size", "rows"),
    [(32, 64, 32, 1), (96, 160, 32, 5), (64, 192, 64, 3), (32, 96, -1, 2), (64, 160, 64, 40)],
)
def test_dequantize_is_the_stored_weight(bits, sym, out, inp, group_size, rows, monkeypatch):
    monkeypatch.setitem(kernels._TILE, "cpu", 20 * inp)  # tiles of 20: none divides the outputs
    for i, extra in enumerate(({}, {"v2": True}, {"desc_act": True})):
        module, weight, bias = linear(
            out, inp, bits=bits, sym=sym, group_size=group_size, bias=i == 1, seed=i, **extra
        )
        x = torch.randn(rows, inp)
        want = x.double() @ weight.T + (0 if bias is None else bias.double())
        # float32 products of `inp` terms: a few units in the last place of the sum of magnitudes.
        slack = 1e-6 * (x.double().abs() @ weight.abs().T).max() + 1e-6
        assert (module(x).double() - want).abs().max() <= slack
        assert (module.dense(torch.float32)(x).double() - want).abs().max() <= slack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("more", [{}, {"v2": True}, {"desc_act": True}])
@pytest.mark.parametrize(
    ("out", "inp", "group_size", "rows"),
    [
        (32, 32, 32, 1),
        (96, 128, 64, 4),
        (64, 256, 128, 32),
        (32, 512, 256, 7),
        (160, 128, -1, 3),  # as one group of 128
        (32, 192, 96, 2),  # as three of 32
        (32, 512, -1, 2),  # as two of 256
    ],
)
def test_torch_int4_is_the_stored_weight_to_bfloat16(bits, sym, more, out, inp, group_size, rows):
    module, weight, bias = linear(
        out, inp, bits=bits, sym=sym, group_size=group_size, bias=True, seed=rows, **more
    )
    module.use("torch-int4")
    x = torch.randn(rows, inp)
    seen = watch_int4(module)
    got = module(x).double()
    assert seen == [rows]
    want = x.double() @ weight.T + bias.double()
    # Input, scale and offset are each rounded to 8 bits (half a unit: 2^-9 of the value). Scale and
    # offset are up to so many steps where the weight is what is left, on an asymmetric grid; and of
    # 8 bits each half's product is rounded by itself.
    steps = (256 if bits == 8 else 15) * module.scales.double().abs().max()
    codes = weight.abs() if sym and bits != 8 else weight.abs() + steps
    slack = 2**-8 * (x.double().abs() @ codes.T) + 2**-8 * want.abs()
    assert ((got - want).abs() <= slack).all()
    # ... and it is not merely within a wide margin: the error is noise, not a shifted zero point.
    assert (got - want).norm() <= 0.01 * want.norm()


def watch_int4(module):
    """Rows of every call that reaches the int4 op."""
    seen, real = [], module._by_held

    def watched(x):
        seen.append(x.shape[0])
        return real(x)

    module._by_held = watched
    return seen


def test_torch_int4_only_takes_few_rows():
    module, weight, _ = linear(32, 64, group_size=32)
    module.use("torch-int4")
    seen = watch_int4(module)
    x = torch.randn(kernels.FEW_TOKENS + 1, 64)
    many = module(x)
    assert seen == []
    assert torch.allclose(many.double(), x.double() @ weight.T, atol=1e-5)
    module(x[None, :-1])
    assert seen == [kernels.FEW_TOKENS]
    assert module(x[:0]).shape == (0, 32)
    needs = x[:1].clone().requires_grad_()
    module(needs).sum().backward()  # the op has no gradient; dequantize has
    assert seen == [kernels.FEW_TOKENS]
    assert torch.allclose(needs.grad[0].double(), weight.sum(0), atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"out": 32, "inp": 96, "group_size": 48}, "group size 48"),
        ({"out": 32, "inp": 96, "group_size": 64}, "groups differ in size"),
        ({"out": 8, "inp": 64, "group_size": 32}, "8 outputs"),
    ],
)
def test_torch_int4_says_why_it_does_not_fit(kwargs, reason):
    module, _, _ = linear(**kwargs)
    assert reason in misfit(module, "torch-int4")
    with pytest.raises(SpecError, match=reason):
        module.use("torch-int4")
    with pytest.raises(SpecError, match="kernel"):
        module.use("fast")


def test_what_fits_by_the_reasons_is_what_the_op_takes():
    """Where torch's op refuses a shape, the reasons must have, and the other way round."""
    for out in (8, 16, 24, 32):
        for inp, group in ((32, 32), (64, 32), (96, 96), (64, 64), (512, 512)):
            module, _, _ = linear(out, inp, group_size=group)
            try:
                module._packed().product(torch.randn(1, inp))
                ran = True
            except RuntimeError:
                ran = False
            assert ran == (misfit(module, "torch-int4") is None), (out, inp, group)


def test_half_and_bfloat16_inputs_give_their_own_dtype():
    module, _, _ = linear(32, 64, group_size=32, bias=True)
    for dtype in (torch.float16, torch.bfloat16):
        for kernel in ("dequantize", "torch-int4"):
            module.use(kernel)
            assert module(torch.randn(3, 64, dtype=dtype)).dtype == dtype


# Directories


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A Qwen2 of tied embeddings, 4 bits."""
    model = handmade.tiny_qwen2(tie_word_embeddings=True)
    return handmade.make_pair(model, tmp_path_factory.mktemp("qwen2"), blocks="model.layers")


@pytest.fixture(scope="module")
def qwen1(tmp_path_factory):
    """An original Qwen with zero biases everywhere, as the published files have them."""
    model = handmade.tiny_qwen1()
    return handmade.make_pair(model, tmp_path_factory.mktemp("qwen1"), blocks="transformer.h")


@pytest.fixture(params=["qwen1", "qwen2"])
def pair(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(qwen2, tmp_path):
    """A private copy of the quantized Qwen2, to break."""
    for source in qwen2[0].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path


def test_unquantized_directories_load_as_transformers_does(qwen2):
    from transformers import AutoModelForCausalLM

    loaded = load(qwen2[1], device="cpu")
    assert loaded.kernel.used == {}
    assert "no quantized linears" in str(loaded.kernel)
    assert loaded.tokenizer is None
    want = AutoModelForCausalLM.from_pretrained(qwen2[1], dtype=torch.float32)
    assert torch.equal(logits(loaded.model), logits(want))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    state = load_file(qwen2[1] / "model.safetensors")
    assert loaded.kernel.weight_bytes == sum(t.numel() * 4 for t in state.values())


def test_original_qwen_loads_without_remote_code(qwen1):
    loaded = load(qwen1[1], device="cpu")
    assert type(loaded.model).__module__ == "qquant.models.qwen.modeling_qwen"
    state = load_file(qwen1[1] / "model.safetensors")
    assert all(torch.equal(p, state[n]) for n, p in loaded.model.named_parameters())
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("kernel", ["dequantize", "dense"])
def test_exact_kernels_equal_the_dequantized_model(pair, kernel):
    want = logits(load(pair[1], device="cpu").model)
    loaded = load(pair[0], device="cpu", kernel=kernel)
    assert set(loaded.kernel.used.values()) == {kernel}
    assert loaded.kernel.dtype == torch.float32
    for ids in (IDS, IDS[:1, :1], IDS[:, :9]):
        got = logits(loaded.model, ids)
        assert (got - logits(load(pair[1], device="cpu").model, ids)).abs().max() < 2e-5
    assert want.abs().max() > 1  # logits of a scale at which 2e-5 means something


def test_torch_int4_agrees_and_generates(pair):
    dense = load(pair[1], device="cpu").model
    loaded = load(pair[0], device="cpu", kernel="torch-int4", dtype="float32")
    counts = loaded.kernel.counts
    assert counts == {"torch-int4": len(loaded.kernel.used)} and loaded.kernel.used
    few, many = IDS[:1, :16], IDS
    assert (logits(loaded.model, many) - logits(dense, many)).abs().max() < 2e-5  # dequantized
    got, want = logits(loaded.model, few), logits(dense, few)
    assert (got - want).norm() < 0.01 * want.norm()  # bfloat16 inputs through two layers
    assert not torch.equal(got, want)
    out = loaded.model.generate(few[:, :4], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert out.shape == (1, 10)


@pytest.fixture
def without_bfloat16(monkeypatch):
    """A CPU on which `auto` computes in float32, so that logits can be compared closely."""
    monkeypatch.setattr(devices, "native_bfloat16", lambda device: False)


@pytest.mark.parametrize("kernel", ["auto", "torch-int4", "dequantize", "dense"])
@pytest.mark.parametrize("native", [True, False])
def test_packed_weights_in_bfloat16_where_the_cpu_is_fast_at_it(pair, kernel, native, monkeypatch):
    """Though what is beside them says float16; a kernel asked for as exact stays so."""
    monkeypatch.setattr(devices, "native_bfloat16", lambda device: native)
    loaded = load(pair[0], device="cpu", kernel=kernel)
    fast = native and kernel in ("auto", "torch-int4")
    assert loaded.kernel.dtype == (torch.bfloat16 if fast else torch.float32)
    want = logits(load(pair[1], device="cpu", dtype="float32").model)
    got = logits(loaded.model).float()
    assert (got - want).norm() < (0.03 if fast else 1e-2) * want.norm()
    assert load(pair[0], device="cpu", kernel=kernel, dtype="float32").kernel.dtype == torch.float32


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("compiler", [True, False])
def test_auto_takes_the_faster_that_fits(pair, capability, compiler, monkeypatch):
    own = torch.backends.cpu.get_cpu_capability()
    if own == "DEFAULT" or not THERE:
        pytest.skip("neither kernel is for this machine")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    there = compiler and capability != "DEFAULT"
    monkeypatch.setattr(avx2, "unavailable", lambda: None if there else "no llvmlite")
    monkeypatch.setattr(kernel_choice, "unavailable", avx2.unavailable)
    loaded = load(pair[0], device="cpu")
    taken = {"AVX512": "torch-int4", "DEFAULT": "dequantize"}.get(
        capability, "avx2" if compiler else "torch-int4"
    )
    assert set(loaded.kernel.used.values()) == {taken}
    missing = "avx2, which is faster on this processor, is not taken: no llvmlite"
    assert (missing in str(loaded.kernel)) is (capability == "AVX2" and not compiler)
    assert (missing in str(slow_kernel(loaded.kernel))) is (capability == "AVX2" and not compiler)


def test_auto_is_exact_where_float32_is_asked_for(pair, caplog):
    vector = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    with caplog.at_level(logging.INFO, "qquant.runtime"):
        exact = load(pair[0], device="cpu", dtype=torch.float32)
    assert set(exact.kernel.used.values()) == {"dequantize"}
    assert "float32 was asked for" in str(exact.kernel) or not vector
    assert str(exact.kernel) in caplog.text  # said without asking, too
    assert sum(exact.kernel.reasons.values()) == len(exact.kernel.used)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"group_size": 16}, "group size 16"),
        ({"group_size": 16, "bits": 3, "sym": False, "desc_act": True}, "group size 16"),
        ({"group_size": 16, "bits": 2, "v2": True}, "group size 16"),
    ],
)
def test_auto_falls_back_with_the_reason(tmp_path, kwargs, reason, without_bfloat16, monkeypatch):
    monkeypatch.setattr(avx2, "unavailable", lambda: "no llvmlite")
    model = handmade.tiny_qwen2(layers=1)
    quantized, dense = handmade.make_pair(model, tmp_path, blocks="model.layers", **kwargs)
    loaded = load(quantized, device="cpu")
    assert loaded.kernel.counts == {"dequantize": 7}
    assert reason in str(loaded.kernel)
    assert (logits(loaded.model) - logits(load(dense, device="cpu").model)).abs().max() < 2e-5
    with pytest.raises(SpecError, match=f"kernel torch-int4 for model.layers.*{reason}"):
        load(quantized, device="cpu", kernel="torch-int4")


def test_one_misfit_does_not_take_the_others_along(tmp_path, without_bfloat16):
    # 160 columns in groups of 64: the last group of mlp.down_proj is short.
    model = handmade.tiny_qwen2(ffn=160, layers=1)
    quantized, dense = handmade.make_pair(model, tmp_path, blocks="model.layers", group_size=64)
    loaded = load(quantized, device="cpu")
    assert loaded.kernel.used["model.layers.0.mlp.down_proj"] == "dequantize"
    assert set(loaded.kernel.passed_over) >= {"model.layers.0.mlp.down_proj"}
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert sorted(loaded.kernel.counts.values()) == [1, 6]
    got, want = logits(loaded.model), logits(load(dense, device="cpu").model)
    assert (got - want).norm() < 1e-3 * want.norm()


def test_a_bias_the_model_lacks_is_kept_unless_zero(copy):
    loaded = load(copy, device="cpu", kernel="dequantize")
    assert loaded.model.model.layers[0].self_attn.o_proj.bias is None
    before = logits(loaded.model)
    state = load_file(copy / "model.safetensors")
    state["model.layers.0.self_attn.o_proj.bias"] += 1
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert (logits(load(copy, device="cpu", kernel="dequantize").model) - before).abs().max() > 0.1


def test_the_state_dict_is_the_file(qwen1):
    state = load(qwen1[0], device="cpu", dtype="float16").model.state_dict()
    stored = load_file(qwen1[0] / "model.safetensors")
    assert set(state) <= set(stored)
    assert all(torch.equal(state[name], stored[name]) for name in state)
    assert all(not stored[name].any() for name in set(stored) - set(state))  # zero biases


@pytest.mark.parametrize("kernel", ["torch-int4", "dequantize", AVX2])
def test_a_state_dict_loads_back(qwen1, kernel):
    path, _ = qwen1
    model = load(path, device="cpu", dtype="float32", kernel=kernel).model
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = logits(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    before = {name: module.nbytes for name, module in linears.items()}
    zeroed = {n: torch.zeros_like(t) if n.endswith("scales") else t for n, t in held.items()}
    model.load_state_dict(zeroed)
    assert not torch.allclose(logits(model), said)
    model.load_state_dict(held)
    assert torch.equal(logits(model), said)
    assert {name: module.nbytes for name, module in linears.items()} == before
    assert {module.kernel for module in linears.values()} == {kernel}


@pytest.mark.parametrize("kernel", ["torch-int4", "dequantize", AVX2])
def test_what_follows_from_a_state_dict_is_worked_out_anew(kernel):
    """Zero points and the order of groups are another linear's."""
    one, other = (
        linear(64, 128, group_size=32, seed=1)[0],
        linear(64, 128, group_size=32, seed=2, sym=False)[0],
    )
    one.use(kernel)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.zeros, other.zeros)
    x = torch.randn(3, 128)
    other.use(kernel)
    assert torch.equal(one(x), other(x))
    if kernel in kernels.HELD:
        assert one.qweight is None
    ordered = linear(64, 128, group_size=32, seed=3, desc_act=True)[0]
    one.load_state_dict(ordered.state_dict())
    assert (one.group, one.even) == (ordered.group, ordered.even) == (0, 32)
    plain = linear(64, 128, group_size=32, seed=1)[0]
    plain.use(kernel)
    plain.load_state_dict({}, strict=False)
    assert (plain.qweight is None) is (kernel in kernels.HELD)


def test_a_change_of_dtype_leaves_the_scales_of_the_file():
    made = linear(64, 128, bias=True)[0]
    scales = made.scales.clone()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert made.to(dtype).scales.dtype == torch.float16 and made.bias.dtype == dtype
    assert torch.equal(made.bfloat16().scales, scales)
    assert made.to("meta").scales.device.type == "meta"


def test_memory_is_what_the_report_says(pair):
    compact, packed, dense = (
        load(pair[0], device="cpu", kernel=kernel, dtype="float32").kernel.weight_bytes
        for kernel in ("dequantize", "torch-int4", "dense")
    )
    assert compact < packed < dense


def test_a_quantize_config_beside_the_config_will_do(copy, qwen2):
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    loaded = load(copy, device="cpu", kernel="dequantize")
    assert (logits(loaded.model) - logits(load(qwen2[1], device="cpu").model)).abs().max() < 2e-5
    (copy / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match="14 packed linears and no config"):
        load(copy, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "awq"),
        ("bits", 5),
        ("checkpoint_format", "marlin"),
        ("dynamic", {"(": {}}),
    ],
)
def test_other_quantizations_are_refused_by_their_key(copy, key, value):
    edit_config(copy, lambda _, quant: quant.update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        load(copy, device="cpu")


def test_v1_and_v2_are_not_confused(copy):
    right = logits(load(copy, device="cpu", kernel="dequantize").model)
    edit_config(copy, lambda _, quant: quant.update({"checkpoint_format": "gptq_v2"}))
    wrong = logits(load(copy, device="cpu", kernel="dequantize").model)
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: s.pop("model.norm.weight"), "model.norm.weight"),
        (lambda s: s.pop("model.layers.1.mlp.up_proj.g_idx"), "model.layers.1.mlp.up_proj.g_idx"),
        (lambda s: s.update({"model.norm.weight": torch.ones(64)}), r"norm.weight.*\[128\]"),
        (
            lambda s: s.update({"model.layers.0.mlp.up_proj.scales": torch.ones(4, 128)}),
            r"up_proj.scales.*\[4, 256\]",
        ),
        (lambda s: s["model.layers.0.mlp.up_proj.g_idx"].fill_(4), "up_proj.g_idx.*0 to 3"),
        (lambda s: s.pop("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias"),
        (
            lambda s: s.update({"model.extra.qweight": torch.ones(4, 4, dtype=torch.int32)}),
            "model.extra",
        ),
        (lambda s: s.update({"model.norm.weight": torch.ones(128).int()}), "norm.weight.*float"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, damage, named):
    state = load_file(copy / "model.safetensors")
    damage(state)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=named):
        load(copy, device="cpu")


def test_tensors_without_a_place_are_told(copy, caplog):
    state = load_file(copy / "model.safetensors")
    state["model.visual.weight"] = torch.ones(2)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    load(copy, device="cpu")
    assert "model.visual.weight" in caplog.text


def test_a_foreign_model_is_refused(copy):
    edit_config(copy, lambda config, _: config.update({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type"):
        load(copy, device="cpu")


def test_generation_settings_come_along(copy):
    settings = {"max_new_tokens": 7, "eos_token_id": 5, "transformers_version": "4.40.0"}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    assert load(copy, device="cpu").model.generation_config.max_new_tokens == 7


# Choices


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "meta", "cuda:99"):
        with pytest.raises(SpecError, match="device"):
            choose_device(wrong)


def test_dtypes(monkeypatch):
    """Asked for; else as stored where the device is fast at it; else float16 or float32."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    full, half, brain = torch.float32, torch.float16, torch.bfloat16
    assert choose_dtype("bfloat16", cpu) == choose_dtype("torch.bfloat16", cpu, full) == brain
    assert choose_dtype(half, cpu, brain) == half
    for wrong in ("int8", torch.float64, "", "torch"):
        with pytest.raises(SpecError, match="compute dtype"):
            choose_dtype(wrong, cpu)
    for native in (True, False):
        monkeypatch.setattr(devices, "native_bfloat16", lambda device, native=native: native)
        for auto in (None, "auto"):
            fast = brain if native else full
            assert [choose_dtype(auto, cpu, s) for s in (brain, half, full, None)] == [
                fast, full, full, full
            ]  # fmt: skip
            fast = brain if native else half
            assert [choose_dtype(auto, cuda, s) for s in (brain, half, full, None)] == [
                fast, half, full, full
            ]  # fmt: skip
            assert choose_dtype(auto, cuda) == fast, "calibration: as a bfloat16 checkpoint"


@pytest.mark.parametrize("kernel", ["torch-int4", AVX2])
def test_generate_decodes_compiled_where_asked_for_and_says_the_same(qwen2, kernel, monkeypatch):
    """With torch.compile's tracing and without its C++, which takes minutes on a busy machine."""
    from torch._dynamo.utils import counters

    from qquant import compiling

    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setenv("CXX", sys.executable)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    want = load(qwen2[0], device="cpu", kernel=kernel).model.generate(IDS[:1, :5], **how)
    before = counters["stats"]["unique_graphs"]
    breaks = counters["graph_break"].total()
    loaded = load(qwen2[0], device="cpu", kernel=kernel, compile=True)
    assert torch.equal(loaded.model.generate(IDS[:1, :5], **how), want)
    assert counters["stats"]["unique_graphs"] > before
    assert counters["graph_break"].total() == breaks
    assert "compiled" in str(loaded.kernel)


def test_rows_beyond_triton_are_called_slow():
    used = {"a": "triton-int4", "b": "triton-int4", "c": "marlin"}
    report = KernelReport("auto", torch.device("cuda"), torch.float32, used)
    assert slow_kernel(report, 16) is None
    assert slow_kernel(report, 17) == (
        "dequantize for 2 linears: triton-int4 runs up to 16 rows, 17 were decoded side by side"
    )
    assert "triton-int4 up to 16 rows" in str(report)


def test_an_unknown_kernel_is_refused_before_anything_is_read():
    with pytest.raises(SpecError, match=r"kernel.*torch-int4, dequantize, dense"):
        load("no such directory", kernel="exllama")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", ["torch-int4", "triton-int4", "dequantize", "dense"])
def test_kernels_on_a_gpu(pair, kernel):
    want = logits(load(pair[1], device="cpu").model, IDS[:1, :16])
    loaded = load(pair[0], device="cuda", kernel=kernel)
    assert loaded.kernel.dtype == torch.float16
    got = logits(loaded.model, IDS[:1, :16].cuda()).cpu()
    assert (got - want).norm() < 0.01 * want.norm()
