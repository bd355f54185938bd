"""How prompts become tokens, and in which form rewards see completions."""

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hivegrpo.peer.learn.encoding import PromptEncoder, as_messages, end_token_ids
from hivegrpo.peer.learn.messages import Message, Prompt
from hivegrpo.protocol.config import DatasetSection
from hivegrpo.protocol.errors import ConfigError

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS: list[Message] = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2="},
]
BRIEF: Message = {"role": "system", "content": "Be brief."}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with <s> before and none after."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def encoder(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, DatasetSection.model_validate({"path": "rows.jsonl", **changes}))


@pytest.mark.parametrize(
    ("template", "changes", "text", "special"),
    [
        (None, {}, "1+1=", True),
        (None, {"prompt_template": "Q: {prompt}\nA:"}, "Q: 1+1=\nA:", True),
        (CHAT_TEMPLATE, {}, "<user>1+1=<assistant>", False),
        (CHAT_TEMPLATE, {"system_prompt": "Be brief."}, "<system>Be brief.<user>1+1=<assistant>", False),
        (CHAT_TEMPLATE, {"prompt_template": "{prompt}"}, "1+1=", True),
    ],
)
def test_prompts_are_encoded_as_chat_or_as_plain_text(
    tokenizer: PreTrainedTokenizerFast, template: str | None, changes: dict[str, Any], text: str, special: bool
) -> None:
    tokenizer.chat_template = template
    ids = encoder(tokenizer, **changes).encode("1+1=")
    assert tokenizer.decode(ids) == ("<s>" if special else "") + text


@pytest.mark.parametrize(
    ("prompt", "system_prompt", "text"),
    [
        (TURNS, None, "<user>1+1=<assistant>2<user>2+2=<assistant>"),
        (TURNS, "Add.", "<system>Add.<user>1+1=<assistant>2<user>2+2=<assistant>"),
        ([BRIEF, *TURNS[2:]], None, "<system>Be brief.<user>2+2=<assistant>"),
        ([BRIEF, *TURNS[2:]], "Add.", "<system>Be brief.<user>2+2=<assistant>"),
        (TURNS[:1], "Add.", "<system>Add.<user>1+1=<assistant>"),
        ("1+1=", "Add.", "<system>Add.<user>1+1=<assistant>"),
    ],
)
def test_messages_go_through_the_chat_template(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, system_prompt: str | None, text: str
) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    before = copy.deepcopy(prompt)
    read = encoder(tokenizer, system_prompt=system_prompt)
    assert read.text(prompt) == text
    assert tokenizer.decode(read.encode(prompt)) == text
    assert prompt == before


@pytest.mark.parametrize(
    ("template", "changes", "message"),
    [
        (None, {}, "no chat template .* Choose a model with a chat template"),
        (None, {"prompt_template": "Q: {prompt}"}, "prompt_template, .* Leave prompt_template out"),
        (CHAT_TEMPLATE, {"prompt_template": "Q: {prompt}"}, "prompt_template, .* Leave prompt_template out"),
    ],
)
def test_messages_without_a_chat_template_are_a_mistake(
    tokenizer: PreTrainedTokenizerFast, template: str | None, changes: dict[str, Any], message: str
) -> None:
    tokenizer.chat_template = template
    read = encoder(tokenizer, **changes)
    read.check(["1+1=", "2+2="])
    with pytest.raises(ConfigError, match=message):
        read.check(["1+1=", TURNS])


def test_a_prompt_that_the_chat_template_refuses_is_a_mistake(tokenizer: PreTrainedTokenizerFast) -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    encoder(tokenizer).check([TURNS])
    for read, prompt in ((encoder(tokenizer), [BRIEF, *TURNS]), (encoder(tokenizer, system_prompt="Add."), "1+1=")):
        with pytest.raises(ConfigError, match=r"System role not supported\. Leave out system_prompt"):
            read.check([prompt])


def test_completions_have_the_form_of_their_prompts() -> None:
    assert as_messages("1+1=", "2") == "2"
    assert as_messages(TURNS, "4") == [{"role": "assistant", "content": "4"}]


def test_a_system_prompt_without_a_chat_template_is_a_mistake(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        encoder(tokenizer, system_prompt="Be brief.")


def test_braces_in_a_prompt_are_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encoder(tokenizer, prompt_template="{x} {prompt}").text("{y} {prompt}") == "{x} {y} {prompt}"


def test_completions_are_decoded_without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" a b")["input_ids"]
    assert encoder(tokenizer).decode([[*ids, 1], [1]]) == [" a b", ""]


@pytest.mark.parametrize(("configured", "expected"), [(None, {1}), (5, {1, 5}), ([5, 6], {1, 5, 6})])
def test_end_tokens_are_the_tokenizer_s_and_the_model_s(
    tokenizer: PreTrainedTokenizerFast, configured: Any, expected: set[int]
) -> None:
    class Generation:
        eos_token_id = configured

    assert end_token_ids(tokenizer, Generation()) == expected
