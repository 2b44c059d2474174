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
MISSING = [n for n in ("gptqmodel", "optimum", "bitsandbytes", "peft") if find_spec(n) is None]
# One of each cause of difference: code of its own, zeros, kernel, rules per linear, bitsandbytes.
AGAIN = ["qwen-int4", "qwen-native", "qwen2-int4-asym", "qwen2-mixed", "qwen2-nf4", "qwen3-int4"]


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


def test_rules_agree_with_vllm_itself(results: dict[str, Any], tmp_path: Path) -> None:
    """`qquant inspect --readers` against what vLLM's own code said."""
    from qquant.readers import verdicts

    directories = module("directories")
    names = ["qwen-int4", "qwen-native", "qwen2-int8", "qwen2-int4-asym", "qwen2-mixed"]
    for name, path in directories.make(tmp_path, names).items():
        said = results["cells"][name]["vllm"]
        rules = next(v for v in verdicts(path) if v.reader.startswith("vLLM"))
        assert rules.reads is ("error" not in said), (name, rules, said)
        for kernel in {k for used in said.get("kernels_by_capability", {}).values() for k in used}:
            assert kernel.removesuffix("LinearKernel") in rules.how


@pytest.mark.readers
@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'qquant[readers,bnb]'"
)
def test_readers_do_what_the_page_says(results: dict[str, Any], tmp_path: Path) -> None:
    page, run, directories = module("page"), module("run"), module("directories")
    made = directories.make(tmp_path / "kinds", AGAIN)
    references = {name: directories.reference(path) for name, path in made.items()}
    for reader in READERS:
        seen = run.read(reader, Path(sys.executable), tmp_path, made, directories.token_ids())
        for name in made:
            now = run.cell(seen["found"][name], references[name])
            then = results["cells"][name][reader]
            assert ("error" in now) == ("error" in then), (reader, name, now, then)
            if "error" not in now:
                assert (now["distance"] > page.READS) == (then["distance"] > page.READS)
                assert now["generates"] == then["generates"], (reader, name, now)
