"""Canonical rows, what is refused as one, and the order of prompts."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from hivegrpo.peer.learn import data
from hivegrpo.peer.learn.data import Prompts, canonical_rows, require_same_columns
from hivegrpo.peer.learn.digests import rows_digest
from hivegrpo.peer.learn.messages import MAX_CHARACTERS, MAX_MESSAGES
from hivegrpo.protocol.config import DatasetSection
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.permutation import epoch_permutation, prompt_index

ROWS: list[dict[str, Any]] = [
    {"question": "1+1=", "answer": "2", "level": 1, "steps": ["a", None]},
    {"question": 'größe\n"x"', "answer": 3, "level": None, "steps": [{"z": 1.5, "b": True}]},
]
BARE = '{"answer":"2","prompt":"1+1="}\n{"answer":3,"prompt":"größe\\n\\"x\\""}\n'.encode()
CANONICAL = (
    b'{"answer":"2","level":1,"prompt":"1+1=","steps":["a",null]}\n'
    + '{"answer":3,"level":null,"prompt":"größe\\n\\"x\\"","steps":[{"b":true,"z":1.5}]}\n'.encode()
)
SYSTEM, USER, ASSISTANT = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))


def section(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DatasetSection:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetSection.model_validate({"path": path, "prompt_column": "question", **changes})


def line(**row: Any) -> bytes:
    return json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_canonical_rows_are_these_bytes(tmp_path: Path) -> None:
    assert canonical_rows(section(tmp_path, ROWS)) == CANONICAL
    assert rows_digest(CANONICAL) == hashlib.sha256(CANONICAL).digest()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"prompt", "answer", "level", "steps"}),
        ({"columns": []}, {"prompt", "answer"}),
        ({"columns": ["level"]}, {"prompt", "answer", "level"}),
        ({"columns": ["level", "answer", "question"]}, {"prompt", "answer", "level", "question"}),
        ({"answer_column": ""}, {"prompt", "answer", "level", "steps"}),
        ({"answer_column": None, "columns": []}, {"prompt"}),
        ({"answer_column": "level", "columns": []}, {"prompt", "answer"}),
        ({"answer_column": "level", "columns": ["level", "steps"]}, {"prompt", "answer", "level", "steps"}),
    ],
)
def test_further_columns_keep_their_names(tmp_path: Path, changes: dict[str, Any], names: set[str]) -> None:
    prompts = Prompts.from_jsonl(canonical_rows(section(tmp_path, ROWS, **changes)))
    assert prompts.columns == names
    renamed = {"prompt": "question", "answer": changes.get("answer_column") or "answer"}
    for row, source in zip(prompts.rows, ROWS, strict=True):
        assert row == {name: source[renamed.get(name, name)] for name in names}


def test_held_out_rows_have_the_columns_of_the_dataset(tmp_path: Path) -> None:
    dataset = section(tmp_path, ROWS, columns=["level"])
    (tmp_path / "other").mkdir()
    held_out = section(tmp_path / "other", [{"question": "q", "answer": 1, "level": 2, "steps": 3}])
    assert canonical_rows(dataset, held_out) == b'{"answer":1,"level":2,"prompt":"q"}\n'
    prompts, other = Prompts(({"prompt": "a", "x": 1},)), Prompts(({"prompt": "b", "y": 1},))
    require_same_columns(prompts, prompts)
    with pytest.raises(ConfigError, match=r"differ in their columns: x, y\. Name in \[dataset\] columns"):
        require_same_columns(prompts, other)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"prompts": 1}, "prompts"),
        ({"completions": 1}, "completions"),
        ({"completion_ids": 1}, "completion_ids"),
        ({"prompt": 1}, '"question" as prompt'),
    ],
)
def test_a_column_with_the_name_of_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    row = ROWS[0] | changes
    with pytest.raises(ConfigError, match=names) as caught:
        canonical_rows(section(tmp_path, [row]))
    assert "leave it out: name in [dataset] columns" in caught.value.hint.lower()
    assert canonical_rows(section(tmp_path, [row], columns=[])) == BARE.splitlines(keepends=True)[0]
    with pytest.raises(ConfigError, match=names):
        canonical_rows(section(tmp_path, [row], columns=list(changes)))


def test_an_answer_that_is_no_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='Rewards get "level" as answer, not the "answer" of the file'):
        canonical_rows(section(tmp_path, ROWS, answer_column="level"))


@pytest.mark.parametrize("setting", [{"answer_column": "solution"}, {"columns": ["solution"]}])
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r'no column "solution"; it has answer, level, question, steps') as caught:
        canonical_rows(section(tmp_path, ROWS, **setting))
    assert caught.value.exit_code == 78
    assert all(key in caught.value.hint for key in ("prompt_column", "answer_column", "columns"))


def test_all_rows_have_the_same_columns(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": 1, "x": 1, "z": 1}, {"question": "b", "answer": 2, "y": 1, "z": 1}]
    with pytest.raises(ConfigError, match=r"Row 2 .* differ in x, y\. Give all rows the same"):
        canonical_rows(section(tmp_path, rows))
    assert Prompts.from_jsonl(canonical_rows(section(tmp_path, rows, columns=["z"]))).columns >= {"z"}
    with pytest.raises(ConfigError, match=r'Row 2 .* no column "x"'):
        canonical_rows(section(tmp_path, rows, columns=["x"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows in"),
        (b'{"question": 1, "answer": 2}\n', 'Row 1 .* has in "question" a value of type int'),
        (b'{"question": "a", "answer": NaN}\n', "Row 1 .* has in answer what JSON and UTF-8 cannot hold"),
        (b'{"question": "\\ud800", "answer": 1}\n', "Row 1 .* has in question what JSON and UTF-8 cannot hold"),
        (b'{"question": "a", "answer": 1, "x": [1e999]}\n', "Row 1 .* has in x what .* Leave it out: name in"),
        (b'{"question": "a", "answer": 1}\n{', "Line 2 .* not JSON"),
        (b"[" * 100_000, "Line 1 .* not JSON"),
        (b"[1]\n", "Line 1 .* not a JSON object"),
        (b'{"question": [], "answer": 1}\n', "0 messages; 1 to 256"),
        (
            b'{"question": "a", "answer": 1}\n{"question": [{"role": "user", "content": "x"}], "answer": 1}',
            "another form",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    dataset = section(tmp_path, [])
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        canonical_rows(dataset)
    assert caught.value.hint


def test_a_value_of_another_kind_is_named_with_its_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(Table.from_pylist([{"prompt": "a", "answer": "b", "picture": b"png"}]), path)
    with pytest.raises(ConfigError, match=r"has in picture what .* bytes .* Leave it out"):
        canonical_rows(DatasetSection(path=path))
    assert canonical_rows(DatasetSection(path=path, columns=())) == line(prompt="a", answer="b")


@pytest.mark.parametrize(("bound", "value"), [("MAX_ROWS", 1), ("MAX_BYTES", 100)])
def test_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    dataset = section(tmp_path, ROWS)
    monkeypatch.setattr(data, bound, value)
    with pytest.raises(ConfigError, match="more than"):
        canonical_rows(dataset)
    path = tmp_path / "canonical.jsonl"
    path.write_bytes(CANONICAL)
    for source in (path, CANONICAL):
        with pytest.raises(ConfigError, match=r"at most 1|1 to 100"):
            Prompts.from_jsonl(source)


GOOD: list[Any] = [
    "",
    "x" * MAX_CHARACTERS,
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, ASSISTANT, USER],
    [USER] * MAX_MESSAGES,
]
BAD: list[Any] = [
    None,
    1,
    {"role": "user", "content": "x"},
    "x" * (MAX_CHARACTERS + 1),
    [],
    ["x"],
    [USER, "x"],
    [USER] * (MAX_MESSAGES + 1),
    [SYSTEM],
    [USER, ASSISTANT],
    [USER, SYSTEM, USER],
    [SYSTEM, SYSTEM, USER],
    [{"role": "tool", "content": "x"}, USER],
    [{"role": ["user"], "content": "x"}],
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user"}],
    [{"role": "user", "content": "x", "name": None}],
    [{"role": "user", "content": "x" * MAX_CHARACTERS}, USER],
]


@pytest.mark.parametrize("prompt", GOOD, ids=lambda value: str(value)[:60])
def test_prompts_are_text_or_conversations_that_end_with_the_user(tmp_path: Path, prompt: Any) -> None:
    rows = canonical_rows(section(tmp_path, [{"question": prompt, "answer": 1}]))
    assert Prompts.from_jsonl(rows).rows == ({"prompt": prompt, "answer": 1},)


@pytest.mark.parametrize("prompt", BAD, ids=lambda value: str(value)[:60])
def test_other_prompts_are_refused_here_and_from_the_network(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r'Row 1 .* has in "question"') as caught:
        canonical_rows(section(tmp_path, [{"question": prompt, "answer": 1}]))
    assert len(str(caught.value)) < 600
    with pytest.raises(ConfigError, match="Line 1 of the canonical rows has for a prompt"):
        Prompts.from_jsonl(line(prompt=prompt, answer=1))


def test_prompts_come_back_from_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "canonical.jsonl"
    path.write_bytes(CANONICAL)
    prompts = Prompts.from_jsonl(path)
    assert prompts == Prompts.from_jsonl(CANONICAL) == Prompts.from_jsonl(CANONICAL[:-1])
    assert [row["prompt"] for row in prompts.rows] == [row["question"] for row in ROWS]
    assert len(prompts) == 2


@pytest.mark.parametrize(
    "other",
    [
        line(answer=1),
        line(prompt="a"),
        line(answer=1, prompt="a", level=1),
        line(answer=1, prompt=2),
        line(answer=1, prompt=[USER]),
        b'{"answer":NaN,"prompt":"a"}\n',
        b'{"answer":1e999,"prompt":"a"}\n',
        b'{"answer":1.50,"prompt":"a"}\n',
        b'{"answer":"\\ud800","prompt":"a"}\n',
        b'{"answer":1,"answer":1,"prompt":"a"}\n',
        b'{"prompt":"a","answer":1}\n',
        b'{"answer": 1, "prompt": "a"}\n',
        '{"answer":1,"prompt":"a"}\n'.encode("utf-16-le"),
        b'{"answer":' + b"1" * 5000 + b',"prompt":"a"}\n',
        b'{"answer":' + b"[" * 100_000 + b"]" * 100_000 + b',"prompt":"a"}\n',
        b"\n",
        b"7\n",
    ],
    ids=lambda other: str(other[:50]),
)
def test_rows_that_are_not_canonical_are_refused(other: bytes) -> None:
    Prompts.from_jsonl(BARE)
    with pytest.raises(ConfigError, match="Line 3 of the canonical rows") as caught:
        Prompts.from_jsonl(BARE + other)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_rows_whose_columns_no_reward_can_take_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Line 1 .* something else that rewards get"):
        Prompts.from_jsonl(line(prompt="a", **{name: 1}))


def test_rows_without_a_prompt_are_refused() -> None:
    with pytest.raises(ConfigError, match="Line 1 of the canonical rows has no prompt"):
        Prompts.from_jsonl(line(answer=1))


def test_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="have 0 bytes"):
        Prompts.from_jsonl(b"")


def test_every_index_comes_once_an_epoch_and_epochs_differ() -> None:
    size = 50
    for epoch in range(3):
        visited = Counter(prompt_index(epoch * size + place, size, seed=7) for place in range(size))
        assert visited == Counter(range(size))
    assert epoch_permutation(0, size, 7) != epoch_permutation(1, size, 7) != epoch_permutation(0, size, 8)


def test_the_order_is_the_same_everywhere() -> None:
    expected = sorted(range(6), key=lambda index: hashlib.sha256(b"3/0/%d" % index).hexdigest())
    assert [prompt_index(position, 6, seed=3) for position in range(6)] == expected
