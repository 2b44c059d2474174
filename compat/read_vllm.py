"""vLLM's own loading of directories, without a GPU: its code, up to where a kernel would run.

    python read_vllm.py JOBS.json RESULT.json

Under vLLM's Python package: its registry says whether it has the model's class, and its engine
config is made, which validates config.json and parses `quantization_config`. Then, for a GPU of
compute capability 8.0 and 9.0, its model is built on the CPU, where each linear and each set of
experts gets its quantization method (`dynamic` rules included) and chooses its kernel; and its
loader reads the safetensors files into the parameters, by its own names for them. Every parameter
must have been loaded, and the packed numbers in them must be those of the files.

Two things are made up: the platform, which says that it is CUDA while tensors are on the CPU, and
an op that vLLM's compiled part would register (`silu_and_mul`), which is declared with nothing
behind it. What would come next, repacking for the kernel and every product, needs a GPU and is not
run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

CAPABILITIES = ((8, 0), (9, 0))
_PACKED = ("qweight", "qzeros", "weight_packed", "weight_zero_point")
_SCALES = ("scales", "weight_scale")


def pretend(capability: tuple[int, int] | None) -> None:
    """Make vLLM's platform a CUDA one of `capability`, wherever it asks; None is the CPU."""
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    class Pretended(CpuPlatform):
        _enum = PlatformEnum.CUDA

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

    platform = CpuPlatform() if capability is None else Pretended()
    platforms._current_platform = platform
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm") and "current_platform" in vars(module):
            module.current_platform = platform


def check_class(directory: Path) -> None:
    """Imports vLLM's class for the directory's model; ValueError where its registry has none."""
    from vllm.model_executor.models import registry

    config = json.loads((directory / "config.json").read_text())
    architecture = config["architectures"][0]
    if architecture not in registry.ModelRegistry.get_supported_archs():
        last = registry._PREVIOUSLY_SUPPORTED_MODELS.get(architecture)
        gone = f"; vLLM had one until {last}" if last else ""
        raise ValueError(f"no model class for {architecture}{gone}")
    registry.ModelRegistry._try_load_model_cls(architecture)


def engine_config(directory: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(directory),
        dtype="float16",
        enforce_eager=True,
        load_format="safetensors",
        max_model_len=64,
        skip_tokenizer_init=True,
    ).create_engine_config()


def built(config: Any) -> Any:
    """vLLM's model for an engine config, in a process group of one."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config), set_default_torch_dtype(torch.float16):
        if not torch.distributed.is_initialized():
            parallel_state.init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        parallel_state.destroy_model_parallel()  # the last model's may have no group of experts
        parallel_state.initialize_model_parallel(1, 1)
        return initialize_model(config)


def kernels(model: Any) -> dict[str, int]:
    """The kernels that vLLM chose, and for how many of its linears and sets of experts."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for holder in (method, getattr(module, "scheme", None)):
            kernel = getattr(holder, "kernel", None)
            backend = getattr(holder, "wna16_moe_backend", None)
            if kernel is not None:
                found[type(kernel).__name__] += 1
            elif backend is not None:
                found[f"{backend.name} (experts)"] += 1
    return dict(found)


def loaded(model: Any, config: Any) -> int:
    """How many parameters vLLM's loader filled.

    Raises:
        ValueError: it did not fill all, or not with the packed numbers of the files.
    """
    import torch
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stored: dict[tuple[str, ...], list[Any]] = {_PACKED: [], _SCALES: []}

    def watched() -> Any:
        loader = DefaultModelLoader(config.load_config)
        for name, tensor in loader.get_all_weights(config.model_config, model):
            for kind, tensors in stored.items():
                if name.rpartition(".")[2] in kind:
                    tensors.append(tensor.flatten().clone())
            yield name, tensor

    filled = model.load_weights(watched())
    parameters = dict(model.named_parameters())
    left = {n for n in parameters if not _optional(n)} - set(filled)
    if left:
        raise ValueError(f"not in the files: {sorted(left)[:3]}")
    for kind, tensors in stored.items():
        ends = tuple(f"{before}{end}" for end in kind for before in (".", "w13_", "w2_"))
        held = [p.detach().flatten() for n, p in parameters.items() if n.endswith(ends)]
        if not torch.equal(torch.cat(held).sort().values, torch.cat(tensors).sort().values):
            raise ValueError(f"{kind[0]}: the parameters hold other numbers than the files")
    return len(parameters)


def _optional(name: str) -> bool:
    """Experts' biases and the scales of attention's cache: made for files that have them."""
    return name.endswith(("w13_bias", "w2_bias")) or ".self_attn.attn." in name


def read(directory: Path) -> dict[str, Any]:
    seen: dict[str, dict[str, int]] = {}
    for capability in CAPABILITIES:
        pretend(None)  # what is imported here is what there is for a CPU
        check_class(directory)
        config = engine_config(directory)
        pretend(capability)
        model = built(config)
        seen[".".join(map(str, capability))] = kernels(model)
        filled = loaded(model, config)
    return {"kernels_by_capability": seen, "parameters": filled}


def said(error: Exception) -> str:
    """The error's own words, without what pydantic puts around them."""
    found = getattr(error, "errors", None)
    if callable(found):
        return "; ".join(part["msg"].removeprefix("Value error, ") for part in found())
    return f"{type(error).__name__}: {error}"


def main() -> None:
    jobs, result = map(Path, sys.argv[1:])
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    import torch

    ops = torch.library.Library("_C", "FRAGMENT")
    ops.define("silu_and_mul(Tensor! out, Tensor input) -> ()")
    found: dict[str, Any] = {}
    for name, directory in json.loads(jobs.read_text())["directories"].items():
        try:
            found[name] = read(Path(directory))
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": said(error)}
    versions = {"python": sys.version.split()[0]}
    versions |= {n: importlib.metadata.version(n).split("+")[0] for n in ("vllm", "torch")}
    result.write_text(json.dumps({"versions": versions, "found": found}))


if __name__ == "__main__":
    main()
