"""vLLM's own validation of directories, without a GPU: its code, up to where a kernel would run.

    python read_vllm.py JOBS.json RESULT.json

Under vLLM's Python package: its registry says whether it has the model's class; its GPTQ config
class parses `quantization_config`; for every linear of the file, under the name that vLLM gives it
(`packed_modules_mapping` of its model class), its `dynamic` rules are applied, and its choice of
kernel is asked for a GPU of compute capability 8.0 and 9.0. The one thing that is made up is the
platform, which says that it is CUDA; no weight is loaded and no product is computed.
"""

from __future__ import annotations

import importlib.metadata
import json
import struct
import sys
import traceback
from copy import deepcopy
from pathlib import Path
from typing import Any

CAPABILITIES = ((8, 0), (9, 0))


def pretend(capability: tuple[int, int]) -> None:
    """Make vLLM's platform a CUDA one of `capability`, wherever it asks."""
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class Pretended(Platform):
        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

    platforms._current_platform = Pretended()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm") and "current_platform" in vars(
            module
        ):
            module.current_platform = platforms._current_platform


def shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every packed linear, from the headers of the safetensors files."""
    bits = json.loads((directory / "config.json").read_text())["quantization_config"]["bits"]
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as data:
            header = json.loads(data.read(struct.unpack("<Q", data.read(8))[0]))
        for name, info in header.items():
            if name.endswith(".g_idx"):
                linear = name[: -len(".g_idx")]
                outputs = header[f"{linear}.qweight"]["shape"][1]
                found[linear] = (info["shape"][0], outputs)
    assert bits and found
    return found


def read(directory: Path) -> dict[str, Any]:
    import torch
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils.gptq_utils import (
        get_dynamic_override,
        override_config,
    )
    from vllm.model_executor.models.registry import ModelRegistry

    config = json.loads((directory / "config.json").read_text())
    architecture = config["architectures"][0]
    if architecture not in ModelRegistry.get_supported_archs():
        from vllm.model_executor.models import registry

        last = registry._PREVIOUSLY_SUPPORTED_MODELS.get(architecture)
        gone = f"; vLLM had one until {last}" if last else ""
        raise ValueError(f"no model class for {architecture}{gone}")
    quant = config["quantization_config"]
    if quant["quant_method"] != "gptq":
        raise NotImplementedError("only GPTQ is checked")
    assert AutoGPTQConfig.override_quantization_method(quant, None) == "auto_gptq"
    parsed = AutoGPTQConfig.from_config(quant)
    model = ModelRegistry._try_load_model_cls(architecture)
    packed = getattr(model, "packed_modules_mapping", {})
    fused = {part: name for name, parts in packed.items() for part in parts}
    linears: dict[str, list[tuple[int, int]]] = {}
    for name, shape in shapes(directory).items():
        parent, _, leaf = name.rpartition(".")
        linears.setdefault(f"{parent}.{fused.get(leaf, leaf)}", []).append(shape)
    kernels: dict[str, dict[str, int]] = {}
    for capability in CAPABILITIES:
        pretend(capability)
        used = kernels.setdefault(f"{capability[0]}.{capability[1]}", {})
        for name, parts in linears.items():
            own = deepcopy(parsed)
            if get_dynamic_override(own, name) is False:
                raise ValueError(f"{name} is quantized and `dynamic` says it is not")
            override_config(own, name)
            shape = (parts[0][0], sum(outputs for _, outputs in parts))
            kernel = choose_mp_linear_kernel(
                MPLinearLayerConfig(
                    full_weight_shape=shape,
                    partition_weight_shape=shape,
                    weight_type=own.quant_type,
                    act_type=torch.float16,
                    group_size=own.group_size,
                    zero_points=False,
                )
            )
            used[kernel.__name__] = used.get(kernel.__name__, 0) + 1
    return {"kernels_by_capability": kernels, "fused": sorted(set(fused.values()))}


def main() -> None:
    jobs, result = map(Path, sys.argv[1:])
    found: dict[str, Any] = {}
    for name, directory in json.loads(jobs.read_text())["directories"].items():
        try:
            found[name] = read(Path(directory))
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    versions = {"python": sys.version.split()[0]}
    versions |= {n: importlib.metadata.version(n).split("+")[0] for n in ("vllm", "torch")}
    result.write_text(json.dumps({"versions": versions, "found": found}))


if __name__ == "__main__":
    main()
