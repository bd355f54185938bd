"""Chat templates that come from whoever launched the run: rendered elsewhere, and given up when they go too far."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.models import save_model
from support.runs import small_config
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.messages import Message
from hivegrpo.peer.learn.templates import MOST_LOST, TemplateRenderer
from hivegrpo.protocol.config import DatasetSection, PeerConfig
from hivegrpo.protocol.errors import ConfigError

USER: list[Message] = [{"role": "user", "content": "1+1=\u00e9\U0001f600"}]
HARMLESS = (
    "{{ eos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{% continue %}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | tojson }}{% endfor %}"
    "{% set space = namespace(last=messages[-1].content) %}{{ space.last | trim }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
"""Some minutes; a third loop would make it days."""

Make = Callable[..., TemplateRenderer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast) -> Iterator[Make]:
    """Renderers of templates; whatever happens, their processes end."""
    made: list[TemplateRenderer] = []

    def renderer(template: str, seconds: float = 5.0) -> TemplateRenderer:
        tokenizer.chat_template = template
        made.append(TemplateRenderer(tokenizer, seconds))
        return made[-1]

    yield renderer
    for one in made:
        one.close()
    assert not psutil.Process().children(recursive=True)


def test_prompts_are_those_of_apply_chat_template(tokenizer: PreTrainedTokenizerFast, make: Make) -> None:
    renderer = make(HARMLESS)
    dataset = DatasetSection.model_validate({"path": "rows.jsonl", "system_prompt": "Add."})
    here, there = PromptEncoder(tokenizer, dataset), PromptEncoder(tokenizer, dataset, renderer)
    for prompt in ("1+1=", USER, [*USER, {"role": "assistant", "content": ' "2" '}, *USER]):
        assert there.text(prompt) == here.text(prompt) != ""
        assert there.encode(prompt) == here.encode(prompt)


def test_a_refusal_is_a_mistake_in_the_same_words(tokenizer: PreTrainedTokenizerFast, make: Make) -> None:
    renderer = make("{{ raise_exception('no such role') }}")
    for _ in range(MOST_LOST + 1):
        with pytest.raises(ConfigError, match=r"chat template refuses a prompt.*no such role"):
            renderer.render(USER)


@pytest.mark.parametrize(
    ("template", "seconds", "why"),
    [
        (LOOP, 0.5, "took more than 0.5 s"),
        ("{{ 9 ** (9 ** 9) }}", 0.5, "took more than 0.5 s"),
        ("{{ 'a' * 10 ** 10 }}", 30.0, "MemoryError"),
        ("{{ 'a' * 2 * 10 ** 7 }}", 30.0, "its process sent a message of 20000... bytes, above 16777216"),
        ("{{ ''.__class__.__mro__ }}", 30.0, "unsafe"),
    ],
    ids=["loop", "tower", "memory", "long", "sandbox"],
)
def test_a_hostile_template_costs_its_time_and_no_more(make: Make, template: str, seconds: float, why: str) -> None:
    renderer = make(template, seconds)
    with pytest.raises(ConfigError, match=why):
        renderer.render(USER)


def test_after_a_few_losses_in_a_row_it_is_not_tried_again(make: Make) -> None:
    renderer = make(LOOP, seconds=0.1)
    for _ in range(MOST_LOST):
        with pytest.raises(ConfigError, match="took more than"):
            renderer.render(USER)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="not tried again"):
        renderer.render(USER)
    assert time.monotonic() - began < 0.1  # a process takes longer to start
    assert renderer.given_up
    renderer.forget()
    with pytest.raises(ConfigError, match="took more than"):
        renderer.render(USER)


def test_closing_ends_what_runs(make: Make) -> None:
    renderer = make(LOOP, seconds=60.0)
    raised: list[BaseException] = []

    def render() -> None:
        try:
            renderer.render(USER)
        except Cancelled as error:
            raised.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    while not psutil.Process().children():
        time.sleep(0.01)
    renderer.close()
    thread.join(30.0)
    assert len(raised) == 1


def test_a_peer_drops_the_prompts_of_such_a_template(folder: Path, tmp_path: Path) -> None:
    """All of them: it says so, and goes on."""
    save_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LOOP)
    prompts = Prompts(tuple({"answer": "2", "prompt": f"1+{digit}="} for digit in range(9)))
    learner = Learner.open(small_config(), PeerConfig(), tmp_path, prompts)
    renderer = learner.encoder._renderer
    assert renderer is not None
    renderer._seconds = 0.1
    learned = learner.contribute(1, 0, 5, 5, threading.Event())
    learner.close()
    assert learned.dropped == (0, 1, 2, 3, 4)
    assert learned.weight == 0
    assert not psutil.Process().children(recursive=True)
