"""Chat: what is answered, and what goes to stdout."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.trained_run import PROMPT, MadeRun, write_base, write_run
from transformers import Qwen2ForCausalLM

from hivegrpo.peer.inference.chat import chat
from hivegrpo.peer.inference.conversation import Conversation
from hivegrpo.peer.inference.load import Trained, load
from hivegrpo.peer.learn.encoding import PromptEncoder, end_token_ids
from hivegrpo.peer.learn.sampler import Sampling, sample
from hivegrpo.protocol.config import DatasetSection
from hivegrpo.protocol.homes import run_folder

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    folder = tmp_path_factory.mktemp("inference")
    write_base(folder / "base")
    return write_run(folder / "run", folder / "base")


@pytest.fixture
def made(original: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """The latest run of a state folder."""
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))
    return original.copy_to(run_folder(original.chain.run_id))


def greedy(trained: Trained, prompt: str, length: int) -> str:
    """The answer as training's own sampler gives it."""
    encoder = PromptEncoder(trained.tokenizer, trained.run.config.dataset)
    ends = end_token_ids(trained.tokenizer, None)
    sampling = Sampling(length, temperature=0.0)
    [completion] = sample(trained.policy.model, [encoder.encode(prompt)], 1, sampling, ends, torch.Generator())
    [text] = encoder.decode([completion.token_ids])
    return text


def test_one_answer_is_all_that_goes_to_stdout(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    expected = greedy(load(None, "latest", "cpu"), PROMPT, made.config.grpo.max_completion_length)
    capsys.readouterr()
    chat(None, prompt=PROMPT, device="cpu")
    assert capsys.readouterr().out == f"{expected}\n"


def test_the_base_answers_differently(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for revision in ("base", "latest", "0"):
        capsys.readouterr()
        chat(None, revision, PROMPT, max_new_tokens=20, device="cpu")
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[2] != answers[1]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What comes from the keyboard: lines, Ctrl-C (KeyboardInterrupt), and in the end Ctrl-D."""
    keyboard: Iterator[str | type[BaseException]] = iter((*lines, EOFError))

    def read(invitation: str) -> str:
        line = next(keyboard)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_talking_goes_on_until_the_input_ends(
    made: MadeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = load(None, "latest", "cpu")
    expected = [greedy(live, prompt, 8) for prompt in ("1+1=", "2+2=")]
    typed(monkeypatch, "1+1=", "", KeyboardInterrupt, "5" * 200, "2+2=")
    capsys.readouterr()
    chat(None, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{answer}\n" for answer in expected)
    assert "prompts like '12+34='" in captured.err
    assert "200 tokens" in captured.err


def test_slash_exit_ends_the_talk(
    made: MadeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "/exit", "1+1=")
    chat(None, device="cpu")
    assert capsys.readouterr().out == ""


def test_an_interrupt_stops_the_answer_only(
    made: MadeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(load(None, "latest", "cpu"), "2+2=", 8)
    forward = Qwen2ForCausalLM.forward
    calls = 0

    def interrupted(self: Qwen2ForCausalLM, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", interrupted)
    typed(monkeypatch, "1+1=", "2+2=")
    capsys.readouterr()
    chat(None, device="cpu")
    captured = capsys.readouterr()
    assert captured.out.endswith(f"\n{expected}\n")
    assert "(stopped)" in captured.err


def test_a_chat_template_gets_what_was_said_before(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """The second answer is that to the whole exchange; an exchange that is too long loses its beginning."""
    live = load(None, "latest", "cpu")
    tokenizer, model = live.tokenizer, live.answering()
    tokenizer.chat_template = TEMPLATE
    encoder = PromptEncoder(tokenizer, DatasetSection(path=Path("rows.jsonl"), system_prompt="Add."))
    conversation = Conversation(model, encoder, made.config.grpo, 6, temperature=0.0)
    first = conversation.answer("1+1")
    second = conversation.answer("2+2")

    def told(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        sampling = Sampling(6, temperature=0.0)
        [completion] = sample(model, [ids], 1, sampling, end_token_ids(tokenizer, None), torch.Generator())
        return str(tokenizer.decode(completion.token_ids, skip_special_tokens=True))

    assert first == told("<system>Add.<user>1+1<assistant>")
    assert second == told(f"<system>Add.<user>1+1<assistant>{first}<user>2+2<assistant>")
    long = "9" * 60
    assert conversation.answer(long) == told(f"<system>Add.<user>{long}<assistant>")
