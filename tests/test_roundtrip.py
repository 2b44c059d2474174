"""What is written is what is read, for any shape: headers, shards (also by the library), codes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from qquant.checkpoint import Checkpoint
from qquant.config import BITS
from qquant.directory import CONFIG, INDEX
from qquant.headers import TensorPlan, dtype_name, encode_header, parse_header
from qquant.pack import pack, trivial_g_idx, unpack_codes, unpack_zeros, values_per_cycle
from qquant.shards import ShardWriter

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.uint8, torch.bool]
DTYPES += [torch.int64, torch.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(
    lambda name: name != "__metadata__"
)
PLANS = st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=6)
BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(PLANS, st.dictionaries(st.text("abc", max_size=3), st.text("xyz"), max_size=3))
@BOUNDED
def test_headers(plan: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]):
    raw, infos = encode_header(
        [TensorPlan(n, dtype_name(d), s) for n, (d, s) in plan.items()], metadata, "f"
    )
    length = int.from_bytes(raw[:8], "little")
    assert len(raw) == 8 + length and len(raw) % 8 == 0
    data = sum(info.nbytes for info in infos)
    header = parse_header(raw[8:], data, "f")
    assert header.metadata == metadata and header.data_bytes == data
    assert sorted(header.tensors, key=lambda t: t.name) == sorted(infos, key=lambda t: t.name)
    assert {t.name: (t.torch_dtype, t.shape) for t in header.tensors} == plan


def bits_of(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@given(PLANS, st.integers(1, 200), st.randoms(use_true_random=False))
@BOUNDED
def test_shards(
    tmp_path_factory: pytest.TempPathFactory,
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    shard_size: int,
    random,
):
    root = tmp_path_factory.mktemp("shards")
    (root / CONFIG).write_text("{}")
    tensors = {
        name: torch.tensor([random.randint(0, 1) for _ in range(torch.Size(shape).numel())])
        .reshape(shape)
        .to(dtype)
        for name, (dtype, shape) in plan.items()
    }
    order = list(tensors)
    random.shuffle(order)
    plans = [TensorPlan(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    with ShardWriter(root, plans, shard_size) as writer:
        for name in order:
            writer.write(name, tensors[name])
    ours = Checkpoint.open(root)
    assert set(ours.tensors) == set(tensors)
    for name, tensor in tensors.items():
        read = [ours.read(name)]
        with safe_open(root / ours.tensors[name].file, "pt") as file:
            read.append(file.get_tensor(name))
        for got in read:
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert bits_of(got) == bits_of(tensor)
    if len(ours.headers) > 1:
        index = json.loads((root / INDEX).read_text())
        assert index["metadata"]["total_size"] == ours.nbytes


@given(
    st.sampled_from(BITS),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([-1, 1, 5, 32, 1000]),
    st.integers(0, 1),
    st.integers(0, 2**31),
)
@BOUNDED
def test_codes(bits: int, outputs: int, inputs: int, group: int, offset: int, seed: int):
    cycle, generator = values_per_cycle(bits), torch.Generator().manual_seed(seed)
    n, k = outputs * cycle, inputs * cycle
    groups = 1 if group == -1 else -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    zeros = torch.randint(offset, 2**bits, (n, groups), generator=generator).to(torch.uint8)
    scales = torch.randn(n, groups, generator=generator).half().float()
    packed = pack(codes, scales, zeros, bits=bits, group_size=group, zero_offset=offset)
    assert torch.equal(unpack_codes(packed.qweight, bits), codes)
    assert torch.equal(unpack_zeros(packed.qzeros, bits, offset), zeros)
    assert torch.equal(packed.scales.T.float(), scales)
    assert torch.equal(packed.g_idx, trivial_g_idx(k, group))
