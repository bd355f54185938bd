"""From tokens to text while they are sampled."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding makes of bytes that are no character, or not yet."""
WINDOW = 16
"""Tokens that are decoded again with what follows them: a token's text depends on the one before."""


class Detokenizer:
    """Text as soon as it is sure: all pieces together are what decoding all tokens at once gives.

    Special tokens are left out, as `PromptEncoder.decode` does, unless their text is among those to keep.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", keep: frozenset[str] = frozenset()) -> None:
        self._tokenizer = tokenizer
        special = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._kept = {number: str(token) for number, token in special.items() if str(token) in keep}
        self._tokens: list[int] = []
        self._told = 0
        """Characters of the window's text that have been given."""
        self._settled = 0
        """Tokens of the window whose text has all been given; the rest is new."""

    def add(self, token: int) -> str:
        """What is sure after one more token; often nothing, in the middle of a character."""
        if token in self._kept:
            text = self.end()
            return text + self._kept[token]
        self._tokens.append(token)
        text = self._decode(self._tokens)
        sure = text.rstrip(UNFINISHED)
        new = sure[self._told :]
        self._told = max(self._told, len(sure))
        if len(sure) == len(text):
            self._slide()
        return new

    def end(self) -> str:
        """What is left; other tokens may follow, of another text."""
        text = self._decode(self._tokens)[self._told :]
        self._tokens, self._told, self._settled = [], 0, 0
        return text

    def _slide(self) -> None:
        """Let go of the window's older part once the newer is long enough to stand in for it."""
        if len(self._tokens) - self._settled < WINDOW:
            return
        self._tokens = self._tokens[self._settled :]
        self._settled = len(self._tokens)
        self._told = len(self._decode(self._tokens))

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
