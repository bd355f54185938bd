"""Rows from files, from the hub and from generators."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
from pyarrow import Table, parquet

from hivegrpo.peer.learn import sources
from hivegrpo.peer.learn.data import Prompts, canonical_rows
from hivegrpo.protocol.config import DatasetSection, EvaluationSection
from hivegrpo.protocol.errors import ConfigError, UnreachableError

ROWS: list[dict[str, Any]] = [{"prompt": "1+1=", "answer": "2"}, {"prompt": 'größe,\n"x"', "answer": ""}]
CANONICAL = '{"answer":"2","prompt":"1+1="}\n{"answer":"","prompt":"größe,\\n\\"x\\""}\n'.encode()
CSV = 'prompt,answer\n1+1=,2\n\n"größe,\n""x""",\n'


def rows_of(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    return canonical_rows(DatasetSection(path=path))


def test_files_of_every_kind_give_the_same_bytes(tmp_path: Path) -> None:
    parquet.write_table(Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert canonical_rows(DatasetSection(path=tmp_path / "rows.parquet")) == CANONICAL
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    assert rows_of(tmp_path / "rows.jsonl", lines) == CANONICAL
    old_mac = CSV.replace("\n", "\r").replace(',\r""', ',\n""')
    for content in (CSV, CSV.replace("\n\n", "\n"), CSV.removesuffix("\n"), old_mac):
        assert rows_of(tmp_path / "rows.csv", content.encode()) == CANONICAL
        assert rows_of(tmp_path / "rows.csv", content.encode("utf-8-sig")) == CANONICAL


def test_messages_come_out_of_parquet(tmp_path: Path) -> None:
    messages = [{"content": "1+1=", "role": "user"}]
    parquet.write_table(Table.from_pylist([{"prompt": messages, "answer": "2"}]), tmp_path / "rows.parquet")
    rows = canonical_rows(DatasetSection(path=tmp_path / "rows.parquet"))
    assert Prompts.from_jsonl(rows).rows == ({"prompt": messages, "answer": "2"},)


def test_values_of_a_csv_file_stay_strings(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.csv", b"prompt,answer,level\r\n 1 ,007,\r\nnull,1e3,true\r\n")
    assert rows == (b'{"answer":"007","level":"","prompt":" 1 "}\n{"answer":"1e3","level":"true","prompt":"null"}\n')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first line .* it is empty"),
        (b"\nprompt,answer\n", "first line .* it is empty"),
        (b"prompt,,answer\na,b,c\n", "first line .* prompt, , answer"),
        (b"prompt,answer,answer\na,b,c\n", "first line .* prompt, answer, answer"),
        (b"prompt,answer\n", "no rows in"),
        (b"1+1=,2\n2+2=,4\n", 'no column "(answer|prompt)"; it has 1[+]1=, 2'),
        (b"prompt,answer\na,b\na,b,c\n", "Line 3 .* row of 3 fields; the header has 2"),
        (b'prompt,answer\n"a\nb",c\na\n', "Line 4 .* row of 1 fields; the header has 2"),
        (b'prompt,answer\n"a,b\nc,d\n', "Line 3 .* not CSV"),
        (b'prompt,answer\n"a"b,c\n', "Line 2 .* not CSV"),
        (b'prompt,answer\na,"' + b"\n" * 200_000 + b'"', "not CSV: field larger"),
        (b"prompt,answer\n\xff,b\n", "not UTF-8"),
    ],
)
def test_mistakes_in_a_csv_file_are_named_with_their_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rows_of(tmp_path / "rows.csv", content)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none.csv"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        canonical_rows(DatasetSection(path=tmp_path / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    with pytest.raises(ConfigError, match=f"{name} has 11 bytes"):
        rows_of(tmp_path / name, b"x" * 11)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not Parquet"):
        rows_of(tmp_path / "rows.parquet", b"no parquet")


@pytest.fixture(autouse=True)
def card_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The files that the card of every hub dataset names."""
    files = {"train": ["hf://datasets/org/set@abc/train.parquet"]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    return files


@pytest.mark.parametrize("foreign", ["/etc/passwd", "http://127.0.0.1/rows.jsonl", "hf://datasets/org/other@abc/x"])
def test_a_hub_dataset_cannot_name_files_elsewhere(
    monkeypatch: pytest.MonkeyPatch, card_files: dict[str, list[str]], foreign: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert canonical_rows(DatasetSection(name="org/set")) == CANONICAL
    card_files["train"].append(foreign)
    with pytest.raises(ConfigError, match="outside its own repository"):
        canonical_rows(DatasetSection(name="org/set"))


def test_a_hub_dataset_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any, **keywords: Any) -> datasets.Dataset:
        asked.append((arguments, keywords))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = DatasetSection(name="org/set", config="main", revision="abc")
    assert canonical_rows(hub) == CANONICAL
    assert canonical_rows(hub, EvaluationSection(name="org/set")) == CANONICAL
    assert canonical_rows(hub, EvaluationSection(name="org/set", split="dev")) == CANONICAL
    assert asked == [
        (("org/set", "main"), {"split": "train", "revision": "abc"}),
        (("org/set", None), {"split": "test", "revision": None}),
        (("org/set", None), {"split": "dev", "revision": None}),
    ]


class Album:
    """A dataset whose pictures take a decoder that is not here."""

    def __init__(self, names: list[str]) -> None:
        self.column_names = names

    def select_columns(self, names: list[str]) -> "Album":
        return Album(names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if "picture" in self.column_names:
            raise ImportError("no decoder for pictures")
        yield from ROWS


def test_columns_that_are_left_out_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Album(["prompt", "answer", "picture"]))
    with pytest.raises(ConfigError, match=r"no decoder for pictures\. .*columns"):
        canonical_rows(DatasetSection(name="org/set"))
    assert canonical_rows(DatasetSection(name="org/set", columns=())) == CANONICAL


def test_a_column_that_a_hub_dataset_lacks_is_named_with_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([row | {"level": 1, "kind": "x"} for row in ROWS])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(ConfigError, match='no column "levels"; it has answer, kind, level, prompt'):
        canonical_rows(DatasetSection(name="org/set", columns=("levels",)))
    prompts = Prompts.from_jsonl(canonical_rows(DatasetSection(name="org/set", columns=("level",))))
    assert prompts.columns == {"prompt", "answer", "level"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("offline"), UnreachableError),
        (ValueError("no such split"), ConfigError),
        (RuntimeError("scripts are not supported"), ConfigError),
        (datasets.exceptions.DatasetGenerationError(), ConfigError),
    ],
)
def test_a_hub_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type) -> None:
    def load(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind, match="org/set"):
        canonical_rows(DatasetSection(name="org/set"))


def test_a_generator_is_asked_for_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    module = ModuleType("reasoning")

    def generate_rows(*arguments: Any) -> list[dict[str, Any]]:
        asked.append(arguments)
        return [{"question": "1+1=", "answer": "2", "metadata": {"terms": (1, 1)}}]

    vars(module)["generate_rows"] = generate_rows
    monkeypatch.setitem(sys.modules, "hivegrpo.peer.rewards.reasoning", module)
    dataset = DatasetSection(name="reasoning_gym:chain_sum", size=5, seed=7, prompt_column="question")
    assert canonical_rows(dataset) == b'{"answer":"2","metadata":{"terms":[1,1]},"prompt":"1+1="}\n'
    held_out = EvaluationSection(name="reasoning_gym:sudoku", size=6, seed=0)
    assert canonical_rows(dataset, held_out).endswith(b'"prompt":"1+1="}\n')
    assert asked == [("chain_sum", 5, 7), ("sudoku", 6, 0)]


@pytest.mark.parametrize(
    "name", ["csv", "json", "/etc", "../set", "./org", "a/b/c", "org/", "org/set\n", "hf://x/y", ""]
)
def test_a_hub_name_never_opens_anything_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("rows.csv").write_text(CSV)
    with pytest.raises(ConfigError, match="owner/name"):
        canonical_rows(DatasetSection.model_construct(name=name))


def test_a_folder_that_is_named_like_a_hub_dataset_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/set").mkdir(parents=True)
    Path("org/set/train.csv").write_text(CSV)
    with pytest.raises(ConfigError, match="org/set is also a folder here"):
        canonical_rows(DatasetSection(name="org/set"))
