"""`hivegrpo chat` as somebody meets it: in a terminal, typed at, interrupted, and given what it cannot use."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.processes import ADDITION
from support.terminal import CTRL_C, CTRL_D, Terminal, terminal
from support.trained_run import MadeRun, write_run

from hivegrpo.protocol.homes import run_folder

pytestmark = pytest.mark.slow

CONTEXT = 4096
ENDLESS = "tell me everything there is to say about the numbers from one to ten thousand"
"""To which a model that learned to add says 9 some thousand times."""
PROMPT = "> "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run in a state folder of its own, whose version 0 adds as the demo's starter does, and answers at length."""
    state = tmp_path_factory.mktemp("state")
    base = shutil.copytree(ADDITION / "starter", state / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    made = write_run(state / "made", base)
    return made.copy_to(run_folder(made.chain.run_id, state))


@pytest.fixture(scope="module")
def terminals(made: MadeRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Terminal]]:
    """All that the tests need, started at once: each takes seconds to import what it needs."""
    state = made.folder.parent.parent
    damaged = made.copy_to(tmp_path_factory.mktemp("damaged") / "run")
    blob = damaged.blob(damaged.manifest(2).state)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    commands = {
        "conversation": ["--revision", "0", "--max-new-tokens", str(CONTEXT)],
        "nothing": [str(state / "nothing")],
        "revision": ["--revision", "7"],
        "damaged": [str(damaged.folder)],
    }
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(terminal("chat", "--device", "cpu", *arguments, HIVEGRPO_HOME=str(state)))
            for name, arguments in commands.items()
        }


def test_a_conversation_in_a_terminal(terminals: dict[str, Terminal], tmp_path: Path) -> None:
    chat = terminals["conversation"]
    assert "version 0 of 3" in chat.expect("\n")
    assert "Ctrl-D or /exit ends" in chat.expect(PROMPT)
    chat.type("12+34=\n")
    assert chat.expect(PROMPT) == f"12+34=\n46\n{PROMPT}"

    chat.type(f"{ENDLESS}\n")
    chat.expect(f"{ENDLESS}\n9")
    chat.type(CTRL_C)
    stopped = chat.expect(PROMPT)
    assert "(Stopped: this exchange is forgotten.)" in stopped
    assert len(stopped) < CONTEXT // 2

    chat.type("5" * (CONTEXT + 100) + "\n")
    assert f"The prompt has {CONTEXT + 100} tokens; the model takes 1 to {CONTEXT - 1}. Shorten it." in (
        chat.expect(f"Shorten it.\n{PROMPT}")
    )

    chat.type(f"/save {tmp_path}/talk.json\n")
    chat.expect(f"talk.json.)\n{PROMPT}")
    [conversation] = json.loads((tmp_path / "talk.json").read_text())["conversations"]
    assert [message["content"] for message in conversation["messages"]] == ["12+34=", "46"]

    chat.type("half a line")
    chat.expect("half a line")
    chat.settle()  # CPython's readline does not notice a signal that comes while it takes keys, before the next one
    chat.type(CTRL_C)
    assert "/help has more" in chat.expect(PROMPT)
    chat.type("40+50=\n")
    assert chat.expect(PROMPT) == f"40+50=\n90\n{PROMPT}"
    chat.type(CTRL_D)
    assert chat.ended() == 0
    assert "Traceback" not in chat.raw.decode(errors="replace")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("nothing", 78, "nothing does not exist. Name a run's folder"),
        ("revision", 78, "Version 7 cannot be had: the chain ends at version 3. Available are 0, 2-3."),
        ("damaged", 76, "The state of version 2 is damaged"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, code: int, says: str, terminals: dict[str, Terminal]) -> None:
    chat = terminals[name]
    assert chat.ended() == code, chat.rest
    lines = chat.rest.splitlines()
    assert says in lines[-1]
    assert lines[-1].startswith("Error: ")
    assert "Traceback" not in chat.rest
