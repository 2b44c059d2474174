"""Qwen's zero-shot chat protocol: its prompts, and how answers of many kinds are read."""

from __future__ import annotations

import pytest

from qquant.tasks import chat

CITIES = ["Paris", "London", "Rome is old.", "Berlin"]
LAYERS = ["既不保证可靠", "也保证按序", "保证可靠。", "以上都不对"]
ASKED = "网络分层有很多好处。关于传输层的面向连接服务的特性是____。"


def test_prompts() -> None:
    assert chat.mmlu_prompt("Where?", CITIES) == (
        "The following is a multiple-choice question. Please choose the most suitable one among "
        "A, B, C and D as the answer to this question.\n\nWhere?\n"
        "A. Paris\nB. London\nC. Rome is old.\nD. Berlin\n"
    )
    assert chat.ceval_prompt("何处？", ["甲", "乙", "丙", "丁"]) == (
        "何处？\n\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n"
    )
    prompt = 'from typing import List\n\n\ndef f(x: List[int], y: str = ":") -> bool:\n    """ Is\n'
    prompt += '    it so?\n    >>> f([])\n    True\n    """\n'
    assert chat.code_prompt(prompt, "f") == (
        "Write a Python function `f(x: List[int], y: str=':') -> bool` to solve the following "
        f"problem:\nIs\nit so?\n>>> f([])\nTrue\n{prompt}"
    )


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        (" (C) ", "C"),
        ("**D**", "D"),
        ("B. London", "B"),
        ("B: because it is", "B"),
        ("The answer is B.", "B"),
        ("The answer is: C", "C"),
        ("the best answer is option **B**", "B"),
        ("**Answer:** C", "C"),
        ("Answer: D. Berlin", "D"),
        ("The answer to this question is (A).", "A"),
        ("The correct choice would be D, as A and B are not in Germany.", "D"),
        ("I would choose C because it is old", "C"),
        ("I'd pick option A", "A"),
        ("Option D is correct.", "D"),
        ("D is the right one", "D"),
        ("A is not correct. B is correct", "B"),
        ("A is wrong, so the answer is D.", "D"),
        ("The answer is not A, it is B", "B"),
        ("It isn't A but C", "C"),
        ("The correct answer is London.", "B"),
        ("It's rome is old", "C"),  # the choice's own words, its full stop and case left out
        ("As a matter of fact, Berlin", "D"),  # "As" is no A
        ("ABCD are letters; of them B", "B"),
        ("A or B? The answer is C.", "C"),
        ("Londn", "B"),  # nothing but likeness to go by
        ("berlin!", "D"),
    ],
)
def test_answers_in_english(answer: str, letter: str) -> None:
    assert chat.mmlu_answer(answer, CITIES) == letter


def test_longer_choices_are_found_first() -> None:
    choices = ["acid", "nucleic acid", "ac", "an acid rain"]
    assert chat.mmlu_answer("It is nucleic acid", choices) == "B"
    assert chat.mmlu_answer("It is an acid rain.", choices) == "D"
    assert chat.mmlu_answer("The answer is 1.", ["10", "1", "11", "0"]) == "B"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("C。因为保证", "C"),
        ("（D）", "D"),
        ("选B", "B"),
        ("应该选择C", "C"),
        ("我选定 D。", "D"),
        ("答案是D", "D"),
        ("答案：B", "B"),
        ("正确答案是：A", "A"),
        ("本题答案为（D）", "D"),
        ("这道题的正确选项为C", "C"),
        ("正确的选项应该是 B", "B"),
        ("B是正确的", "B"),
        ("A 不对，D 符合题意", "D"),
        ("A是错误的，B是正确的", "B"),
        ("选项A错误，选项B正确", "B"),
        ("不选A，选B", "B"),
        ("答案不是A，而是C", "C"),
        ("关于传输层的面向连接服务的特性是保证可靠", "C"),  # the question, its blank filled
        ("特性是也保证按序。", "B"),
        ("以上都不对。", "D"),
        ("DNA 的说法中，C", "C"),
        ("既不保证可", "A"),
    ],
)
def test_answers_in_chinese(answer: str, letter: str) -> None:
    assert chat.ceval_answer(answer, ASKED, LAYERS) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", 18),
        ("He pays $1,234.50 dollars", 1234.5),
        ("5 times 3 is 15, minus 20 is -5", -5),
        ("It is −2", -2),
        ("7 - 3 = 4", 4),
        ("from 3-4", 4),
        ("1,23 is 1 and 23", 23),
        (".5", 0.5),
        ("Rs.500", 500),
        ("so it is...18", 18),
        ("答案是18", 18),
        ("答案是-18元", -18),
        ("一共.5升", 0.5),
        ("USD18", 18),
        ("COVID-19", 19),
        ("version 3.4.5", 3.4),
        ("#### 1,000", 1000),
        ("nothing", None),
        ("", None),
    ],
)
def test_numbers(text: str, number: float | None) -> None:
    assert chat.last_number(text) == number


def test_numbers_are_compared_with_a_tolerance() -> None:
    gold = "He has 3 * 6 = 18 left.\n#### 18"
    assert chat.same_number("So it is 18.00004 dollars", gold)
    assert not chat.same_number("So it is 18.001", gold)
    assert not chat.same_number("So it is 18, which is 3 times 6", gold)  # the last one counts
    assert not chat.same_number("I do not know", gold)


BODY = "    total = sum(x)\n    return total\n"
WHOLE = f'def add(x, y={{":": 1}}):\n    """ Adds: all. """\n{BODY}'


@pytest.mark.parametrize(
    "answer",
    [
        f"Sure.\n```python\n{WHOLE}```\nThis adds.",
        f"```\nimport math\n\n{WHOLE}\n```",
        f"```Python\n{WHOLE}",  # cut off before the fence closes
        f"Here it is:\n\n{WHOLE}\nIt adds all.",
        WHOLE.replace("def add", "def other_name"),
        f"```python\ndef helper():\n    pass\n```\nThen\n```python\n{WHOLE}```",
        "```python\nclass A:\n" + "".join(f"    {line}\n" for line in WHOLE.splitlines()) + "```",
        BODY.replace("    ", "").rstrip("\n"),  # the body alone
    ],
)
def test_code_is_found_in_answers(answer: str) -> None:
    program = "def add(x, y=None):\n" + chat.code_body(answer, "add")
    space: dict[str, object] = {}
    exec(program, space)
    assert space["add"]([1, 2, 3]) == 6  # type: ignore[operator]


def test_code_on_one_line() -> None:
    assert chat.code_body("def one(): return 1", "one") == "    return 1\n"
