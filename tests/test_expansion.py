"""Tokenizers that would make a text too long, and those that do what tokenizers do."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.trained_run import write_base
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.expansion import require_bounded
from hivegrpo.protocol.config import DatasetSection
from hivegrpo.protocol.errors import ConfigError


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(text: bytes) -> dict[str, Any]:
    """A trie, which is longer than any text, and what the map writes."""
    data = (400).to_bytes(4, "little") + b"t" * 400 + text
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(pieces: list[str], special: int = 1) -> dict[str, Any]:
    kinds = {"A": {"Sequence": {"id": "A", "type_id": 0}}, "s": {"SpecialToken": {"id": "s", "type_id": 0}}}
    tokens = {"s": {"id": "s", "ids": [0] * special, "tokens": ["s"] * special}}
    single = [kinds[piece] for piece in pieces]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TENFOLD = replace({"String": "a"}, "a" * 10)
ORDINARY = [
    ("normalizer", [{"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")]),
    ("normalizer", [charsmap(b"\xef\xb7\xba" * 11 + b"\0a\0"), replace({"Regex": " {2,}"}, "\u2581")]),
    ("normalizer", [{"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}]),
    ("normalizer", [replace({"Regex": "`"}, "") for _ in range(20)]),
    ("pre_tokenizer", [{"type": "Digits", "individual_digits": True}, BYTES]),
    ("post_processor", [BYTES, template(["s", "A", "s"])]),
    ("decoder", [replace({"String": "\u2581"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]),
]
BOMBS = [
    ("normalizer", [TENFOLD] * 3, "256 times"),
    ("decoder", [TENFOLD] * 3, "256 times"),
    ("normalizer", [replace({"String": "a"}, "b" * 17)], "16 characters"),
    ("normalizer", [{"type": "Prepend", "prepend": "b" * 17}], "16 characters"),
    ("normalizer", [replace({"Regex": ""}, "b")] * 9, "256 times"),
    ("normalizer", [replace({"String": ""}, "b")] * 9, "256 times"),
    ("pre_tokenizer", [BYTES] * 9, "256 times"),
    ("normalizer", [{"type": "BertNormalizer"}] * 65, "64 steps"),
    ("normalizer", [charsmap(b"a\0" + b"b" * 65 + b"\0")], "64 bytes"),
    ("normalizer", [charsmap(b"a\0bb\0")] * 2, "256 times"),
    ("post_processor", [template(["A"] * 257)], "256 times"),
    ("post_processor", [template(["s", "A", "s"], special=129)], "256 special tokens"),
]
NAMES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


def write(folder: Path, part: str, steps: list[dict[str, Any]]) -> Path:
    nested = {"type": "Sequence", NAMES.get(part, "decoders"): steps}
    (folder / "tokenizer.json").write_text(
        json.dumps({part: {"type": "Sequence", NAMES.get(part, "decoders"): [nested]}})
    )
    return folder


@pytest.mark.parametrize(("part", "steps"), ORDINARY)
def test_what_tokenizers_do_is_taken(part: str, steps: list[dict[str, Any]], tmp_path: Path) -> None:
    require_bounded(write(tmp_path, part, steps))


@pytest.mark.parametrize(("part", "steps", "says"), BOMBS)
def test_what_makes_a_text_too_long_is_refused(
    part: str, steps: list[dict[str, Any]], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        require_bounded(write(tmp_path, part, steps))


@pytest.mark.parametrize("text", ["[]", "{", '{"normalizer": 5}', '{"normalizer": {"type": "Replace"}}', "[" * 100_000])
def test_a_damaged_file_is_explained(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        require_bounded(tmp_path)


def test_a_tokenizer_is_looked_at_before_it_is_loaded(tmp_path: Path) -> None:
    write_base(tmp_path)
    load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Sequence", "normalizers": [TENFOLD] * 6}})
    )
    with pytest.raises(ConfigError, match="256 times"):
        load_tokenizer(tmp_path)


def test_steps_grow_as_they_are_taken_to() -> None:
    """What the bounds rest on: an expression that matches nothing, and bytes of bytes."""
    assert normalizers.Replace(Regex(""), "b").normalize_str("aa") == "babab"
    assert len(normalizers.Sequence([normalizers.ByteLevel()] * 8).normalize_str("\u00e9")) == 2**8


def test_a_prompt_that_the_tokenizer_s_expression_takes_too_long_for_is_a_mistake() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a|aa)+$"), "isolated")
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=inner), DatasetSection(path=Path("rows.jsonl")))
    with pytest.raises(ConfigError, match=r"fails at a prompt: .*retry-limit"):
        encoder.encode("a" * 60 + "b")
