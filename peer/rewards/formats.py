"""Whether a completion has the form that the prompt asks for."""

from typing import Any

from hivegrpo.peer.rewards.base import Completion, text_of
from hivegrpo.protocol.errors import ConfigError


def format_tags(
    *, completions: list[Completion], think_tag: str = "think", answer_tag: str = "answer", **_: Any
) -> list[float]:
    """1.0 for `<think>...</think><answer>...</answer>` and nothing else but white space around the two, else 0.0.

    The format reward of DeepSeek-R1-Zero (arXiv:2501.12948, section 2.2.2). Each of the four tags stands there once, so
    no tag hides in another's content.
    """
    for name in (think_tag, answer_tag):
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f'"{name}" is no name of a tag.', "Use letters, digits, - and _, without the <>.")
    if think_tag == answer_tag:
        raise ConfigError("think_tag and answer_tag are the same.", "Give them two names.")
    tags = [f"<{think_tag}>", f"</{think_tag}>", f"<{answer_tag}>", f"</{answer_tag}>"]
    return [float(_has_form(text_of(completion).strip(), tags)) for completion in completions]


def _has_form(text: str, tags: list[str]) -> bool:
    if any(text.count(tag) != 1 for tag in tags):
        return False
    opening, between, answer, closing = tags
    _, _, after = text.partition(between)
    return text.startswith(opening) and after.lstrip().startswith(answer) and text.endswith(closing)
