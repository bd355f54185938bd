"""A request's answers: one or more texts from an engine, in OpenAI's form, whole or as a stream."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from hivegrpo.peer.serving.backend import Piece
from hivegrpo.peer.serving.engine import Engine
from hivegrpo.peer.serving.prompts import Encoded
from hivegrpo.peer.serving.requests import Wanted
from hivegrpo.peer.serving.sampling import Sampling
from hivegrpo.peer.serving.stops import StopCutter

Json = dict[str, Any]
Indexed = tuple[int, Piece]
"""A piece, and the choice that it belongs to."""


@dataclass(frozen=True, slots=True)
class Task:
    """One answer to be made."""

    prompt: Encoded
    sampling: Sampling


@dataclass(slots=True)
class Answers:
    """What one request gets from one engine. Choice k answers prompt k // n."""

    wanted: Wanted
    engine: Engine
    prompts: list[Encoded]
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    async def prepare(cls, wanted: Wanted, engine: Engine) -> "Answers":
        """Refusal if a prompt cannot be read, or is too long."""
        prompts = [await engine.reader.read(prompt) for prompt in wanted.prompts]
        for prompt in prompts:
            engine.reader.room(prompt, wanted.max_tokens)
        return cls(wanted, engine, prompts)

    async def whole(self) -> Json:
        """Everything in one object."""
        texts = [""] * self._count
        reasons: list[str | None] = [None] * self._count
        tokens = 0
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                texts[index] += piece.text
                reasons[index] = piece.finish_reason or reasons[index]
                tokens += piece.tokens or 0
        choices = [
            {"index": index, "finish_reason": reasons[index], "logprobs": None, **self._body_of(text)}
            for index, text in enumerate(texts)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage(tokens)}

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """The same as a stream; usage comes last, if it is wanted."""
        head = self._head("chat.completion.chunk")
        extra = {"usage": None} if self.wanted.include_usage else {}
        begun: set[int] = set()
        tokens = 0
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                content = self._delta_of(piece.text, begins=index not in begun)
                begun.add(index)
                tokens += piece.tokens or 0
                choice = {"index": index, "finish_reason": piece.finish_reason, "logprobs": None, **content}
                yield {**head, "choices": [choice], **extra}
        if self.wanted.include_usage:
            yield {**head, "choices": [], "usage": self._usage(tokens)}

    async def _pieces(self) -> AsyncGenerator[Indexed, None]:
        """Of all choices, as they come. An engine is never kept waiting by who reads: an answer's length is bounded."""
        queue: asyncio.Queue[Indexed | None] = asyncio.Queue()
        making = [asyncio.create_task(self._make(index, queue)) for index in range(self._count)]
        try:
            left = len(making)
            while left:
                if (item := await queue.get()) is not None:
                    yield item
                    continue
                left -= 1
                for task in making:
                    if task.done():
                        task.result()
        finally:
            for task in making:
                task.cancel()
            await asyncio.gather(*making, return_exceptions=True)

    async def _make(self, index: int, queue: asyncio.Queue[Indexed | None]) -> None:
        try:
            async with aclosing(self._choice(index)) as pieces:
                async for piece in pieces:
                    queue.put_nowait((index, piece))
        finally:
            # After the task is done, so that whoever gets it sees how it ended.
            asyncio.get_running_loop().call_soon(queue.put_nowait, None)

    async def _choice(self, index: int) -> AsyncGenerator[Piece, None]:
        """One answer, up to its first stop string; its last piece has a reason and the tokens of all of it."""
        wanted, reader = self.wanted, self.engine.reader
        prompt = self.prompts[index // wanted.n]
        sampling = self.engine.defaults.sampling(wanted, index, reader.room(prompt, wanted.max_tokens))
        cutter = StopCutter(wanted.stops)
        made = ""
        async with aclosing(self.engine.generate(prompt, sampling)) as pieces:
            async for piece in pieces:
                made += piece.text
                text, stopped = cutter.feed(piece.text)
                if piece.finish_reason is not None and not stopped:
                    text += cutter.rest()
                if text:
                    yield Piece(text)
                if stopped or piece.finish_reason is not None:
                    counted = None if stopped else piece.tokens
                    reason = "stop" if stopped else piece.finish_reason
                    break
        yield Piece("", reason, await reader.count(made) if counted is None else counted)

    @property
    def _count(self) -> int:
        return len(self.prompts) * self.wanted.n

    def _head(self, chat_object: str) -> Json:
        chat = self.wanted.chat
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._id}",
            "object": chat_object if chat else "text_completion",
            "created": self._created,
            "model": self.wanted.model,
            "system_fingerprint": f"{self.engine.release.name}@{self.engine.release.version}",
        }

    def _body_of(self, text: str) -> Json:
        if not self.wanted.chat:
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta_of(self, text: str, begins: bool) -> Json:
        if not self.wanted.chat:
            return {"text": text}
        if begins:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}

    def _usage(self, tokens: int) -> Json:
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
