"""From a row's prompt to token ids: through the tokenizer's chat template, or as plain text."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hivegrpo.peer.learn.base import damages, require_built_in, unusable
from hivegrpo.peer.learn.expansion import require_bounded
from hivegrpo.peer.learn.messages import Message, Prompt
from hivegrpo.peer.learn.templates import TemplateRenderer, refusal
from hivegrpo.protocol.config import DatasetSection
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json")
"""Files of which a tokenizer has one."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a base model's folder; ConfigError if there is none, or it makes texts too long."""
    from transformers import AutoTokenizer

    require_built_in(folder)
    require_bounded(folder)
    if not any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern)):
        # transformers would make an empty one.
        raise unusable("tokenizer", folder, f"it has none of {', '.join(VOCABULARIES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except damages() as error:
        raise unusable("tokenizer", folder, error) from None
    return tokenizer


class PromptEncoder:
    """Token ids of prompts, and the text of completions."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", dataset: DatasetSection, renderer: TemplateRenderer | None = None
    ) -> None:
        """renderer: for a chat template that may be hostile; without one, the template runs here, with no clock.

        ConfigError if there is a system prompt and nothing to put it into.
        """
        self.tokenizer = tokenizer
        self._renderer = renderer
        self.system_prompt = dataset.system_prompt
        self.prompt_template = dataset.prompt_template
        self.chat = tokenizer.chat_template is not None and dataset.prompt_template is None
        if self.system_prompt is not None and not self.chat:
            raise ConfigError(
                "[dataset] has a system_prompt, but the tokenizer has no chat template to put it into.",
                "Write it into prompt_template instead.",
            )

    def of(self, dataset: DatasetSection) -> Self:
        """The same tokenizer, and the same process of its template, with the prompts of other rows; errors as above."""
        return type(self)(self.tokenizer, dataset, self._renderer)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """ConfigError if one of them cannot become what the model reads."""
        for prompt in prompts:
            self.text(prompt)

    def text(self, prompt: Prompt) -> str:
        """What the model gets to read, as text.

        The system prompt comes first unless the prompt has its own. ConfigError for messages where there is no chat
        template, and for a prompt that the chat template refuses.
        """
        if not self.chat:
            return self._plain(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return self._renderer.render(messages) if self._renderer is not None else self._render_here(messages)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. A chat template writes its own special tokens; plain text gets the tokenizer's.

        ConfigError as `text`, and for a prompt that the tokenizer fails at.
        """
        text = self.text(prompt)
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ConfigError(
                f"The model's tokenizer fails at a prompt: {printable(str(error))}.", "Choose another model."
            ) from None
        return ids

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        """Text of completions, without special tokens."""
        texts: list[str] = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return texts

    def close(self) -> None:
        """End the process of the chat template, if it has one."""
        if self._renderer is not None:
            self._renderer.close()

    def _render_here(self, messages: list[Message]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise refusal(str(error)) from None

    def _plain(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return self.prompt_template.replace("{prompt}", prompt) if self.prompt_template else prompt
        if self.prompt_template is not None:
            raise ConfigError(
                "[dataset] has a prompt_template, and prompts that are chat messages.",
                "Leave prompt_template out: messages go through the model's chat template.",
            )
        raise ConfigError(
            "The prompts are chat messages, but the tokenizer has no chat template to put them into.",
            "Choose a model with a chat template, or write the prompts as strings.",
        )


def _is_panic(error: BaseException) -> bool:
    """Whether it is how Rust code ends that met what it did not expect, such as an expression that takes too long. It
    is no Exception, and there is no module to import it from."""
    return type(error).__module__ == "pyo3_runtime"


def as_messages(prompt: Prompt, text: str) -> Prompt:
    """A completion as rewards get it, and as TRL gives it to them: in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def end_token_ids(tokenizer: "PreTrainedTokenizerBase", generation_config: Any) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation_config.json."""
    named = generation_config.eos_token_id if generation_config is not None else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None)
