"""Importing qquant is light and changes nothing; its modules depend on each other one way only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qquant

ROOT = Path(qquant.__file__).parent

# A module may import what stands below it, never above: the flow of the package, top down.
# Modules in one tuple stand side by side: they may not import each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("convert_cli", "directory_cli", "profile_cli", "report_cli"),
    ("options",),
    ("console",),
    ("profile_progress",),
    ("native", "relayout"),
    ("conversion",),
    ("reproduce",),
    ("methods",),
    ("bnb_convert", "convert"),
    ("result",),
    ("estimate",),
    ("measured",),
    ("pace", "budget"),
    ("blocks",),
    ("already", "identity", "journal"),
    ("profiling",),
    ("profile_inputs",),
    ("profile_card", "hub"),
    ("card_results",),
    ("protocol", "worker"),
    (
        *("parts.load", "parts.accuracy", "parts.layers", "parts.long_context"),
        *("parts.tasks", "parts.memory"),
    ),
    ("parts.speed",),
    ("parts.base",),
    ("parts",),
    ("tasks.run",),
    ("tasks.manager",),
    ("tasks.preset", "tasks.local"),
    ("tasks.chat", "tasks.sandbox", "tasks.sandbox_child"),
    ("heldout", "dense"),
    ("profile", "profile_report", "speed", "memory"),
    ("reporting.page", "reporting.changes"),
    ("reporting.sections", "reporting.glance", "reporting.png"),
    ("reporting.svg",),
    ("reporting.charts",),
    ("reporting.accuracy", "reporting.running", "reporting.protocol"),
    ("reporting.figures",),
    ("reporting.schema",),
    ("reporting",),
    ("bandwidth", "slow"),
    ("serving",),
    ("readers",),
    ("generation", "caches", "kept"),
    ("readback",),
    ("verify",),
    ("bnb_verify",),
    ("compare", "inspection"),
    ("bnb_card", "fast_tokenizer"),
    ("native_layout",),
    ("card", "export", "progress"),
    ("card_loading", "front_matter"),
    ("manifest",),
    ("engine",),
    ("sensitivity",),
    ("runtime",),
    ("bnb", "assembly"),
    ("bnb_check", "bnb_guard"),
    ("sizes",),
    ("plan",),
    ("complete",),
    ("compressed",),
    ("kernel_choice", "kernel_report"),
    ("packed_head",),
    ("kernels", "layout", "findings", "vocabulary"),
    ("calibration.tokens",),
    ("calibration.sampling", "calibration.sources"),
    ("calibration.render",),
    ("calibration.formats",),
    ("calibration.probe",),
    ("calibration.walk",),
    ("calibration.batch", "calibration.experts"),
    ("calibration.hold", "hessian", "gptq"),
    ("factor", "grid", "running_sum"),
    ("columns",),
    ("columns_cpu", "solver_code"),
    ("columns_triton",),
    ("batching",),
    ("calibration.enough",),
    ("calibration",),
    ("unquantized",),
    ("models.skeleton", "models.tokenizer"),
    ("attention", "models.fused_blocks"),
    ("fused",),
    ("products",),
    ("costs",),
    ("models.experts", "models.shapes"),
    ("models",),
    ("mixed", "compressed_layout"),
    ("models.declared",),
    ("models.qwen", "models.families"),
    ("compiling",),
    ("int4_torch", "avx2"),
    ("avx2_op",),
    ("avx2_code", "held"),
    ("rebuild",),
    ("rebuild_triton",),
    ("avx2_ir", "solver_ir", "fused_ir", "pack", "bnb_state", "int4_cpu", "int4_triton", "marlin"),
    ("int4_kernels",),
    ("shards", "publish"),
    ("checkpoint", "bnb_layout"),
    ("sums", "overlap"),
    ("place",),
    ("directory", "headers", "devices"),
    ("int16", "int16_attention", "int8", "int8_weight"),
    ("int16_products_ir", "int16_attention_ir", "int8_ir", "int8_weight_ir"),
    ("llvm_code", "int16_ir", "scratch", "pool"),
    ("llvm_ir",),
    ("heap",),
    ("host",),
    ("events", "timings", "bnb_cli"),
    ("report",),
    ("bnb_spec", "tasks.options", "tasks.paired"),
    ("tasks",),
    ("config", "world"),
    ("errors", "finite"),
    ("estimates", "profile_entries"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
HEAVY = (
    *("torch", "transformers", "numpy", "safetensors", "rich", "tiktoken", "greenlet", "llvmlite"),
    *("bitsandbytes", "peft", "lm_eval"),
)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(p): p for p in sorted(ROOT.rglob("*.py")) if "__pycache__" not in p.parts}


def level_of(name: str) -> int:
    """The level of the module or of the nearest package above it that has one."""
    while name not in LEVEL:
        name, _, tail = name.rpartition(".")
        assert tail and name, "a module without a place in ORDER"
    return LEVEL[name]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(name: str, path: Path) -> set[str]:
    """qquant modules that the module imports anywhere in it, apart from TYPE_CHECKING blocks."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    if name == "__init__":
        package = []
    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while queue:
        node = queue.pop()
        if is_type_checking(node):
            continue
        queue.extend(ast.iter_child_nodes(node))
        bases: list[str] = []
        if isinstance(node, ast.Import):
            bases = [a.name[7:] for a in node.names if a.name.startswith("qquant.")]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package[: len(package) - (node.level - 1)]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            elif node.module == "qquant" or (node.module or "").startswith("qquant."):
                base = (node.module or "")[7:]
            else:
                continue
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                bases.append(full if full in MODULES else base)
        found.update(base for base in bases if base)
    return found - {name}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down_the_flow(name: str) -> None:
    if name == "__init__":
        pytest.skip("the package itself imports by name, on demand")
    assert level_of(name) >= 0
    for other in imports(name, MODULES[name]):
        if other in MODULES and name.startswith("models.qwen") and other.startswith("models.qwen"):
            continue  # the files that travel with an export, one unit
        assert level_of(other) > level_of(name), f"{name} imports {other}, which is above it"


def test_the_files_that_travel_need_nothing_of_qquant() -> None:
    for name, path in MODULES.items():
        if name.startswith("models.qwen."):
            outside = {o for o in imports(name, path) if not o.startswith("models.qwen")}
            assert not outside, f"{name} imports {outside}"


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    path = tmp_path / "pack.py"
    path.write_text("def f():\n    from .convert import quantize\n")
    assert imports("pack", path) == {"convert"}
    assert LEVEL["convert"] < LEVEL["pack"]
    nested = tmp_path / "walk.py"
    nested.write_text("from ..errors import RunError\nfrom .. import events\nimport qquant.cli\n")
    assert imports("calibration.walk", nested) == {"errors", "events", "cli"}


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n' + ' '.join(m.split('.')[0] for m in sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(shown.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import qquant; qquant.QuantSpec; qquant.BnbSpec; qquant.__version__; dir(qquant)",
        "import qquant; qquant.QQuantError; qquant.CalibrationSpec; qquant.OutputSpec",
        "from qquant.cli import cli; cli(['--help'], standalone_mode=False)",
        "from qquant.cli import cli; cli(['quantize', '--help'], standalone_mode=False)",
        "from qquant.cli import cli; cli(['verify', '--help'], standalone_mode=False)",
        "from qquant.cli import cli; cli(['inspect', '--help'], standalone_mode=False)",
        "from qquant.cli import cli; cli(['quantize', '--bist', '--json'], standalone_mode=False)",
    ],
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & set(HEAVY)


def test_import_changes_nothing() -> None:
    """Environment, warning filters and logging stay as they were."""
    script = (
        "import logging, os, sys, warnings\n"
        "def state():\n"
        "    return dict(os.environ), list(warnings.filters), list(logging.root.handlers)\n"
        "before = state()\n"
        "import qquant, qquant.cli, qquant.config, qquant.events\n"
        "assert state() == before\n"
        "assert not logging.getLogger('qquant').handlers\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_can_be_looked_up() -> None:
    for name in qquant.__all__:
        assert getattr(qquant, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = qquant.nonsense


def test_every_module_tells_its_story() -> None:
    for name, path in MODULES.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text and len(text) > 20, f"{name} opens without a docstring"
