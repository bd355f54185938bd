"""Chat: what is answered, what goes to stdout, and what a line that is no prompt does."""

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file
from support.trained_run import PROMPT, MadeRun, byte_level_tokenizer, write_base, write_run
from transformers import Qwen2ForCausalLM

from hivegrpo.cli.main import main
from hivegrpo.peer.inference.answering import ADAPTER_FILE, Answering, open_answering
from hivegrpo.peer.inference.chat import COMMANDS, INTERRUPTED, Opening, Talk, chat
from hivegrpo.peer.inference.conversation import Conversation, Exchange
from hivegrpo.peer.inference.load import Trained, load
from hivegrpo.peer.inference.screen import DIM, PLAIN, Screen
from hivegrpo.peer.inference.thinking import Piece
from hivegrpo.peer.learn.encoding import PromptEncoder, end_token_ids
from hivegrpo.peer.learn.sampler import Sampling, sample
from hivegrpo.protocol.config import DatasetSection
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.homes import run_folder

TEMPLATE = (
    "{% for message in messages %}{{ raise_exception('no \x1bdogs') if 'dog' in message.content }}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
)


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


@pytest.fixture(scope="module")
def answering(original: MadeRun) -> Answering:
    """The newest version, with a chat template."""
    opened = open_answering(str(original.folder), device="cpu")
    tokenizer = opened.encoder.tokenizer
    tokenizer.chat_template = TEMPLATE
    return replace(
        opened, encoder=PromptEncoder(tokenizer, DatasetSection(path=Path("rows.jsonl"), system_prompt="Add."))
    )


def greedy(trained: Trained, prompt: str, length: int = 8) -> str:
    """The answer as training's own sampler gives it."""
    encoder = PromptEncoder(trained.tokenizer, trained.run.config.dataset)
    ends = end_token_ids(trained.tokenizer, None)
    sampling = Sampling(length, temperature=0.0)
    [completion] = sample(trained.policy.model, [encoder.encode(prompt)], 1, sampling, ends, torch.Generator())
    [text] = encoder.decode([completion.token_ids])
    return text


class Keyboard(io.TextIOBase):
    """What is typed: lines, Ctrl-C (KeyboardInterrupt), and in the end Ctrl-D."""

    def __init__(self, *lines: str | type[BaseException], is_terminal: bool = True) -> None:
        self._lines = iter(lines)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def readline(self, size: int | None = -1, /) -> str:
        line = next(self._lines, "")
        if isinstance(line, str):
            return f"{line}\n" if line else ""
        raise line


Outcome = tuple[int, str, str]
"""The exit code, stdout and stderr."""
Typed = Callable[..., Outcome]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Chat with what is typed."""

    def start(
        *lines: str | type[BaseException], is_terminal: bool = True, **flags: object
    ) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "stdin", Keyboard(*lines, is_terminal=is_terminal))
        capsys.readouterr()
        code = chat(None, device="cpu", **flags)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start


def test_one_answer_is_all_that_goes_to_stdout(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    expected = greedy(load(None, "latest", "cpu"), PROMPT, made.config.grpo.max_completion_length)
    capsys.readouterr()
    assert chat(None, prompt=PROMPT, device="cpu") == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_the_base_answers_differently(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """And beside the policy it says the same as alone."""
    answers = []
    for revision in ("base", "latest", "0"):
        capsys.readouterr()
        chat(None, revision, PROMPT, max_new_tokens=20, device="cpu")
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[2] != answers[1]
    chat(None, prompt=PROMPT, compare=True, max_new_tokens=20, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == answers[0] + answers[1]
    assert captured.err.index("[the base model]") < captured.err.index("version 3 of 3]")


@pytest.mark.usefixtures("made")
def test_talking_goes_on_until_the_input_ends(talk: Typed) -> None:
    live = load(None, "latest", "cpu")
    expected = "".join(f"{greedy(live, prompt)}\n" for prompt in ("1+1=", "2+2="))
    code, out, err = talk("1+1=", " ", KeyboardInterrupt, "5" * 200, KeyboardInterrupt, "2+2=")
    assert (code, out) == (0, expected)
    assert "prompts like '12+34='" in err
    assert "200 tokens" in err


@pytest.mark.usefixtures("made")
def test_an_interrupt_stops_the_answer_only(talk: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy(load(None, "latest", "cpu"), "2+2=")
    forward = Qwen2ForCausalLM.forward

    def interrupt_at(call: int) -> None:
        calls = iter(range(1, 1000))

        def interrupted(self: Qwen2ForCausalLM, *args: object, **kwargs: object) -> object:
            if next(calls) == call:
                raise KeyboardInterrupt
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(Qwen2ForCausalLM, "forward", interrupted)

    interrupt_at(1 + 3)  # the first one finds out what makes the logits, when the model is loaded
    code, out, err = talk("1+1=", "2+2=")
    assert code == 0
    assert out.endswith(f"\n{expected}\n")
    assert "(Stopped: this exchange is forgotten.)" in err
    interrupt_at(1 + 3)
    assert talk("1+1=", "2+2=", is_terminal=False)[0] == INTERRUPTED


@pytest.mark.usefixtures("made")
def test_two_interrupts_in_a_row_end_the_talk(talk: Typed) -> None:
    code, out, err = talk(KeyboardInterrupt, "", is_terminal=True)
    assert (code, out) == (0, "")
    assert err.count("/help has more") == 2
    assert talk(KeyboardInterrupt, KeyboardInterrupt, "1+1=")[:2] == (INTERRUPTED, "")
    assert talk(KeyboardInterrupt, "1+1=", is_terminal=False)[:2] == (INTERRUPTED, "")


@pytest.mark.usefixtures("made")
def test_commands(talk: Typed, tmp_path: Path) -> None:
    live, base = load(None, "latest", "cpu"), load(None, "base", "cpu")
    base.merged()
    saved = tmp_path / "talk.json"
    saved.write_text("mine")
    code, out, err = talk(
        "1+1=", "//2", "/rvision 0", "/zzz", "/system Add.", "/revision", "/revision 1",
        f"/save {saved}", "/save a.txt",
        f"/save {tmp_path}/1.json", f"/save {tmp_path}/1.md", "/clear", f"/save {tmp_path}/2.md", "/help",
        "/revision base", "1+1=", "/exit", "3+3=",
    )  # fmt: skip
    expected = [greedy(live, "1+1="), greedy(live, "/2"), greedy(base, "1+1=")]
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in expected))
    for said in (
        "There is no command /rvision. Did you mean /revision?",
        "There is no command /zzz. /help lists them. To send a line that begins with /, write //.",
        "no chat template to put a system message into",
        "/revision needs a version",
        "Version 1 cannot be had",
        f"{saved} is there already",
        "a.txt does not end in .json or .md",
        "There is nothing to save yet",
        "the base model",
        *COMMANDS,
    ):
        assert said in err
    assert saved.read_text() == "mine"
    [conversation] = json.loads((tmp_path / "1.json").read_text())["conversations"]
    assert [message["content"] for message in conversation["messages"]] == ["1+1=", expected[0], "/2", expected[1]]
    assert "version 3 of 3" in conversation["messages"][1]["model"]
    assert (tmp_path / "1.json").stat().st_mode & 0o777 == 0o600
    markdown = (tmp_path / "1.md").read_text()
    assert markdown.startswith("# test (")
    assert markdown.index("## user\n\n1+1=\n") < markdown.index("## user\n\n/2\n")


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_all_of_stdin_is_one_prompt(
    end: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever bytes are in it, but for the end of its last line."""
    expected = greedy(load(None, "latest", "cpu"), "1+1\n2+2\N{REPLACEMENT CHARACTER}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1+1\n2+2\xff" + end), encoding="utf-8"))
    capsys.readouterr()
    assert chat(None, prompt="-", device="cpu") == 0
    assert capsys.readouterr().out == f"{expected}\n"
    with pytest.raises(ConfigError, match="0 tokens"):
        chat(None, prompt="", device="cpu")


def told(answering: Answering, text: str) -> str:
    """What the model says after a text."""
    tokenizer = answering.encoder.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampling = Sampling(6, temperature=0.0)
    [completion] = sample(answering.model, [ids], 1, sampling, end_token_ids(tokenizer, None), torch.Generator())
    return str(tokenizer.decode(completion.token_ids, skip_special_tokens=True))


def said(conversation: Conversation, prompt: str) -> str:
    """The answer as it streams."""
    return "".join(piece.text for piece in conversation.answer(prompt))


def test_a_chat_template_gets_what_was_said_before(answering: Answering) -> None:
    """The second answer is that to the whole exchange; a history that is too long loses its beginning."""
    conversation = Conversation(answering, 6)
    first, second = said(conversation, "1+1"), said(conversation, "2+2")
    assert first == told(answering, "<system>Add.<user>1+1<assistant>")
    assert second == told(answering, f"<system>Add.<user>1+1<assistant>{first}<user>2+2<assistant>")
    assert conversation.left_out == 0
    long = "9" * 60
    assert said(conversation, long) == told(answering, f"<system>Add.<user>{long}<assistant>")
    assert conversation.left_out == 2
    assert [exchange.prompt for exchange in conversation.exchanges] == ["1+1", "2+2", long]


def test_thoughts_are_not_in_the_history_and_a_system_message_is(answering: Answering) -> None:
    conversation = Conversation(answering, 6)
    conversation.exchanges.append(Exchange("1", "<think>hm</think>", "a", "", cut=False))
    conversation.instruct("Go.")
    assert conversation.instructions == "Go."
    assert said(conversation, "2") == told(answering, "<system>Go.<user>1<assistant>a<user>2<assistant>")
    with pytest.raises(ConfigError, match=r"no \?dogs"):
        conversation.instruct("Be a dog.")
    assert conversation.instructions == "Go."
    with pytest.raises(ConfigError, match=r"no \?dogs"):
        conversation.answer("dog")


def test_an_answer_is_complete_only_at_its_end(answering: Answering) -> None:
    conversation = Conversation(answering, 6)
    pieces = conversation.answer("1+1")
    next(pieces)
    pieces.close()
    assert conversation.exchanges == []


def test_an_exchange_that_one_of_two_does_not_end_is_forgotten_by_both(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = [Conversation(answering, 6), Conversation(answering, 6)]
    pair = Talk(Screen(), Opening(None, "cpu", None, compare=True), conversations)
    pair.ask("1+1")

    def interrupted(prompt: str, cancelled: threading.Event) -> Generator[Piece, None, None]:
        yield Piece("2", False)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversations[1], "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pair.ask("2+2")
    assert [len(conversation.exchanges) for conversation in conversations] == [1, 1]


def test_ctrl_c_is_noted_and_ends_an_answer_between_tokens(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(answering, 6)
    talk = Talk(Screen(), Opening(None, "cpu", None, compare=False), [conversation])
    answer, handler = conversation.answer, signal.getsignal(signal.SIGINT)

    def interrupted(prompt: str, cancelled: threading.Event) -> Generator[Piece, None, None]:
        pieces = answer(prompt, cancelled)
        yield next(pieces)
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled.is_set()
        yield from pieces

    monkeypatch.setattr(conversation, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("1+1")
    assert conversation.exchanges == []
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_temperature_draws_answers_that_differ(answering: Answering) -> None:
    conversation = Conversation(answering, 6, 1.0)
    answers = set()
    for _ in range(4):
        answers.add(said(conversation, "1+1"))
        conversation.clear()
    assert len(answers) > 1


@pytest.mark.usefixtures("made")
def test_a_history_that_is_too_long_is_said_once(talk: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr("hivegrpo.peer.inference.load.load_tokenizer", lambda _: tokenizer)
    _, _, err = talk("9" * 30, "8" * 30, "7" * 30, "dog", max_new_tokens=4)
    assert err.count("(cut at --max-new-tokens 4)") == 3
    assert err.count("its beginning is left out") == 1
    assert "refuses a prompt: TemplateError: no ?dogs" in err


# Exported folders, and what can be wrong with them.


def test_a_folder_with_a_model_answers(original: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    expected = greedy(load(str(original.folder), "base", "cpu"), PROMPT)
    capsys.readouterr()
    chat(str(original.base), prompt=PROMPT, max_new_tokens=8, device="cpu")
    assert capsys.readouterr().out == f"{expected}\n"
    with pytest.raises(ConfigError, match="one version: latest"):
        chat(str(original.base), "7", device="cpu")
    with pytest.raises(ConfigError, match="base to compare with"):
        chat(str(original.base), compare=True, device="cpu")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def spoil_settings(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2", "hidden_size": "big"}')


def leave_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / ADAPTER_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "cannot be loaded: SafetensorError"),
        (lose_tensor, "lack model.norm.weight. Is the folder complete"),
        (lose_weights, "cannot be loaded: OSError"),
        (lose_tokenizer, "The tokenizer in .* cannot be loaded: it has none of tokenizer.json"),
        (cut_tokenizer, "The tokenizer in .* cannot be loaded: KeyError"),
        (spoil_settings, "hidden_size"),
        (leave_adapter, "an adapter without its base. Name the run"),
    ],
)
def test_a_damaged_folder_is_explained(
    damage: Callable[[Path], None], message: str, original: MadeRun, tmp_path: Path
) -> None:
    folder = shutil.copytree(original.base, tmp_path / "model")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        open_answering(str(folder), device="cpu")


# In fewer bits.


def count_layers(answering: Answering, layer: str) -> int:
    import bitsandbytes  # here: it takes seconds

    kind = getattr(bitsandbytes.nn, layer)
    return sum(isinstance(module, kind) for module in answering.model.modules())


@torch.no_grad()
def logits_of(answering: Answering) -> torch.Tensor:
    logits: torch.Tensor = answering.model(torch.tensor([[50, 51, 52, 53]])).logits
    return logits


def test_4_bits_hold_the_base_and_leave_the_adapter_as_it_is(original: MadeRun) -> None:
    """The answer is that of the rounded base under the adapter in float32: nothing else is rounded."""
    from bitsandbytes.functional import dequantize_4bit

    opened = open_answering(str(original.folder), device="cpu", quantize="nf4")
    plain = open_answering(str(original.folder), device="cpu", comparable=True)
    assert count_layers(opened, "Linear4bit") == 2 * 7
    packed = {name: value for name, value in opened.model.named_parameters() if value.dtype == torch.uint8}
    with torch.no_grad():
        for name, value in plain.model.named_parameters():
            if name in packed:
                value.copy_(dequantize_4bit(packed[name].data, packed[name].quant_state))
    torch.testing.assert_close(logits_of(opened), logits_of(plain))
    folder = open_answering(str(original.base), device="cpu", quantize="nf4")
    assert count_layers(folder, "Linear4bit") == 2 * 7


def test_8_bits_answer_nearly_as_without(original: MadeRun) -> None:
    """LLM.int8() rounds activations, too: a tenth is more than two layers of random weights make of that (0.07)."""
    plain = logits_of(open_answering(str(original.folder), device="cpu"))
    opened = open_answering(str(original.folder), device="cpu", quantize="int8")
    assert opened.trained is not None
    assert torch.equal(opened.trained.policy.flatten(), original.vectors[3])
    assert count_layers(opened, "Linear8bitLt") == 2 * 7
    assert 0.0 < float((logits_of(opened) - plain).norm() / plain.norm()) < 0.1
    folder = open_answering(str(original.base), device="cpu", quantize="int8")
    assert count_layers(folder, "Linear8bitLt") == 2 * 7


def test_fewer_bits_where_they_cannot_be_had(original: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    full = original.config.model.model_copy(update={"trainable": "full"})
    config = original.config.model_copy(update={"model": full})
    with monkeypatch.context() as patch:
        patch.setattr("hivegrpo.peer.inference.locate.RunConfig.from_json", lambda text: config)
        with pytest.raises(ConfigError, match="quantize the exported folder"):
            chat(str(original.folder), device="cpu", quantize="8bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed. pip install 'hivegrpo\[quantize\]'"):
        chat(str(original.base), device="cpu", quantize="4bit")


# The screen.

HOSTILE = "a\x1b]0;title\x07b\rc\x9b2J\u202ed\ne\tf\N{ZERO WIDTH JOINER}é"


class Display(io.StringIO):
    """Stdout where it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    """120 columns wide."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Display()


def test_a_terminal_gets_nothing_that_it_would_obey(display: Display) -> None:
    with redirect_stdout(display), Screen().answers(["model"]) as show:
        show(0, Piece("<think>\x1b", True))
        show(0, Piece(HOSTILE, False))
    visible = HOSTILE.translate(dict.fromkeys(map(ord, "\x1b\x07\r\x9b\u202e"), "?"))
    assert display.getvalue() == f"{DIM}<think>?{PLAIN}{visible}\n"


def test_two_answers_stand_side_by_side_where_there_is_room(display: Display) -> None:
    with redirect_stdout(display), Screen().answers(["one", "other"]) as show:
        show(0, Piece("4\x1b6", False))
        show(1, Piece("47", True))
    [*_, line] = [line for line in display.getvalue().splitlines() if "47" in line]
    assert re.search(r"4\?6 +│ \x1b\[2m47\x1b\[0m ", line)


def test_the_command_logs_to_stderr_and_ends_with_the_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> int:
        log = structlog.get_logger()
        log.debug("a detail")
        log.warning("a fault")
        return INTERRUPTED

    monkeypatch.setattr("hivegrpo.peer.inference.chat.chat", start)
    monkeypatch.setattr(sys, "argv", ["hivegrpo", "chat"])
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        structlog.reset_defaults()
    assert ended.value.code == INTERRUPTED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a fault" in captured.err
    assert "a detail" not in captured.err


def test_a_pipe_gets_the_text_itself(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    with screen.answers(["one", "other"]) as show:
        show(0, Piece(HOSTILE, True))
        show(1, Piece(HOSTILE, False))
    screen.say("a\x1b[2J")
    captured = capsys.readouterr()
    assert captured.out == f"{HOSTILE}\n{HOSTILE}\n"
    assert captured.err == "[one]\n[other]\na?[2J\n"
