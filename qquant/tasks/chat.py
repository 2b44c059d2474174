"""Qwen's zero-shot chat protocol: what is asked, and how an answer is read.

The chat model is asked once, without examples, in ChatML with the usual system message, and decodes
greedily. What it says is free text, so most of the protocol is reading an answer off it. Written
from a description of the protocol (QwenLM/Qwen, `eval/evaluate_chat_*.py`), not from its code, so
that single answers may be read differently: where several patterns could match, the order here is
the described one, and the last resort, the choice whose text is most like the answer, compares with
`difflib` where theirs takes `thefuzz`. Their numbers are evaluated as Python; here they are parsed.
HumanEval's prompt may differ in white space and quotes, too (`code_prompt`).

Pure text in, text out; nothing is asked or run here.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

LETTERS = "ABCD"

# --- Multiple choice ------------------------------------------------------------------------------

_NOT = r"(?!\s*(?:is|are|was|be)?\s*(?:not\b|n't|incorrect|wrong|false))"
_LETTER = r"\(?\b([ABCD])\b(?!['’])\)?"
# In this order; of each the first match counts.
_ENGLISH = tuple(
    re.compile(pattern)
    for pattern in (
        # "the answer is B", "I would choose option (C)", "the correct choice: D"
        r"(?i:\b(?:choose|chose|choosing|select|pick)\b)(?:\s+(?i:the|option|choice|answer|letter))*"
        rf"\s*[:\"'*]*\s*{_LETTER}{_NOT}",
        r"(?i:\b(?:answer|choice|option)\b)(?:\s+(?i:to\s+(?:this|the)\s+question))?\s*[\"'*]*\s*"
        r"(?:(?i:is|be|would\s+be|should\s+be|must\s+be)|:)"
        r"(?!\s+(?i:not)\b)[\s:]*(?:(?i:the|option|choice|answer|letter)\s+)*[\"'*]*\s*"
        rf"{_LETTER}{_NOT}",
        # "B is the correct answer", "option D is right"
        rf"{_LETTER}(?:(?!(?i:\bnot\b|n't|incorrect|wrong))[^.\n])*?\b(?i:correct|right)\b",
        # "C. because ...", "C"
        r"^\s*[\"'*(]*([ABCD])(?:[\"'*)]*[.,:]|[\"'*)]*\s*$)",
    )
)
_CHINESE = tuple(
    re.compile(pattern)
    for pattern in (
        # "选B", "应该选择C", "选定 D"
        r"(?<!不)(?:选定|选择|选)\s*(?:选项|答案)?\s*(?:的?是|为)?\s*[：:]?\s*[\"“(（*]*([ABCD])(?![A-Za-z])"
        r"(?!\s*[\"”)）*]*\s*(?:是|选项)?\s*(?:不|错|误|非))",
        # "答案是B", "正确的选项应该是：C", "答案为 D"
        r"(?:答案|选项)[^。，,；;\n不ABCD]{0,8}?(?:是|选|为|应|[：:])(?!\s*不)[^。，,；;\n不ABCD]{0,4}?"
        r"[\"“(（*]*([ABCD])(?![A-Za-z])(?!\s*[\"”)）*]*\s*(?:是|选项)?\s*(?:不|错|误|非))",
        # "B是正确的", "C 选项符合题意"
        r"(?<![A-Za-z])([ABCD])(?![A-Za-z])(?:(?!不|错|误|非|[ABCD])[^。；;\n]){0,12}?(?:正确|对的|对$|符合)",
        # "C。因为", "C"
        r"^\s*[\"“(（*]*([ABCD])[\"”)）*]*\s*(?:[.．。,，、:：]|$)",
    )
)


def mmlu_prompt(question: str, choices: Sequence[str]) -> str:
    return (
        "The following is a multiple-choice question. Please choose the most suitable one among "
        f"A, B, C and D as the answer to this question.\n\n{question}\n{_listed(choices)}"
    )


def ceval_prompt(question: str, choices: Sequence[str]) -> str:
    return f"{question}\n\n{_listed(choices)}"


def _listed(choices: Sequence[str]) -> str:
    return "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, choices, strict=True))


def mmlu_answer(answer: str, choices: Sequence[str]) -> str:
    """The letter that an answer in English comes to; always one of A to D."""
    text = _with_letters(answer, {key: t.rstrip(".") for key, t in _lettered(choices).items()})
    for pattern in _ENGLISH:
        if match := pattern.search(text):
            return match[1]
    return _first_letter(text) or _most_like(text, choices)


def ceval_answer(answer: str, question: str, choices: Sequence[str]) -> str:
    """The letter that an answer in Chinese comes to; always one of A to D."""
    text = _without_question(answer, question)
    text = _with_letters(text, {key: t.rstrip("。") for key, t in _lettered(choices).items()})
    for pattern in _CHINESE:
        if match := pattern.search(text):
            return match[1]
    return _first_letter(text) or _most_like(text, choices)


def _first_letter(text: str) -> str | None:
    """The first A to D that stands alone and is not denied: not B in "not B", "不是B"."""
    text = re.sub(r"(?:\b(?:[Nn]ot|isn't)\s+\(?|不(?:是|选|为)\s*)[ABCD](?![A-Za-z])", "", text)
    match = re.search(r"(?<![A-Za-z'’])([ABCD])(?![A-Za-z'’])", text)
    return match[1] if match else None


def _lettered(choices: Sequence[str]) -> Mapping[str, str]:
    return dict(zip(LETTERS, choices, strict=True))


def _with_letters(text: str, choices: Mapping[str, str]) -> str:
    """`text` with every choice that is written out replaced by its letter, the longest first."""
    for letter, choice in sorted(choices.items(), key=lambda item: -len(item[1])):
        if choice.strip() and choice.strip() not in LETTERS:
            text = re.sub(_whole(choice.strip()), letter, text, flags=re.IGNORECASE)
    return text


def _whole(choice: str) -> str:
    """A pattern for it that does not match inside a word or a number."""
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", choice) else ""
    after = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", choice) else ""
    return before + re.escape(choice) + after


def _without_question(answer: str, question: str) -> str:
    """An answer that fills the blank in the question's last sentence: `答案是` and the filling."""
    last = question.strip().rstrip("。").split("。")[-1]
    before, blank, after = last.partition("__")
    if not blank:
        return answer
    before, after = before.strip(), after.lstrip("_").strip()
    if len(before) > 2:
        answer = answer.replace(before, "答案是")
    return answer.replace(after, "") if len(after) > 2 else answer


def _most_like(text: str, choices: Sequence[str]) -> str:
    """The choice whose text is most like the answer; of equal ones the first."""
    ratios = [SequenceMatcher(None, text.lower(), choice.lower()).ratio() for choice in choices]
    return LETTERS[max(range(len(ratios)), key=ratios.__getitem__)]


# --- Numbers --------------------------------------------------------------------------------------

# A number may stand behind anything that is no number: "USD18", "is...18", "答案是18". A hyphen is
# a sign unless it follows a letter or a number; so is a point the beginning of a number.
_NUMBER = re.compile(
    r"(?:(?<![A-Za-z\d_])(?<!\d\.)[-−+])?"
    r"(?:(?<!\d)(?<!\d\.)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![A-Za-z\d_.])\.\d+)"
)


def last_number(text: str) -> float | None:
    """The last number in it: sign, commas between thousands and decimals understood."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def same_number(answer: str, gold: str) -> bool:
    """Whether both end in the same number; absolute tolerance 1e-4."""
    one, other = last_number(answer), last_number(gold)
    return one is not None and other is not None and math.isclose(one, other, abs_tol=1e-4)


# --- Code -----------------------------------------------------------------------------------------

_FENCED = re.compile(r"```(?:[Pp]ython\d?|py)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def code_prompt(prompt: str, entry_point: str) -> str:
    """HumanEval's beginning of a function as a request: signature and docstring told apart.

    Both are those of the entry point, read as Python. Qwen's script finds them by patterns: the
    signature as it is written there, and of the first docstring, which may be a helper's, every
    line stripped, empty first and last ones among them.
    """
    signature, docstring = _described(prompt, entry_point)
    return (
        f"Write a Python function `{signature}` to solve the following problem:\n"
        f"{docstring}\n{prompt}"
    )


def _described(prompt: str, entry_point: str) -> tuple[str, str]:
    """The function's signature, without `def`, and its docstring, without indentation.

    Raises:
        ValueError: the beginning has no such function with a docstring.
    """
    for node in ast.parse(prompt).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            signature = f"{node.name}({ast.unparse(node.args)}){returns}"
            return signature, inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    raise ValueError(f"no function {entry_point} in the prompt")


def code_body(answer: str, entry_point: str) -> str:
    """The body of the function in an answer, to be put after HumanEval's beginning of it.

    The function of the right name in a fenced block, else one anywhere, else any function; without
    one the whole text is taken for the body.
    """
    named = re.compile(rf"^[ \t]*def\s+{re.escape(entry_point)}\s*\(", re.MULTILINE)
    for block in _FENCED.findall(answer):
        if match := named.search(block):
            return _body(block[match.start() :], to_end=True)
    for pattern in (named, re.compile(r"^[ \t]*def\s+\w+\s*\(", re.MULTILINE)):
        if match := pattern.search(answer):
            return _body(answer[match.start() :], to_end=False)
    return textwrap.indent(answer, " " * 4)


def _body(text: str, *, to_end: bool) -> str:
    """What follows the signature that `text` begins with: all of it, or as far as it is indented.

    The signature ends at the first colon outside brackets; brackets in defaults count.
    """
    depth, end = 0, len(text)
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == ":" and depth == 0:
            end = i + 1
            break
    first, _, rest = text[end:].partition("\n")
    margin = len(text) - len(text.lstrip(" \t"))
    lines = rest.split("\n")
    if not to_end:
        inside = margin + 1
        for n, line in enumerate(lines):
            if line.strip() and len(line) - len(line.lstrip(" \t")) < inside:
                lines = lines[:n]
                break
    lines = [line[margin:] if not line[:margin].strip() else line for line in lines]
    one_line = f"    {first.strip()}\n" if first.strip() and first.strip()[0] != "#" else ""
    return (one_line + "\n".join(lines)).rstrip() + "\n"
