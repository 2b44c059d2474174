"""Spreads exported GPTQ directories over devices, with plain transformers, for test_device_map.

Run as a script by a Python that cannot import qquant (`reader_process.NoQquant`). For each:
`whole` on the CPU; `disk`, with room in memory for four fifths of it; `buffers`, the same with
`offload_buffers`; `rooms`, the maps for two made-up GPUs of nineteen sizes; `second`, the blocks
that a second GPU would take on the meta device, up to the head.

    python offload_process.py JOBS.json RESULT.json LOGITS.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from reader_process import NoQquant


def load(path: str, **options):
    from transformers import AutoModelForCausalLM

    options = {"device_map": "cpu"} | options
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options).eval()


def run(model, ids):
    """(logits [b, t, vocab] float32, tokens of a continuation)."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
        made = model.generate(ids[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return logits.contiguous(), made[0].tolist()


def bytes_by_place(model) -> dict[str, dict[str, int]]:
    """Bytes of the tensors by kind (packed: of gptqmodel's classes; plain) and device."""
    found: dict[str, dict[str, int]] = {"packed": {}, "plain": {}}
    for module in model.modules():
        packed = type(module).__module__.startswith("gptqmodel")
        places = found["packed" if packed else "plain"]
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in own:
            place = str(tensor.device)
            places[place] = places.get(place, 0) + tensor.numel() * tensor.element_size()
    return found


def device_maps(model, size: int) -> list[dict]:
    from accelerate import infer_auto_device_map

    keep = list(model._no_split_modules)
    rooms = ({0: size * n // 20, 1: size * n // 20, "cpu": 10 * size} for n in range(1, 20))
    return [infer_auto_device_map(model, room, no_split_module_classes=keep) for room in rooms]


def half_on_meta(path: str, size: int, ids) -> dict:
    """What the head computes on the device after the first, and where each block was."""
    import torch
    from accelerate import infer_auto_device_map

    model = load(path)
    room = {0: size * 2 // 3, 1: 10 * size}
    keep = list(model._no_split_modules)
    found = infer_auto_device_map(model, room, no_split_module_classes=keep)
    named = {name: {0: "cpu", 1: "meta"}[device] for name, device in found.items()}
    model, seen = load(path, device_map=named), {}
    model.lm_head.register_forward_hook(
        lambda _, __, out: seen.update(device=str(out.device), shape=[*out.shape])
    )
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except NotImplementedError as error:  # the way back: meta tensors hold nothing to copy
        seen["ends"] = str(error)
    return {**seen, "map": named}


def spread(path: str, ids, folder: Path) -> tuple[dict, dict]:
    model = load(path)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    rooms = device_maps(model, size)
    logits = {}
    seen: dict = {"rooms": rooms, "keep": sorted(model._no_split_modules)}
    logits["whole"], seen["whole"] = run(model, ids)
    auto = {"device_map": "auto", "max_memory": {"cpu": size * 4 // 5}}
    split = load(path, **auto, offload_folder=str(folder))
    seen["map"], seen["places"] = split.hf_device_map, bytes_by_place(split)
    logits["disk"], seen["disk"] = run(split, ids)
    try:
        split = load(path, **auto, offload_folder=str(folder), offload_buffers=True)
        logits["buffers"], seen["buffers"] = run(split, ids)
    except RuntimeError as error:
        seen["error"] = str(error)
    seen["second"] = half_on_meta(path, size, ids)
    return seen, logits


def main() -> None:
    sys.meta_path.insert(0, NoQquant())
    import torch
    from safetensors.torch import save_file

    jobs, result, logits_file = map(Path, sys.argv[1:])
    todo = json.loads(jobs.read_text())
    ids = torch.tensor(todo["ids"])
    found, logits = {}, {}
    for name, path in todo["directories"].items():
        found[name], own = spread(path, ids, jobs.parent / f"offload-{name}")
        logits |= {f"{name}.{how}": tensor for how, tensor in own.items()}
    save_file(logits, logits_file)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
