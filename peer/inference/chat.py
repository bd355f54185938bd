"""Talk to the model that a run has trained: answers on stdout, everything else on stderr."""

import contextlib
import sys

from hivegrpo.peer.inference.conversation import Conversation
from hivegrpo.peer.inference.load import load
from hivegrpo.peer.inference.locate import LocalRun
from hivegrpo.peer.learn.data import PROMPT, Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol.errors import ConfigError

HELP = "Ctrl-D or /exit ends, Ctrl-C stops an answer."


def chat(
    run: str | None,
    revision: str = "latest",
    prompt: str | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    device: str = "auto",
) -> None:
    """Answer `prompt` and return, or talk until the end of input.

    max_new_tokens: the run's max_completion_length if left out; temperature 0 always takes the most probable token.
    Errors as `load`; ConfigError for a prompt that is empty or too long.
    """
    trained = load(run, revision, device)
    config = trained.run.config
    encoder = PromptEncoder(trained.tokenizer, config.dataset)
    length = max_new_tokens or config.grpo.max_completion_length
    conversation = Conversation(trained.answering(), encoder, config.grpo, length, temperature)
    _say(trained.title)
    if prompt is not None:
        conversation.answer(prompt)
        return
    example = None if encoder.chat else _example(trained.run)
    _say(HELP if example is None else f"{HELP} It was trained on prompts like {example!r}.")
    _talk(conversation)


def _talk(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` line editing and a history
    invitation = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(invitation)
        except EOFError:
            return
        except KeyboardInterrupt:
            _say(f"\n{HELP}")
            continue
        if line.strip() == "/exit":
            return
        if line.strip():
            _answer(conversation, line)


def _answer(conversation: Conversation, prompt: str) -> None:
    try:
        conversation.answer(prompt)
    except KeyboardInterrupt:
        print(flush=True)
        _say("(stopped)")
    except ConfigError as error:
        _say(str(error))


def _example(run: LocalRun) -> str | None:
    """A prompt of the run's held-out rows, or of its training rows, if they are here."""
    manifest = run.chain.manifest.message
    for file in (manifest.evaluation, manifest.dataset):
        if file.name and run.has(ref_of(file.blob)):
            first, _, _ = run.read(ref_of(file.blob), "the dataset").partition(b"\n")
            return str(Prompts.from_jsonl(first).rows[0][PROMPT])
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
