"""Canonical rows, the order of prompts, and how prompts become tokens."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import Table, parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hivegrpo.peer.learn.data import Prompts, canonical_rows
from hivegrpo.peer.learn.digests import rows_digest
from hivegrpo.peer.learn.encoding import PromptEncoder, end_token_ids
from hivegrpo.protocol.config import DatasetSection, EvaluationSection
from hivegrpo.protocol.errors import ConfigError, UnreachableError
from hivegrpo.protocol.permutation import epoch_permutation, prompt_index

ROWS: list[dict[str, Any]] = [
    {"question": "1+1=", "answer": "2", "extra": 1},
    {"question": 'größe\n"x"', "answer": 3, "extra": None},
]
CANONICAL = '{"answer":"2","prompt":"1+1="}\n{"answer":3,"prompt":"größe\\n\\"x\\""}\n'.encode()

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(Table.from_pylist(rows), path)
    return path


def section(path: Path, **changes: Any) -> DatasetSection:
    return DatasetSection.model_validate({"path": path, "prompt_column": "question", **changes})


def test_canonical_rows_are_these_bytes(tmp_path: Path) -> None:
    assert canonical_rows(section(write_jsonl(tmp_path, ROWS))) == CANONICAL
    assert rows_digest(CANONICAL) == hashlib.sha256(CANONICAL).digest()


def test_keys_are_sorted_inside_an_answer_too(tmp_path: Path) -> None:
    rows = canonical_rows(section(write_jsonl(tmp_path, [{"question": "q", "answer": {"b": [1], "a": None}}])))
    assert rows == b'{"answer":{"a":null,"b":[1]},"prompt":"q"}\n'


def test_parquet_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    assert canonical_rows(section(write_parquet(tmp_path, rows))) == CANONICAL.replace(b":3,", b':"3",')


def test_a_hub_dataset_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any, **keywords: Any) -> list[dict[str, Any]]:
        asked.append((arguments, keywords))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = DatasetSection(name="org/set", config="main", revision="abc", prompt_column="question")
    assert canonical_rows(hub) == CANONICAL
    assert canonical_rows(hub, EvaluationSection(name="org/set")) == CANONICAL
    assert asked == [
        (("org/set", "main"), {"split": "train", "revision": "abc"}),
        (("org/set", None), {"split": "test", "revision": None}),
    ]


@pytest.mark.parametrize(
    ("error", "kind"), [(ConnectionError("offline"), UnreachableError), (ValueError("no such split"), ConfigError)]
)
def test_a_hub_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type) -> None:
    def load(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind, match="org/set"):
        canonical_rows(DatasetSection(name="org/set"))


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'no column "solution"; it has answer, extra, question') as caught:
        canonical_rows(section(write_jsonl(tmp_path, ROWS), answer_column="solution"))
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b'{"question": 1, "answer": 2}\n', "Row 1 .* prompt of type int"),
        (b'{"question": "a", "answer": NaN}\n', "Row 1 .* JSON and UTF-8 cannot hold"),
        (b'{"question": "\\ud800", "answer": 1}\n', "Row 1 .* JSON and UTF-8 cannot hold"),
        (b'{"question": "a", "answer": 1}\n{', "Line 2 .* not JSON"),
        (b"[" * 100_000, "Line 1 .* not JSON"),
        (b"[1]\n", "Line 1 .* not a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        canonical_rows(section(path))


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        canonical_rows(section(tmp_path / name))


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="not Parquet"):
        canonical_rows(section(path))


def test_prompts_come_back_from_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "canonical.jsonl"
    path.write_bytes(CANONICAL)
    prompts = Prompts.from_jsonl(path)
    assert prompts == Prompts.from_jsonl(CANONICAL)
    assert [row["prompt"] for row in prompts.rows] == [row["question"] for row in ROWS]
    assert len(prompts) == 2


@pytest.mark.parametrize("line", [b'{"answer":1}\n', b'{"prompt":"a"}\n', b'{"answer":1,"prompt":2}\n'])
def test_rows_that_are_not_canonical_are_refused(line: bytes) -> None:
    with pytest.raises(ConfigError, match="Line 3"):
        Prompts.from_jsonl(CANONICAL + line)


def test_every_index_comes_once_an_epoch_and_epochs_differ() -> None:
    size = 50
    for epoch in range(3):
        visited = Counter(prompt_index(epoch * size + place, size, seed=7) for place in range(size))
        assert visited == Counter(range(size))
    assert epoch_permutation(0, size, 7) != epoch_permutation(1, size, 7) != epoch_permutation(0, size, 8)


def test_the_order_is_the_same_everywhere() -> None:
    expected = sorted(range(6), key=lambda index: hashlib.sha256(b"3/0/%d" % index).hexdigest())
    assert [prompt_index(position, 6, seed=3) for position in range(6)] == expected


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with <s> before and none after."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def encoder(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, DatasetSection.model_validate({"path": "rows.jsonl", **changes}))


@pytest.mark.parametrize(
    ("template", "changes", "text", "special"),
    [
        (None, {}, "1+1=", True),
        (None, {"prompt_template": "Q: {prompt}\nA:"}, "Q: 1+1=\nA:", True),
        (CHAT_TEMPLATE, {}, "<user>1+1=<assistant>", False),
        (CHAT_TEMPLATE, {"system_prompt": "Be brief."}, "<system>Be brief.<user>1+1=<assistant>", False),
        (CHAT_TEMPLATE, {"prompt_template": "{prompt}"}, "1+1=", True),
    ],
)
def test_prompts_are_encoded_as_chat_or_as_plain_text(
    tokenizer: PreTrainedTokenizerFast, template: str | None, changes: dict[str, Any], text: str, special: bool
) -> None:
    tokenizer.chat_template = template
    ids = encoder(tokenizer, **changes).encode("1+1=")
    assert tokenizer.decode(ids) == ("<s>" if special else "") + text


def test_a_system_prompt_without_a_chat_template_is_a_mistake(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        encoder(tokenizer, system_prompt="Be brief.")


def test_braces_in_a_prompt_are_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encoder(tokenizer, prompt_template="{x} {prompt}").text("{y} {prompt}") == "{x} {y} {prompt}"


def test_completions_are_decoded_without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" a b")["input_ids"]
    assert encoder(tokenizer).decode([[*ids, 1], [1]]) == [" a b", ""]


@pytest.mark.parametrize(("configured", "expected"), [(None, {1}), (5, {1, 5}), ([5, 6], {1, 5, 6})])
def test_end_tokens_are_the_tokenizer_s_and_the_model_s(
    tokenizer: PreTrainedTokenizerFast, configured: Any, expected: set[int]
) -> None:
    class Generation:
        eos_token_id = configured

    assert end_token_ids(tokenizer, Generation()) == expected
