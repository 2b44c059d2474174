"""Original Qwen made known to transformers, and the code files that travel with an export.

`register()` is the one place that touches transformers' Auto classes; nothing calls it at import.
After it, `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` open original Qwen directories
with the classes of `qquant.models.qwen` and without `trust_remote_code`, also where the directory's
own `auto_map` points to its (no longer importable) code.

`export_files()` and the `AUTO_MAP` tables are the other half: the same source files, copied beside
the weights, let `trust_remote_code=True` do this where qquant is not installed. Family facts for
the quantizer are in `families.py`. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

# For config.json and for tokenizer_config.json of an exported original-Qwen directory.
AUTO_MAP: dict[str, str] = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
TOKENIZER_AUTO_MAP: dict[str, list[str | None]] = {
    "AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None],
}

CODE_FILES = (
    "configuration_qwen.py",
    "modeling_qwen.py",
    "qwen_generation_utils.py",
    "tokenization_qwen.py",
)


def register() -> None:
    """Tell transformers' Auto classes about original Qwen. Calling it again changes nothing.

    What is saved from then on with `save_pretrained` carries its code files and `auto_map`, as a
    class that transformers does not have must.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from .qwen.configuration_qwen import QWenConfig
    from .qwen.modeling_qwen import QWenLMHeadModel, QWenModel
    from .qwen.tokenization_qwen import QWenTokenizer

    AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
    AutoTokenizer.register(QWenConfig, QWenTokenizer, exist_ok=True)
    QWenConfig.register_for_auto_class("AutoConfig")
    QWenLMHeadModel.register_for_auto_class("AutoModelForCausalLM")
    QWenTokenizer.register_for_auto_class("AutoTokenizer")


def export_files() -> dict[str, Path]:
    """The code files an exported original-Qwen directory carries: file name -> where it is here."""
    folder = Path(__file__).parent / "qwen"
    return {name: folder / name for name in CODE_FILES}
