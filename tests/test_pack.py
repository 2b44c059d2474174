"""The packer against a slow reference that writes one bit at a time, and against known words."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from qquant.errors import CheckpointError, NumericsError, RunError, SpecError
from qquant.pack import (
    V1,
    V2,
    Packed,
    dequantize,
    min_zero,
    pack,
    symmetric_zero,
    trivial_g_idx,
    unpack_codes,
    unpack_zeros,
    values_per_cycle,
)

BITS = (2, 3, 4, 8)


def words_of(values: list[int], bits: int) -> list[int]:
    """The reference: every bit of every value put into its place in a stream of int32 words."""
    words = [0] * (len(values) * bits // 32)
    for i, value in enumerate(values):
        for j in range(bits):
            at = bits * i + j
            words[at // 32] |= ((value >> j) & 1) << (at % 32)
    return [w - 2**32 if w >= 2**31 else w for w in words]


def random_linear(n: int, k: int, groups: int, bits: int, low: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    zeros = torch.randint(low, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
    scales = torch.rand((n, groups), generator=g) * 0.1 + 0.001
    return codes, scales, zeros


SHAPES = [  # outputs, inputs, group size
    (32, 32, 32),
    (32, 96, 32),
    (96, 32, -1),
    (160, 224, 128),  # the last group is short
    (64, 352, 64),
    (32, 64, 1000),
]


@pytest.mark.parametrize("offset", [V1, V2])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_every_bit_is_where_the_layout_says(bits: int, n: int, k: int, group: int, offset: int):
    groups = 1 if group == -1 else -(-k // group)
    codes, scales, zeros = random_linear(n, k, groups, bits, offset)
    packed = pack(codes, scales, zeros, bits=bits, group_size=group, zero_offset=offset)
    assert packed.qweight.shape == (k * bits // 32, n) and packed.qweight.dtype == torch.int32
    assert packed.qzeros.shape == (groups, n * bits // 32) and packed.qzeros.dtype == torch.int32
    assert packed.scales.shape == (groups, n) and packed.scales.dtype == torch.float16
    assert packed.g_idx.dtype == torch.int32
    assert all(t.is_contiguous() for t in packed)
    for out in range(n):
        assert packed.qweight[:, out].tolist() == words_of(codes[out].tolist(), bits)
    for row in range(groups):
        stored = [z - offset for z in zeros[:, row].tolist()]
        assert packed.qzeros[row].tolist() == words_of(stored, bits)
    assert torch.equal(packed.scales, scales.half().t())
    assert packed.g_idx.tolist() == [0 if group == -1 else i // group for i in range(k)]
    assert torch.equal(unpack_codes(packed.qweight, bits), codes)
    assert torch.equal(unpack_zeros(packed.qzeros, bits, offset), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_smallest_shapes_that_fill_words(bits: int):
    step = values_per_cycle(bits)
    codes, scales, zeros = random_linear(step, 3 * step, 1, bits, 1)
    packed = pack(codes, scales, zeros, bits=bits, group_size=-1)
    assert torch.equal(unpack_codes(packed.qweight, bits), codes)
    assert torch.equal(unpack_zeros(packed.qzeros, bits), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_views_are_packed_like_copies(bits: int):
    codes, scales, zeros = random_linear(64, 64, 2, bits, 1)
    wide = torch.zeros((64, 128), dtype=torch.uint8)
    wide[:, ::2] = codes
    plain = pack(codes, scales, zeros, bits=bits, group_size=32)
    strided = pack(wide[:, ::2], scales, zeros, bits=bits, group_size=32)
    turned = pack(codes.t().contiguous().t(), scales, zeros, bits=bits, group_size=32)
    for a, b, c in zip(plain, strided, turned, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_three_bit_values_straddle_words():
    codes = torch.zeros((32, 32), dtype=torch.uint8)
    codes[0, 10] = 0b101  # bits 30 and 32
    codes[0, 21] = 0b110  # bits 64 and 65
    zeros = torch.full((32, 1), 4, dtype=torch.uint8)
    word = pack(codes, torch.ones(32, 1), zeros, bits=3, group_size=-1).qweight[:, 0]
    assert word.tolist() == [1 << 30, 1, 0b11]


@pytest.mark.parametrize(
    ("bits", "offset", "word"),
    [
        (4, V1, 0x77777777),
        (4, V2, 0x88888888 - 2**32),
        (8, V1, 0x7F7F7F7F),
        (8, V2, 0x80808080 - 2**32),
        (2, V1, 0x55555555),
        (2, V2, 0xAAAAAAAA - 2**32),
    ],
)
def test_symmetric_zero_words(bits: int, offset: int, word: int):
    zeros = torch.full((32, 2), symmetric_zero(bits), dtype=torch.uint8)
    codes = torch.zeros((32, 64), dtype=torch.uint8)
    packed = pack(codes, torch.ones(32, 2), zeros, bits=bits, group_size=32, zero_offset=offset)
    assert packed.qzeros.unique().tolist() == [word]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, -1, 48])
def test_dequantize_follows_the_formula(bits: int, group: int):
    groups = 1 if group == -1 else -(-96 // group)
    codes, scales, zeros = random_linear(32, 96, groups, bits, 1)
    packed = pack(codes, scales, zeros, bits=bits, group_size=group)
    weight = dequantize(packed, bits, dtype=torch.float64)
    half = scales.half().double()
    for n, k in ((0, 0), (31, 95), (7, 50), (16, 31), (16, 32)):
        g = 0 if group == -1 else k // group
        assert weight[n, k] == half[n, g] * (int(codes[n, k]) - int(zeros[n, g]))
    assert dequantize(packed, bits).dtype == torch.float32
    assert torch.equal(dequantize(packed, bits, dtype=torch.float16), weight.float().half())


@pytest.mark.parametrize("bits", BITS)
def test_any_g_idx_is_read(bits: int):
    codes, scales, zeros = random_linear(32, 96, 3, bits, 1)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    g_idx = trivial_g_idx(96, 32)[order]
    packed = pack(codes, scales, zeros, bits=bits, group_size=32, g_idx=g_idx)
    assert torch.equal(packed.g_idx, g_idx)
    unordered = codes[:, order.argsort()]
    trivial = dequantize(pack(unordered, scales, zeros, bits=bits, group_size=32), bits)
    assert torch.equal(dequantize(packed, bits), trivial[:, order])
    assert not torch.equal(dequantize(packed, bits), trivial)


@pytest.mark.parametrize("bits", BITS)
def test_reading_with_the_wrong_offset_is_off_by_one_step_everywhere(bits: int):
    codes, scales, _ = random_linear(32, 32, 1, bits, 1)
    zeros = torch.full((32, 1), symmetric_zero(bits), dtype=torch.uint8)
    packed = pack(codes, scales, zeros, bits=bits, group_size=-1, zero_offset=V1)
    right = dequantize(packed, bits, dtype=torch.float64)
    wrong = dequantize(packed, bits, zero_offset=V2, dtype=torch.float64)
    step = scales.half().double().expand_as(right)
    assert torch.allclose(wrong - right, step, rtol=0, atol=1e-12)


def test_zero_zero_is_refused_in_v1_and_kept_in_v2():
    codes, scales, zeros = random_linear(32, 32, 1, 4, 0)
    zeros[5] = 0
    with pytest.raises(RunError, match=r"expected 1 to 15, got 0.*min_zero"):
        pack(codes, scales, zeros, bits=4, group_size=-1)
    packed = pack(codes, scales, zeros, bits=4, group_size=-1, zero_offset=V2)
    assert torch.equal(unpack_zeros(packed.qzeros, 4, V2), zeros)
    assert (min_zero(V1), min_zero(V2)) == (1, 0)


def test_wrapped_zeros_of_other_tools_read_as_zero():
    wrapped = torch.full((1, 4), -1, dtype=torch.int32)
    assert unpack_zeros(wrapped, 4, V1).unique().tolist() == [0]
    assert unpack_zeros(wrapped, 8, V1).unique().tolist() == [0]
    assert unpack_zeros(wrapped, 4, V2).unique().tolist() == [15]


def test_what_does_not_fit_is_refused():
    codes, scales, zeros = random_linear(32, 64, 2, 4, 1)

    def call(c: Tensor = codes, s: Tensor = scales, z: Tensor = zeros, bits: int = 4, **kw: int):
        return pack(c, s, z, bits=bits, **({"group_size": 32} | kw))

    with pytest.raises(SpecError, match="bits"):
        call(bits=5)
    with pytest.raises(SpecError, match="group_size"):
        call(group_size=0)
    with pytest.raises(SpecError, match="zero_offset"):
        call(zero_offset=2)
    with pytest.raises(SpecError, match=r"inputs.*multiple of 8, got 60"):
        call(c=codes[:, :60])
    with pytest.raises(SpecError, match=r"outputs.*multiple of 8, got 30"):
        call(c=codes[:30])
    with pytest.raises(RunError, match="shape of scales"):
        call(s=scales[:, :1])
    with pytest.raises(RunError, match="shape of zeros"):
        call(z=zeros.t())
    with pytest.raises(RunError, match="code: expected 0 to 7"):
        call(c=torch.full_like(codes, 8)[:, :32].repeat(1, 2), bits=3, z=zeros.clamp(max=7))
    with pytest.raises(RunError, match="zero: expected 1 to 15, got 16"):
        call(z=torch.full_like(zeros, 16))
    with pytest.raises(RunError, match="dtype of codes"):
        call(c=codes.int())
    bad = scales.clone()
    bad[3, 1] = 1e6
    with pytest.raises(NumericsError, match=r"scale of output 3.*65504"):
        call(s=bad)


def test_broken_tensors_are_refused_on_reading():
    codes, scales, zeros = random_linear(32, 32, 1, 4, 1)
    packed = pack(codes, scales, zeros, bits=4, group_size=-1)
    for entry in (-1, 1):
        g_idx = packed.g_idx.clone()
        g_idx[3] = entry
        with pytest.raises(CheckpointError, match=f"entry of g_idx: expected 0 to 0, got {entry}"):
            dequantize(Packed(packed.qweight, packed.qzeros, packed.scales, g_idx), 4)
    with pytest.raises(CheckpointError, match="length of g_idx"):
        dequantize(packed._replace(g_idx=packed.g_idx[:-1]), 4)
    with pytest.raises(CheckpointError, match="3 bits"):
        unpack_codes(packed.qweight, 3)
    with pytest.raises(CheckpointError, match="int32"):
        unpack_codes(packed.qweight.long(), 4)


def test_large_matrices_are_quick():
    codes = torch.zeros((4096, 2752), dtype=torch.uint8)
    scales = torch.ones(4096, 1)
    zeros = torch.full((4096, 1), 8, dtype=torch.uint8)
    took = []
    for _ in range(3):
        start = time.process_time()
        pack(codes, scales, zeros, bits=4, group_size=-1)
        took.append(time.process_time() - start)
    assert min(took) < 1.0  # a quarter of 7B's widest; measured 0.06 s, a loop takes minutes
