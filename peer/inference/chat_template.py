"""The chat template of an exported tokenizer, which gives any program the prompts that the model was trained on."""

from typing import TYPE_CHECKING

from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.protocol.config import DatasetSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("2+2=", " a  b ", "\nx\n", "Why?\r\n\tNo: 100 %.")
"""Prompts on which an encoding through the template is compared with the training's."""
JOINTS = (" ", "")
"""Between the token that begins a text and the text: some tokenizers begin a text, but no part of one, with a space."""


def adopt_training_template(tokenizer: "PreTrainedTokenizerBase", dataset: DatasetSection) -> bool:
    """Give a base model's tokenizer the template that its run trained with; whether it gives the same token ids.

    It is the tokenizer's own, with the run's system prompt in it where a conversation has none, which is not rendered
    here; or, where the run's prompts are plain text, one that renders the last message of the user alone. The
    tokenizer's own special tokens around a plain text are in that one, since what a template renders gets none.
    """
    training = PromptEncoder(tokenizer, dataset)
    if training.chat:
        tokenizer.chat_template = _with_system_prompt(tokenizer.chat_template, dataset.system_prompt)
        return True
    expected = [training.encode(probe) for probe in PROBES]
    before, after = _special_tokens(tokenizer)
    head, tail = (dataset.prompt_template or "{prompt}").split("{prompt}")
    through_template = dataset.model_copy(update={"prompt_template": None})
    for joint in JOINTS:
        tokenizer.chat_template = _last_user_message(before + joint + head, tail + after)
        exported = PromptEncoder(tokenizer, through_template)
        if [exported.encode(probe) for probe in PROBES] == expected:
            return True
    return False


def jinja_literal(text: str) -> str:
    """A text as a string literal of jinja: an expression that nothing in the text can end or escape from.

    Only escapes that other implementations of jinja know, too.
    """
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return f"'{''.join(escapes.get(character, character) for character in text)}'"


def _with_system_prompt(template: str | dict[str, str], system_prompt: str | None) -> str | dict[str, str]:
    """The model's own template, or all of them, where a conversation without a system message gets the run's."""
    if system_prompt is None:
        return template
    if isinstance(template, dict):
        return {name: str(_with_system_prompt(one, system_prompt)) for name, one in template.items()}
    message = f"{{'role': 'system', 'content': {jinja_literal(system_prompt)}}}"
    # The line's end belongs to the tag (trim_blocks), so that the template begins as it did.
    return (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        f"{{% set messages = [{message}] + messages %}}{{% endif %}}\n{template}"
    )


def _last_user_message(before: str, after: str) -> str:
    parts = [f"{{{{ {jinja_literal(text)} }}}}" if text else "" for text in (before, after)]
    asked = "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    return f"{asked}{parts[0]}{{{{ asked[-1]['content'] }}}}{parts[1]}"


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """What the tokenizer puts before and after a plain text."""
    bare = tokenizer(PROBES[0], add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROBES[0])["input_ids"]
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), None)
    if at is None:
        return "", ""
    before, after = whole[:at], whole[at + len(bare) :]
    return "".join(tokenizer.convert_ids_to_tokens(before)), "".join(tokenizer.convert_ids_to_tokens(after))
