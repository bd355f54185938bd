"""Talk to the trained model: answers on stdout, everything else on stderr."""

import difflib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from hivegrpo.peer.inference.answering import Answering, open_answering
from hivegrpo.peer.inference.conversation import Conversation
from hivegrpo.peer.inference.example import example_prompt
from hivegrpo.peer.inference.locate import is_address
from hivegrpo.peer.inference.screen import Screen
from hivegrpo.peer.inference.thinking import Piece
from hivegrpo.peer.inference.transcript import save
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.weights import Quantization
from hivegrpo.protocol.errors import ConfigError, HiveError

KEYS = "Ctrl-C stops an answer; Ctrl-D or /exit ends, as does Ctrl-C twice; /help has more."
COMMANDS = {
    "/clear": "forget what was said so far",
    "/system": "/system TEXT: a system message for what follows; without TEXT, show it",
    "/revision": "/revision V: go on with another version, base or latest; what was said stays",
    "/save": "/save FILE: write the conversation to a new file, .json or .md",
    "/help": "this list",
    "/exit": "end, as Ctrl-D does",
}
SLASHES = "To send a line that begins with /, write //."
INTERRUPTED = 128 + 2
"""Exit code of a program that Ctrl-C (SIGINT) ends."""
QUANTIZATIONS: dict[str, Quantization] = {"4bit": "nf4", "8bit": "int8"}

Bits = Literal["4bit", "8bit"]


def chat(
    source: str | None,
    revision: str = "latest",
    prompt: str | None = None,
    *,
    compare: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    device: str = "auto",
    quantize: Bits | None = None,
) -> int:
    """Answer `prompt` and return, or talk until the end of input; the exit code, 0, or 130 after Ctrl-C.

    prompt: "-" is all that comes on stdin. max_new_tokens: the training's max_completion_length if left out.
    temperature: 0 always takes the most probable token. Errors as `open_answering`, and for a single prompt as
    `Conversation.answer`.
    """
    screen = Screen()
    opening = Opening(source, device, QUANTIZATIONS[quantize] if quantize is not None else None, compare)
    if source is not None and is_address(source):
        screen.say(f"Fetching what is missing here from {source}")
    answering = opening.open(revision)
    policy = Conversation(answering, max_new_tokens, temperature)
    base = [Conversation(answering, max_new_tokens, temperature, of_base=True)] if compare else []
    with closing(Talk(screen, opening, [*base, policy])) as talk:
        screen.say(answering.title)
        if prompt is None:
            return talk.listen()
        try:
            talk.ask(_all_of_stdin() if prompt == "-" else prompt)
        except KeyboardInterrupt:
            return INTERRUPTED
        return 0


@dataclass(frozen=True, slots=True)
class Opening:
    """How the model is opened, at whichever revision."""

    source: str | None
    device: str
    quantize: Quantization | None
    compare: bool

    def open(self, revision: str) -> Answering:
        """Errors as `open_answering`."""
        return open_answering(self.source, revision, self.device, quantize=self.quantize, comparable=self.compare)


class Talk:
    """What somebody types, or a program writes, line by line, and the answers."""

    def __init__(self, screen: Screen, opening: Opening, conversations: list[Conversation]) -> None:
        """conversations: all get the same prompts; the last one's model is the policy."""
        self._screen = screen
        self._opening = opening
        self._conversations = conversations
        self._told_of_room = False

    def close(self) -> None:
        """End what the model was asked through."""
        self._conversations[-1].answering.close()

    def listen(self) -> int:
        """Take lines until the end of input; the exit code."""
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` line editing and a history
        conversation = self._conversations[-1]
        trained = conversation.answering.trained
        example = example_prompt(trained.run) if trained is not None and not conversation.remembers else None
        self._screen.say(KEYS if example is None else f"{KEYS} It was trained on prompts like {example!r}.")
        invitation = "> " if self._screen.asks and self._screen.is_terminal else ""
        interrupted = False
        while True:
            try:
                line = input(invitation)
                interrupted = False
                if line.strip() == "/exit":
                    return 0
                self._take(line)
            except EOFError:
                if invitation:
                    self._screen.end_line()
                return 0
            except KeyboardInterrupt:
                if interrupted or not self._screen.asks:
                    return INTERRUPTED
                interrupted = True
                self._screen.say(f"\n{KEYS}")

    def ask(self, prompt: str) -> None:
        """Show the answers to one prompt. An exchange that does not come to its end is forgotten."""
        stop = threading.Event()
        answers = [conversation.answer(prompt, stop) for conversation in self._conversations]
        if any(conversation.left_out for conversation in self._conversations) and not self._told_of_room:
            self._told_of_room = True
            self._screen.say("(The conversation has outgrown what the model can read: its beginning is left out.)")
        complete = len(self._conversations[0].exchanges)
        try:
            titles = [conversation.title for conversation in self._conversations]
            with _interrupts_set(stop), self._screen.answers(titles) as show:
                for number, pieces in enumerate(answers):
                    show(number, Piece("", False))  # its title is shown even if it says nothing
                    with closing(pieces):
                        for piece in pieces:
                            show(number, piece)
        except BaseException as error:
            for conversation in self._conversations:
                del conversation.exchanges[complete:]
            self._screen.end_line()
            if isinstance(error, Cancelled):
                raise KeyboardInterrupt from None
            raise
        for conversation in self._conversations:
            if conversation.exchanges[-1].cut:
                self._screen.say(f"(cut at --max-new-tokens {conversation.max_new_tokens})")

    def _take(self, line: str) -> None:
        """One line: a prompt, a command, or nothing."""
        text = line.strip()
        try:
            if text.startswith("/") and not text.startswith("//"):
                name, _, argument = text.partition(" ")
                self._obey(name, argument.strip())
            elif text:
                self._answer(text[1:] if text.startswith("//") else line)
        except HiveError as error:
            self._screen.say(str(error))

    def _answer(self, prompt: str) -> None:
        try:
            self.ask(prompt)
        except KeyboardInterrupt:
            if not self._screen.asks:
                raise
            self._screen.say("(Stopped: this exchange is forgotten.)")

    def _obey(self, name: str, argument: str) -> None:
        match name:
            case "/help":
                lines = [text if text.startswith("/") else f"{name}: {text}" for name, text in COMMANDS.items()]
                self._screen.say(
                    "\n".join([*lines, "A line that begins with // is a prompt that begins with /.", KEYS])
                )
            case "/clear":
                for conversation in self._conversations:
                    conversation.clear()
                self._told_of_room = False
                self._screen.say("(What was said is forgotten.)")
            case "/system":
                self._instruct(argument)
            case "/revision":
                self._switch(argument)
            case "/save":
                if not argument:
                    raise ConfigError("/save needs the name of a file.", "It ends in .json or .md.")
                path = Path(argument).expanduser()
                save(self._conversations, path)
                self._screen.say(f"(Saved as {path}.)")
            case _:
                nearest = difflib.get_close_matches(name, COMMANDS, n=1)
                hint = f"Did you mean {nearest[0]}?" if nearest else "/help lists them."
                raise ConfigError(
                    f"There is no command {name}.", f"{hint} To send a line that begins with /, write //."
                )

    def _instruct(self, system: str) -> None:
        if not system:
            instructions = self._conversations[-1].instructions
            self._screen.say("(There is no system message.)" if instructions is None else instructions)
            return
        for conversation in self._conversations:
            conversation.instruct(system)
        self._screen.say("(It will read this from now on.)")

    def _switch(self, revision: str) -> None:
        """The model that answers so far stays until the other is there, so that a failure changes nothing."""
        if not revision:
            raise ConfigError("/revision needs a version.", "A number, base, or latest.")
        try:
            opened = self._opening.open(revision)
        except (MemoryError, torch.OutOfMemoryError):
            raise ConfigError(
                "There is no memory for two versions at a time.", f"End, and start with --revision {revision}."
            ) from None
        self.close()
        for conversation in self._conversations:
            conversation.switch(opened)
        self._screen.say(opened.title)


@contextmanager
def _interrupts_set(stop: threading.Event) -> Iterator[None]:
    """Inside, Ctrl-C sets `stop`, and only the second one is raised: what the libraries that compute call back to may
    swallow an exception that comes in the middle of it.
    """

    def note(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _all_of_stdin() -> str:
    """Without the line end that a text file has after its last line: a prompt had none in training."""
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")
