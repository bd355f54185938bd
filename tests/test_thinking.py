"""From tokens to text and to thoughts, piece by piece."""

from itertools import groupby

import pytest
from support.trained_run import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hivegrpo.peer.inference.detokenizer import UNFINISHED, WINDOW, Detokenizer
from hivegrpo.peer.inference.thinking import TAG_TEXTS, Piece, ThinkingSplitter

TEXT = "naïve 中文 \N{HONEYBEE}\N{HONEYBEE} end " * 5


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: words begin with a mark, which the first of a text loses; other characters are bytes."""
    words = ["<unk>", "▁a", "▁bee", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, keep=TAG_TEXTS)
    return [*map(detokenizer.add, ids), detokenizer.end()]


def test_text_comes_as_soon_as_its_characters_are_whole() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > 4 * WINDOW
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT
    assert pieces[:4] == ["n", "a", "", "ï"]
    assert all(len(piece) <= 1 for piece in pieces)


def test_bytes_that_are_no_characters_come_in_the_end() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("中")["input_ids"][:2] * 3 + tokenizer("a")["input_ids"] + tokenizer("é")["input_ids"][:1]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == f"{3 * UNFINISHED}a{UNFINISHED}"
    assert pieces[-1] == UNFINISHED


def test_spaces_between_words_and_characters_of_bytes_stay() -> None:
    tokenizer = with_byte_fallback()
    byte = {value: 4 + value for value in range(256)}
    bee = [byte[value] for value in "\N{HONEYBEE}".encode()]
    ids = [1, 2, 3, *bee, *bee, 2, 3] * 8
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == ("a bees🐝🐝 bees" + " a bees🐝🐝 bees" * 7)
    assert UNFINISHED not in "".join(pieces)
    assert pieces[1] == " bee"


def test_special_tokens_are_left_out_unless_they_are_tags() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<turn>"]})
    ids = tokenizer("<turn>[THINK]é[/THINK]b<end>")["input_ids"]
    assert len(ids) == 1 + 1 + 2 + 1 + 1 + 1
    assert "".join(pieces_of(tokenizer, ids)) == "[THINK]é[/THINK]b"


def split(prompt: str, chunks: list[str]) -> list[tuple[bool, str]]:
    splitter = ThinkingSplitter(prompt)
    pieces: list[Piece] = [piece for chunk in chunks for piece in splitter.feed(chunk)]
    pieces += splitter.end()
    assert all(piece.text for piece in pieces)
    merged = groupby(pieces, key=lambda piece: piece.thinking)
    return [(thinking, "".join(piece.text for piece in part)) for thinking, part in merged]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("prompt", "text", "parts"),
    [
        ("", "46", [(False, "46")]),
        ("", "<think>a < b</think>\n\n46", [(True, "<think>a < b</think>"), (False, "\n\n46")]),
        ("<user>1<assistant><think>\n", "a</think>b", [(True, "a</think>"), (False, "b")]),
        ("", "[THINK]a</think>[/THINK]", [(True, "[THINK]a</think>[/THINK]")]),
        ("", "x ◁think▷y◁/think▷ z", [(False, "x "), (True, "◁think▷y◁/think▷"), (False, " z")]),
        ("", "a <thin b <thi", [(False, "a <thin b <thi")]),
        ("", "<think>a </thin", [(True, "<think>a </thin")]),
        ("", "<<think>a<</think></think>", [(False, "<"), (True, "<think>a<</think>"), (False, "</think>")]),
    ],
)
def test_thoughts_are_told_from_what_is_said(prompt: str, text: str, parts: list[tuple[bool, str]], size: int) -> None:
    """However the text is cut into chunks."""
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert split(prompt, chunks) == parts


def test_what_cannot_be_a_tag_is_not_held_back() -> None:
    splitter = ThinkingSplitter("")
    assert list(splitter.feed("4 <")) == [Piece("4 ", False)]
    assert list(splitter.feed("6")) == [Piece("<6", False)]
