"""The math-verify reward: gold first, and no credit for what neither side means."""

import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from hivegrpo.peer.rewards.mathematics import MAX_TEXT, math_verify


def score(completion: Any, gold: Any) -> float | None:
    (only,) = math_verify(completions=[completion], answer=[gold])
    return only


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("\\boxed{1234}", "so he has\n#### 1,234"),
        ("That makes\n#### 1,234", "1234"),
        ("The answer is $1,234.00.", "1234"),
        ("A: 1234", 1234),
        ("first 7, then\n1234", "$1,234"),
        ("$\\frac12$", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("The final answer is \\(\\frac{3}{4}\\).", 0.75),
        ("\\boxed{(x+1)^2}", "x^2+2x+1"),
        ("\\[2^{10}\\]", "2^{10}"),
        ("1024", "$2^{10}$"),
        ("\\boxed{x=5}", "5"),
        ("5", "x = 5"),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
        ("$[0, 1)$", "[0,1)"),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
        ("50%", "50\\%"),
        ("\\boxed{\\text{Monday}}", "\\text{Monday}"),
        ("<think>\\boxed{3}</think> It is \\boxed{7}.", "\\boxed{7}"),
        ("\\boxed{5}, or 6 if one counts twice", "5"),
        ("-3.50", "-3.5"),
        ("1 234", "1 234"),
        ([{"role": "assistant", "content": "It is $4$."}], "4"),
    ],
)
def test_the_same_answer_in_another_form_scores_one(completion: Any, gold: Any) -> None:
    assert score(completion, gold) == 1.0


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("\\boxed{1235}", "1234"),
        ("10", "$2^{10}$"),
        ("2", "2^{10}"),  # bare LaTeX is not the first number in it
        ("3", "3x^2-5"),
        ("235", "1 234"),
        ("\\boxed{x+2}", "x+1"),
        ("\\boxed{6}, not \\boxed{5}, which is \\boxed{7}", "5"),
        ("", "5"),
        ("no idea", "5"),
        ("nan", "5"),
        ("\\boxed{}", "0"),
        ("\\boxed{\\infty}", "5"),
        ("\\frac{1}{0}", "5"),
    ],
)
def test_another_answer_and_none_score_zero(completion: str, gold: str) -> None:
    assert score(completion, gold) == 0.0


@pytest.mark.parametrize("gold", ["", "  ", "???", "$$", "no answer", "hello", "####", "None", "\\boxed{", "0" * 5000])
@pytest.mark.parametrize("completion", ["", "5", "???", "no answer", "hello", "\\boxed{"])
def test_gold_without_mathematics_is_none_even_where_the_texts_are_equal(completion: str, gold: str) -> None:
    assert score(completion, gold) is None


def test_gold_sets_the_form() -> None:
    """An equation given for a number counts by its right side; a number given for an equation does not."""
    assert score("\\boxed{2x+z=1}", "1") == 1.0
    assert score("1", "2x+z=1") == 0.0


def test_only_the_end_of_a_completion_is_read() -> None:
    assert score("\\boxed{5}" + " and so on" * (MAX_TEXT // 10), "5") == 0.0
    assert score("and so on " * MAX_TEXT + "\\boxed{5}", "5") == 1.0


def test_a_long_completion_costs_what_its_end_does() -> None:
    """A megabyte of the slowest text that the end may be: 1 s of a busy machine, where all of it takes minutes."""
    begin = time.process_time()
    score("$ " * (1 << 19), "5")
    assert time.process_time() - begin < 10


def test_no_alarm_is_set_and_nothing_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signal, "alarm", lambda _: pytest.fail("an alarm"))
    for module in ("parser", "grader"):
        monkeypatch.setattr(f"math_verify.{module}.TIMEOUT_WARNING_SHOWN", False)
    assert score("\\boxed{5}", "5") == 1.0
    assert caplog.records == []


def test_only_a_worker_imports_sympy() -> None:
    code = (
        "import sys\n"
        "from hivegrpo.peer.rewards.registry import find_rewards, load_function\n"
        "find_rewards(['math_verify'])\n"
        "assert 'sympy' not in sys.modules\n"
        "load_function('math_verify')\n"
        "assert 'sympy' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
