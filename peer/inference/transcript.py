"""A conversation as a file: JSON for programs, Markdown for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hivegrpo.peer.inference.conversation import Conversation
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import write_whole


def save(conversations: Sequence[Conversation], path: Path) -> None:
    """Write them to `path`, whole, in the form that its suffix names: .json or .md. Only its owner can read it.

    ConfigError if there is something already, the suffix is another one, nothing was said, or it cannot be written.
    """
    forms = {".json": as_json, ".md": as_markdown}
    if path.suffix not in forms:
        raise ConfigError(f"{path.name} does not end in .json or .md.", "The ending says what is written.")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} is there already.", "Choose another name.")
    if not conversations[0].exchanges:
        raise ConfigError("There is nothing to save yet.", "Ask something first.")
    try:
        write_whole(path, forms[path.suffix](conversations).encode(), mode=0o600)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}.", "Choose another name.") from None


def as_json(conversations: Sequence[Conversation]) -> str:
    """{"conversations": [{"model", "messages": [{"role", "content", ...}]}]}; two with --compare.

    An answer's message also has the model that gave it, what it thought, and whether it was cut.
    """
    content = [{"model": conversation.title, "messages": _messages(conversation)} for conversation in conversations]
    return json.dumps({"conversations": content}, ensure_ascii=False, indent=2) + "\n"


def as_markdown(conversations: Sequence[Conversation]) -> str:
    """A chapter a conversation, a section a message; the messages' own Markdown stays as it is."""
    parts: list[str] = []
    for conversation in conversations:
        parts.append(f"# {conversation.title}")
        for message in _messages(conversation):
            speaker = message.get("model", message["role"])
            parts.append(f"## {speaker}")
            parts += filter(None, (message.get("thinking"), message["content"]))
    return "\n\n".join(parts) + "\n"


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    system = conversation.instructions
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    for exchange in conversation.exchanges:
        messages.append({"role": "user", "content": exchange.prompt})
        answer: dict[str, Any] = {"role": "assistant", "content": exchange.answer, "model": exchange.model}
        messages.append(answer | {"thinking": exchange.thinking, "cut": exchange.cut})
    return messages
