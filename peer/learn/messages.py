"""What a prompt may be: plain text, or a conversation."""

Message = dict[str, str]
"""{"role": one of ROLES, "content": its text}."""

Prompt = str | list[Message]
"""Plain text, or messages that end with the user's. All prompts of a run have the same form."""

ROLES = ("system", "user", "assistant")

MAX_MESSAGES = 256
MAX_CHARACTERS = 1 << 20
"""Of a prompt, over all its messages."""

FORMS = 'Prompts are all strings, or all lists of messages {"role": ..., "content": "..."} that end with the user\'s.'


def prompt_complaint(prompt: object) -> str | None:
    """What keeps a value from being a prompt; None if nothing does."""
    if isinstance(prompt, str):
        texts = [prompt]
    elif not isinstance(prompt, list):
        return f"a value of type {type(prompt).__name__}"
    elif not 1 <= len(prompt) <= MAX_MESSAGES:
        return f"{len(prompt)} messages; 1 to {MAX_MESSAGES} make a prompt"
    elif not all(map(_is_message, prompt)):
        return f"something that is no message; a message has a role ({', '.join(ROLES)}) and a content, a string"
    else:
        roles = [message["role"] for message in prompt]
        if "system" in roles[1:] or roles[-1] != "user":
            return "messages out of order; a system message comes first, and the user's last"
        texts = [message["content"] for message in prompt]
    characters = sum(map(len, texts))
    return f"{characters} characters; a prompt has at most {MAX_CHARACTERS}" if characters > MAX_CHARACTERS else None


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        return False
    return value["role"] in ROLES and isinstance(value["content"], str)
