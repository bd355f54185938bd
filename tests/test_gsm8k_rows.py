"""The reward of GSM8K on the benchmark's own rows: every gold solution in five forms, and changed answers."""

import json
import re
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from hivegrpo.peer.rewards.gsm8k import final_number, gsm8k_answer

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"

SOLUTIONS = [
    "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18",
    "It takes 2/2=<<2/2=1>>1 bolt.\nSo that is 2+1=<<2+1=3>>3 bolts.\n#### 3",
    "The value rose by 80,000*1.5=<<80000*1.5=120000>>120,000.\n#### 70000",
    "He runs 3*3=<<3*3=9>>9 times.\nSo 9*60=<<9*60=540>>540 metres.\n#### 540",
    "It costs 5*.6=$<<5*.6=3>>3 each.\n#### 64",
    "That is 1,500,000 in all.\n#### 1,500,000",
    "He owes 20 and has 5.\nSo he is at 5-20=<<5-20=-15>>-15.\n#### -15",
    "Half of 5 is 5/2=<<5/2=2.5>>2.5.\n#### 2.5",
    "Nothing is left: 4-4=<<4-4=0>>0.\n#### 0",
    "12 dozen are 12*12=<<12*12=144>>144.\n#### 144",
    "2 weeks have 2*7=<<2*7=14>>14 days.\n#### 14",
    "30% of 90 is <<30*90/100=27>>27.\n#### 27",
]

FORMS: dict[str, Callable[[Decimal], str]] = {
    "marker": lambda number: f"First 7, then 12.\n#### {number:,}",
    "prefix": lambda number: f"First 7, then 12.\nA: {number}",
    "boxed": lambda number: f"First 7, then 12: \\boxed{{{number}}}",
    "sentence": lambda number: f"First 7, then 12. The answer is ${number:,.2f}.",
    "bare": lambda number: f"First 7, then 12.\n{number}",
}

CHANGES: dict[str, Callable[[Decimal], Decimal]] = {
    "one more": lambda number: number + 1,
    "one less": lambda number: number - 1,
    "last digit": lambda number: _with_digit(number, -1),
    "first digit": lambda number: _with_digit(number, 0),
    "sign": lambda number: -number,
    "ten times": lambda number: number * 10,
    "a tenth": lambda number: number / 10,
    "a digit more": lambda number: number * 10 + 7,
}


def _with_digit(number: Decimal, place: int) -> Decimal:
    """With another digit at that place."""
    text = str(number)
    at = [index for index, letter in enumerate(text) if letter.isdigit()][place]
    return Decimal(f"{text[:at]}{int(text[at]) % 9 + 1}{text[at + 1 :]}")


def solutions() -> list[str]:
    """The benchmark's test set where it lies beside the repository, else a dozen rows of its form."""
    if not GSM8K.exists():
        return SOLUTIONS
    return [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def reference_answer(solution: str) -> Decimal:
    """The number after the marker, read as the benchmark's authors read it."""
    found = re.search(r"#### (-?[0-9.,]+)", solution)
    assert found is not None
    return Decimal(found[1].replace(",", ""))


@pytest.mark.parametrize("form", FORMS)
def test_gold_in_each_form_is_right(form: str) -> None:
    gold = solutions()
    completions = [FORMS[form](reference_answer(solution)) for solution in gold]
    assert gsm8k_answer(completions=completions, answer=gold) == [1.0] * len(gold)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_a_changed_answer_is_wrong_in_each_form(form: str, change: str) -> None:
    gold = solutions()
    numbers = [reference_answer(solution) for solution in gold]
    changed = [(CHANGES[change](number), solution) for number, solution in zip(numbers, gold, strict=True)]
    differing = [(FORMS[form](other), solution) for other, solution in changed if other != reference_answer(solution)]
    assert len(differing) >= len(gold) - 1  # minus 0 and ten times 0 are 0
    completions, answers = zip(*differing, strict=True)
    assert gsm8k_answer(completions=list(completions), answer=list(answers)) == [0.0] * len(differing)


def test_the_gold_solution_itself_is_right() -> None:
    gold = solutions()
    assert gsm8k_answer(completions=list(gold), answer=gold) == [1.0] * len(gold)


def test_the_number_alone_will_do_for_gold_and_for_a_completion_in_chat_form() -> None:
    message = [{"role": "assistant", "content": "so 18"}]
    assert gsm8k_answer(completions=[message, "18.0", "17"], answer=[18, "18", 18]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18\nQuestion: how many?\n#### 5", "18"),  # the first marker: what follows is another problem
        ("#### about 18 eggs in 3 days", "18"),
        ("7-5", "5"),  # no minus 5
        ("it falls to -5", "-5"),
        ("it falls to \N{MINUS SIGN}5", "-5"),
        ("-$1,234.50", "-1234.50"),
        ("$-1,234.50", "-1234.50"),
        ("$.50", "0.50"),
        ("16, 18", "18"),
        ("1,2345", "2345"),
        ("18.", "18"),
        ("**18**", "18"),
        ("18km", "18"),
        ("x^2 = 9", "9"),
        ("3*4=12", "12"),
        ("9" * 32, "9" * 32),
        ("9," + "999," * 9 + "999", "9" * 31),
        ("x" * 1000 + " 18 " + "y" * 1000, "18"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "12 ####", "NaN", "#### NaN", "inf", "-Infinity", "1" + ",000" * 20, "1" + ",000" * 200),
        *("9" * 33, "9" * 100_000, "9." + "9" * 32, "#### " + "9" * 33),
        *("٣٤٥", "¹²", "#### 1٣", "８8", "#### ８8", "9²", "18½", "18万"),
        *("9**9**9", "#### 9**9**9", "9^9^9", "#### 9^9", "10^{3}", "2e5", "#### 2e5", "9E+9", "1e-9"),
        *("0x12", "#### 0x12", "3*4", "#### 3*4", "3×4", "1/2", "#### 1/2", "\\frac{1}{2}"),
    ],
)
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


def test_an_answer_without_a_number_is_skipped() -> None:
    assert gsm8k_answer(completions=["", "3"], answer=["none", "3"]) == [None, 1.0]


LONG = ("9", "1,", "(", "- ", "-", "$", "$ ", "1,000", ",111", "####", "9.", ".", "9**", "\\boxed{")


@pytest.mark.parametrize("prefix", ["", "####"])
@pytest.mark.parametrize("text", LONG)
def test_time_is_proportional_to_a_long_completion(text: str, prefix: str) -> None:
    """A megabyte takes some milliseconds; mild backtracking would take many times the second."""
    begin = time.process_time()
    gsm8k_answer(completions=[prefix + text * (1_000_000 // len(text))], answer=["1"])
    assert time.process_time() - begin < 1.0
