"""The compatibility page is made of its results, and the readers at hand still do what it says.

`compat/run.py` runs every reader in an environment of its own, on demand. Here the readers of the
tests' environment read a part of the kinds again.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COMPAT = Path(__file__).parents[1] / "compat"
READERS = ("transformers", "peft", "qquant")  # GPTQModel alone is in test_readers.py
NEEDED = ("gptqmodel", "optimum", "bitsandbytes", "peft", "compressed_tensors")
MISSING = [name for name in NEEDED if find_spec(name) is None]
# One of each cause of difference: code of its own, zeros, kernel, rules per linear, bitsandbytes,
# another format, experts.
AGAIN = ["qwen-int4", "qwen-native", "qwen2-int4-asym", "qwen2-mixed", "qwen2-nf4"]
AGAIN += ["qwen2-int4-compressed", "qwen3-moe-int4"]


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(COMPAT))
    try:
        spec = importlib.util.spec_from_file_location(name, COMPAT / f"{name}.py")
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[name] = found
        spec.loader.exec_module(found)
        return found
    finally:
        sys.path.remove(str(COMPAT))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return dict(json.loads((COMPAT / "results.json").read_text()))


def test_the_page_is_made_of_the_results(results: dict[str, Any]) -> None:
    page = module("page")
    assert page.PAGE.read_text(encoding="utf-8") == page.render(results)


def test_every_kind_has_met_every_reader(results: dict[str, Any]) -> None:
    page, directories = module("page"), module("directories")
    assert list(results["kinds"]) == list(directories.KINDS)
    for kind in directories.KINDS:
        assert set(results["cells"][kind]) == set(page.TITLES), kind


def test_every_no_has_a_reason_in_plain_words(results: dict[str, Any]) -> None:
    page = module("page")
    for kind, cells in results["cells"].items():
        for reader, cell in cells.items():
            if "error" in cell:
                assert page.reason(reader, cell["error"]), (kind, reader, cell["error"])


def test_a_kind_that_a_reader_was_not_given_says_so(results: dict[str, Any]) -> None:
    page = module("page")
    kind = next(iter(results["kinds"]))
    cells = {**results["cells"], kind: {"qquant": results["cells"][kind]["qquant"]}}
    shown = page.render({**results, "cells": cells})
    row = next(
        line for line in shown.splitlines() if line.startswith(f"| {results['kinds'][kind]} ")
    )
    assert row.count("not looked at") == len(page.TITLES) - 1
    assert "not looked at: not run on this kind" in shown


def test_the_page_says_where_readers_ran() -> None:
    page = module("page")
    said = page.environments({"vllm": "own", "auto-gptq": "own", "peft": "given"})
    assert said.startswith("auto-gptq and vLLM ran each in an environment of its own")
    assert said.endswith("PEFT in that of the tests.")
    assert page.environments({"peft": "given"}) == "PEFT ran in that of the tests."


def test_vllm_found_a_parameter_for_everything(results: dict[str, Any]) -> None:
    """What its own loader did with each kind it takes; mixtures and compressed-tensors, too."""
    filled = {kind for kind, cells in results["cells"].items() if "parameters" in cells["vllm"]}
    assert {"qwen-native", "qwen2-int4-compressed", "qwen3-moe-int4", "qwen3.5-int4"} <= filled
    assert all(results["cells"][kind]["vllm"]["parameters"] > 30 for kind in filled)


def test_rules_agree_with_vllm_itself(results: dict[str, Any], tmp_path: Path) -> None:
    """`qquant inspect --readers` against what vLLM's own code said."""
    from qquant.readers import verdicts

    directories = module("directories")
    names = ["qwen-int4", "qwen-native", "qwen2-int4-asym", "qwen2-mixed"]
    names += ["qwen2-int4-g32", "qwen2-int4-asym-compressed", "qwen3-moe-int4"]
    for name, path in directories.make(tmp_path, names).items():
        said = results["cells"][name]["vllm"]
        rules = next(v for v in verdicts(path) if v.reader.startswith("vLLM"))
        assert rules.reads is ("error" not in said), (name, rules, said)
        used = said.get("kernels_by_capability", {})
        earlier, hopper = rules.how.partition(";")[::2]
        for capability, where in (("8.0", earlier), ("9.0", hopper)):
            for kernel in used.get(capability, {}):
                short = kernel.removesuffix("LinearKernel").removesuffix(" (experts)")
                assert short.lower() in where.lower(), (name, rules.how, used)


@pytest.mark.readers
@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'qquant[readers,bnb]'"
)
def test_readers_do_what_the_page_says(results: dict[str, Any], tmp_path: Path) -> None:
    """Others' each in a process without qquant; its own reader here."""
    page, run, own, directories = map(module, ("page", "run", "read", "directories"))
    made, ids = directories.make(tmp_path / "kinds", AGAIN), directories.token_ids()
    references = {name: directories.reference(path) for name, path in made.items()}
    for reader in READERS:
        if reader == "qquant":
            found = {name: own.read(reader, str(path), ids) for name, path in made.items()}
        else:
            found = run.read(reader, Path(sys.executable), tmp_path, made, ids)["found"]
        for name in made:
            now = run.cell(found[name], references[name])
            then = results["cells"][name][reader]
            assert ("error" in now) == ("error" in then), (reader, name, now, then)
            if "error" not in now:
                assert (now["distance"] > page.READS) == (then["distance"] > page.READS)
                assert now["generates"] == then["generates"], (reader, name, now)
