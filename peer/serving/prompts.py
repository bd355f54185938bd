"""From a client's prompt to what the engine reads, token for token as in training."""

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.encoding import load_tokenizer
from hivegrpo.peer.learn.messages import MAX_CHARACTERS, Message
from hivegrpo.peer.learn.templates import PromptRefusedError, TemplateRenderer
from hivegrpo.peer.serving.refusals import Refusal, invalid, unavailable
from hivegrpo.protocol.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
UNBOUNDED = 1 << 20
"""Tokens of a model that names no limit."""
REST_SECONDS = 60.0
"""In which a chat template that went over its limits again and again is not tried."""
GREETING: list[Message] = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt for an engine."""

    text: str
    """The engine's tokenizer, which adds its own special tokens, makes `ids` of it."""
    ids: list[int]


class PromptReader:
    """The tokenizer and the chat template of an exported folder, on a thread of their own.

    The template comes from whoever launched the run, so it runs in a process that can be killed.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", context: int) -> None:
        """context: tokens that the model can look back at."""
        self._tokenizer = tokenizer
        self.context = context
        self._renderer = TemplateRenderer(tokenizer) if tokenizer.chat_template is not None else None
        self._rests_until = 0.0
        """On the monotonic clock, once the renderer has given up."""
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")

    @classmethod
    def open(cls, folder: Path) -> Self:
        """ConfigError if the folder has no tokenizer, or no model that transformers implements."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        return cls(load_tokenizer(folder), int(text.get("max_position_embeddings", UNBOUNDED)))

    async def read(self, prompt: str | list[Message]) -> Encoded:
        """A plain text, or messages through the chat template; Refusal if either cannot be."""
        if isinstance(prompt, str):
            return await self._on_thread(self._text, prompt)
        return await self._on_thread(self._messages, prompt)

    async def count(self, text: str) -> int:
        """Tokens of a text that was generated, as far as its end can be told from it."""
        return len(await self._on_thread(self._ids, text, False))

    def room(self, encoded: Encoded, wanted: int | None) -> int:
        """Tokens that an answer may have; Refusal if the prompt leaves none."""
        if not encoded.ids:
            raise invalid("The prompt is empty: the model needs at least one token.", param="prompt")
        left = self.context - len(encoded.ids)
        if left < 1:
            raise invalid(
                f"This model's maximum context length is {self.context} tokens, and the prompt has {len(encoded.ids)}.",
                "Shorten it.",
                param="messages",
                code="context_length_exceeded",
            )
        return left if wanted is None else min(wanted, left)

    async def warm_up(self) -> Encoded:
        """A prompt to try an engine with; starts the template's process."""
        if self._renderer is not None:
            try:
                return await self.read(GREETING)
            except Refusal:
                pass  # a template may want more than a greeting
        return await self.read("Hello")

    def close(self) -> None:
        """End the template's process; what is read just now or later is refused."""
        self._closed = True
        if self._renderer is not None:
            self._renderer.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _on_thread(self, function: Callable[..., T], *arguments: object) -> T:
        ended = unavailable("The engine was ended before it read the prompt.")
        if self._closed:
            raise ended
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except Cancelled:
            raise ended from None

    def _text(self, text: str) -> Encoded:
        return Encoded(text, self._ids(text, True))

    def _messages(self, messages: list[Message]) -> Encoded:
        if self._renderer is None:
            raise invalid(
                "This model has no chat template.", "Use /v1/completions.", param="messages", code="no_chat_template"
            )
        if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
            raise invalid(f"The messages have more than {MAX_CHARACTERS} characters.", param="messages")
        text = self._render(self._renderer, messages)
        ids = self._ids(text, False)
        return Encoded(self._for_engine(text, ids), ids)

    def _render(self, renderer: TemplateRenderer, messages: list[Message]) -> str:
        if renderer.given_up:
            if time.monotonic() < self._rests_until:
                raise unavailable("The chat template went over its limits again and again, and is not tried just now.")
            renderer.forget()
        try:
            return renderer.render(messages)
        except PromptRefusedError as error:
            if renderer.given_up:
                self._rests_until = time.monotonic() + REST_SECONDS
            raise invalid(error.message, "Write the messages in the order that it knows.", param="messages") from None
        except ConfigError as error:
            raise unavailable(error.message) from None

    def _for_engine(self, text: str, ids: list[int]) -> str:
        """What becomes `ids` where special tokens are added: a template writes its own."""
        for candidate in (text, text.removeprefix(self._tokenizer.bos_token or "")):
            if self._ids(candidate, True) == ids:
                return candidate
        raise Refusal(500, "prompt_not_encodable", "The engine would read this prompt otherwise than in training.")

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids
