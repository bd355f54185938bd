"""One conversation with a model: a prompt in, its answer in pieces as they are sampled."""

import threading
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from hivegrpo.peer.inference.answering import Answering
from hivegrpo.peer.inference.detokenizer import Detokenizer
from hivegrpo.peer.inference.thinking import TAG_TEXTS, Piece, ThinkingSplitter
from hivegrpo.peer.learn.encoding import end_token_ids
from hivegrpo.peer.learn.messages import MAX_MESSAGES, Message, Prompt, prompt_complaint
from hivegrpo.peer.learn.sampler import Sampling, context_of, stream
from hivegrpo.protocol.errors import ConfigError

TAIL = 16
"""Tokens at the end of a prompt in which a template may have opened a thought."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and its whole answer."""

    prompt: str
    thinking: str
    """What came between tags, with them; it is not in the history that the model gets to read, as in templates."""
    answer: str
    model: str
    """Title of the one that answered."""
    cut: bool
    """Whether the answer did not end by itself, but at the most tokens that it may have."""


class Conversation:
    """Remembers what was said where the model has a chat template; without one, each prompt stands alone."""

    def __init__(
        self,
        answering: Answering,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        of_base: bool = False,
    ) -> None:
        """max_new_tokens: the training's max_completion_length if left out.

        `temperature` 0 always takes the most probable token; otherwise top_p and top_k are those of the training.
        of_base: the base answers, in place of the policy, which has to be `comparable`.
        """
        self.exchanges: list[Exchange] = []
        self.system: str | None = None
        """A system message in place of the training's."""
        self.left_out = 0
        """Exchanges, from the first on, that the last prompt had no room for."""
        self._asked_length = max_new_tokens
        self._temperature = temperature
        self._of_base = of_base
        self.switch(answering)

    def switch(self, answering: Answering) -> None:
        """Let another model answer from now on."""
        self.answering = answering
        grpo = answering.grpo
        self.max_new_tokens = self._asked_length or grpo.max_completion_length
        self._top_p, self._top_k = grpo.top_p, grpo.top_k
        self._ends = end_token_ids(answering.encoder.tokenizer, answering.model.generation_config)
        self._generator = torch.Generator(answering.model.device)
        self._generator.seed()

    @property
    def title(self) -> str:
        """Who answers."""
        return "the base model" if self._of_base else self.answering.title

    @property
    def remembers(self) -> bool:
        """Whether the model gets to read what was said before."""
        return self.answering.encoder.chat

    @property
    def instructions(self) -> str | None:
        """The system message that the model gets to read."""
        return self.system if self.system is not None else self.answering.encoder.system_prompt

    def instruct(self, system: str) -> None:
        """Take a system message from now on; ConfigError, and nothing changes, if the template has no place for it."""
        if not self.remembers:
            raise ConfigError(
                "This model has no chat template to put a system message into.", "Write it into the prompt."
            )
        before, self.system = self.system, system
        try:
            self.answering.encoder.text(self._messages([], "?"))
        except ConfigError:
            self.system = before
            raise

    def clear(self) -> None:
        """Forget all that was said; the system message stays."""
        self.exchanges.clear()
        self.left_out = 0

    def answer(self, prompt: str, cancelled: threading.Event | None = None) -> Generator[Piece, None, None]:
        """Its answer, in pieces as they are sampled; it is remembered once the last one has been taken.

        ConfigError, at once, for a prompt that is empty or too long, or that the chat template refuses; NumericsError
        for a model whose logits are not finite. Raises Cancelled between tokens, once that is set.
        """
        prompt = prompt.encode("utf-8", "replace").decode()  # bytes that are not UTF-8 come as lone surrogates
        complaint = prompt_complaint(prompt)
        if complaint is not None:
            raise ConfigError(f"The prompt is {complaint}.", "Shorten it.")
        return self._stream(prompt, self._encode(prompt), cancelled)

    def _stream(self, prompt: str, ids: list[int], cancelled: threading.Event | None) -> Generator[Piece, None, None]:
        tokenizer = self.answering.encoder.tokenizer
        length = min(self.max_new_tokens, self._context - len(ids))
        detokenizer = Detokenizer(tokenizer, keep=TAG_TEXTS)
        splitter = ThinkingSplitter(str(tokenizer.decode(ids[-TAIL:])))
        sampling = Sampling(length, self._temperature, self._top_p, self._top_k)
        pieces: list[Piece] = []
        cut = True
        with self.answering.base() if self._of_base else nullcontext():
            for token in stream(self.answering.model, ids, sampling, self._ends, self._generator, cancelled):
                if token in self._ends:
                    cut = False
                    break
                for piece in splitter.feed(detokenizer.add(token)):
                    pieces.append(piece)
                    yield piece
        for piece in (*splitter.feed(detokenizer.end()), *splitter.end()):
            pieces.append(piece)
            yield piece
        thinking = "".join(piece.text for piece in pieces if piece.thinking)
        said = "".join(piece.text for piece in pieces if not piece.thinking)
        self.exchanges.append(Exchange(prompt, thinking, said.lstrip("\n") if thinking else said, self.title, cut))

    @property
    def _context(self) -> int:
        """Tokens that the model can look back at, its own included."""
        return context_of(self.answering.model)

    def _encode(self, prompt: str) -> list[int]:
        """The prompt, after as much of what was said before as leaves room for an answer."""
        encoder = self.answering.encoder
        if not self.remembers:
            return self._fit(encoder.encode(prompt))
        room = self._context - min(self.max_new_tokens, self._context // 2)
        first = max(self.left_out, len(self.exchanges) - (MAX_MESSAGES // 2 - 1))
        ids = encoder.encode(self._messages(self.exchanges[first:], prompt))
        while first < len(self.exchanges) and len(ids) > room:
            first += 1
            ids = encoder.encode(self._messages(self.exchanges[first:], prompt))
        self._fit(ids)
        self.left_out = first
        return ids

    def _fit(self, ids: list[int]) -> list[int]:
        if not 0 < len(ids) < self._context:
            raise ConfigError(
                f"The prompt has {len(ids)} tokens; the model takes 1 to {self._context - 1}.",
                "Shorten it." if ids else "Write something.",
            )
        return ids

    def _messages(self, exchanges: list[Exchange], prompt: str) -> Prompt:
        """The encoder puts the training's system message in front if there is none."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system is not None else []
        for exchange in exchanges:
            messages.append({"role": "user", "content": exchange.prompt})
            messages.append({"role": "assistant", "content": exchange.answer})
        return [*messages, {"role": "user", "content": prompt}]
