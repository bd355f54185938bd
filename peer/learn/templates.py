"""A model's chat template, rendered in a process that can be killed.

A template comes with the model, from whoever launched the run. It is a program: jinja's sandbox, in which transformers
runs it, keeps it from files and from Python, but it can still loop for ever, or make a string that takes all memory.
So it runs where the isolated reward functions run, with their limits on time and memory (`peer.rewards.worker`).
"""

from collections import deque
from contextlib import closing
from typing import TYPE_CHECKING, Any

from hivegrpo.peer.learn.messages import MAX_CHARACTERS, Message
from hivegrpo.peer.rewards.base import RewardFunction
from hivegrpo.peer.rewards.crew import Crew
from hivegrpo.peer.rewards.frames import encode
from hivegrpo.peer.rewards.process import Call
from hivegrpo.peer.rewards.registry import CHAT_TEMPLATE
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
"""For one prompt."""
MEMORY_BYTES = 512 << 20
"""Above what the process has taken when it is loaded."""
MOST_BYTES = 16 * MAX_CHARACTERS
"""Of a prompt as it comes back: in JSON, a character has at most 12."""
MOST_LOST = 3
"""Prompts in a row on which the process is lost, before no other is tried."""


class PromptRefusedError(ConfigError):
    """A prompt that a chat template cannot render."""


class TemplateRenderer:
    """One tokenizer's template and its process, which starts with the first prompt and stays until `close`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seconds: float = SECONDS) -> None:
        """ConfigError if the tokenizer has several templates, and none is the default."""
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise refusal(str(error)) from None
        self._arguments = {"template": template, "special_tokens": dict(tokenizer.special_tokens_map)}
        self._seconds = seconds
        self._crew = Crew([CHAT_TEMPLATE], MEMORY_BYTES, 1)
        self._lost = 0

    @property
    def given_up(self) -> bool:
        """Whether so many prompts in a row were lost that no other is tried."""
        return self._lost >= MOST_LOST

    def forget(self) -> None:
        """Try prompts again, as if none had been lost."""
        self._lost = 0

    def render(self, messages: list[Message]) -> str:
        """What the model gets to read, as `apply_chat_template` gives it, with the generation prompt.

        PromptRefusedError if the template refuses the messages, or goes over its limits; ConfigError if no process can
        be had for it. Cancelled if it is closed meanwhile.
        """
        if self.given_up:
            raise refusal(f"it went over its limits {MOST_LOST} times in a row, and is not tried again")
        calls = deque([Call(0, [0], self._seconds, MOST_BYTES)])

        def frame(call: Call) -> bytes:
            arguments = {"messages": messages, **self._arguments}
            return encode({"key": call.key, "seconds": call.seconds, "function": 0, "arguments": arguments})

        with closing(self._crew.run(calls, frame, None)) as answers:
            [(_, answer)] = answers
        # An answer without a key is not the worker's own.
        self._lost = 0 if "key" in answer else self._lost + 1
        texts = answer.get("scores")
        if not isinstance(texts, list) or len(texts) != 1 or not isinstance(texts[0], str):
            raise refusal(str(answer.get("error", "it gave no text")))
        return texts[0]

    def close(self) -> None:
        """End the process."""
        self._crew.close()


def load_render() -> RewardFunction:
    """In the process: `render`, with all that it imports."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(*, messages: list[Message], template: str, special_tokens: dict[str, Any]) -> list[str]:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **special_tokens
        )
        return [str(text) for text in texts]

    return render


def refusal(reason: str) -> PromptRefusedError:
    """What a prompt that a template cannot render ends in."""
    return PromptRefusedError(
        f"The model's chat template refuses a prompt: {printable(reason)}.",
        "Leave out system_prompt or the messages that it does not know, or choose another model.",
    )
