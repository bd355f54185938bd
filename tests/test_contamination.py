"""Which problems are found in training rows, and which are not."""

from collections.abc import Iterator
from time import process_time

import pytest

from hivegrpo.peer.evaluation.contamination import COMMON, WORDS, Contamination, find_contamination
from hivegrpo.peer.learn.messages import Prompt


def words(first: int, count: int = WORDS) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def found(problems: list[Prompt], *training: Prompt) -> Contamination:
    return find_contamination(problems, training)


@pytest.mark.parametrize(
    ("problem", "training", "same"),
    [
        ("12+34=", "12+34=", True),
        ("What is  Two\nplus two?", " what is two plus TWO? ", True),
        ("\uff11\uff12+34=", "12+34=", True),  # full width
        ("stra\u00dfe", "STRASSE", True),
        ("12+34=", "12-34=", False),
        ("12+34=", "1+234=", False),
        ("12+34=", "12+34=46", False),
    ],
)
def test_short_prompts_are_compared_whole(problem: str, training: str, same: bool) -> None:
    result = found([problem, "something else"], training)
    assert result.exact == ((0,) if same else ())
    assert (result.overlapping, result.short, result.training_rows) == ((), 2, 1)


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\uff9e\u0f73"], ids=["marks", "those that become marks"])
def test_a_row_of_combining_marks_takes_no_time(marks: str) -> None:
    """Whole, 80,000 of them take unicodedata half a minute, which nothing interrupts."""
    began = process_time()
    result = found(["caf\u00e9 " + marks * 8], "cafe\u0301 " + marks * 8, "x" + marks * 40_000)
    assert result.exact == (0,)
    assert process_time() - began < 2.0


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_none() -> None:
    problem = f"before {words(0)} after"
    assert found([problem], f"Else; {words(0).upper().replace(' ', ', ')}! Else").overlapping == (0,)
    assert found([problem], f"else {words(0, WORDS - 1)} else").overlapping == ()
    assert found([problem, words(50), words(5)], words(0, 40)).overlapping == (0, 2)
    assert found([problem], words(0), problem).exact == (0,)


def test_what_many_training_rows_have_is_no_overlap() -> None:
    """Once too often by another row, not by a row that repeats it."""
    problem = f"{words(0)} and {words(20)}"
    often = [f"{words(0)} {number}" for number in range(COMMON)]
    assert found([problem], *often[1:], f"{words(0)} {words(0)}").overlapping == (0,)
    result = found([problem], *often, f"{words(0)} once more")
    assert (result.overlapping, result.common) == ((), 1)
    assert found([problem], *often, f"{words(0)} once more", words(20)).overlapping == (0,)


def test_of_a_conversation_the_system_s_part_does_not_count() -> None:
    def conversation(system: str, user: str) -> Prompt:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    problem = conversation(words(0), words(20))
    assert found([problem], conversation(words(0), words(40))).found == frozenset()
    assert found([problem], conversation("", words(20))).found == {0}
    assert found([problem], words(20)).exact == (0,)


def test_training_rows_pass_by_one_at_a_time() -> None:
    alive = 0

    class Row(str):
        def __new__(cls, text: str) -> "Row":
            nonlocal alive
            alive += 1
            return super().__new__(cls, text)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def rows() -> Iterator[str]:
        for number in range(1000):
            assert alive <= 2
            yield Row(words(number))

    result = find_contamination([words(7), words(990, 20)], rows())
    assert (result.training_rows, result.found) == (1000, {0, 1})
