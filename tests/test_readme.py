"""What the README says to type: every command is one that there is, and its three paths run as written."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from support.processes import addition_config

from hivegrpo.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = re.compile(r"/ip4/\S+/p2p/12D3KooW\.\.\.|\bADDRESS\b")
INVITE = re.compile(r"\bhive_\.\.\.|\bTOKEN\b")
SECONDS = 120.0
"""For each step; whoever launches the run waits for all of them."""


def commands(page: Path, program: str) -> list[str]:
    """The indented or fenced lines of a page that call a program, without the comments beside them."""
    text = page.read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    lines = re.sub(r"\\\n\s*", "", f"{indented}\n{fenced}").splitlines()
    return [re.split(r"\s+#", line)[0].strip() for line in lines if re.match(rf"(\S*/bin/)?{program}( |$)", line)]


def written(command: str) -> list[str]:
    """The README's only command that begins like this, as a list of words."""
    found = [line for line in commands(ROOT / "README.md", "hivegrpo") if line.startswith(command)]
    assert found, f"the README has no {command!r}"
    return shlex.split(found[0])


COMMANDS = [
    (page.name, command)
    for page in PAGES
    for command in commands(page, "hivegrpo")
    if " ..." not in command and " | " not in command
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_is_one_that_there_is(page: str, command: str) -> None:
    """Its options too, those in [brackets] as well, and as many arguments as it takes."""
    typed = re.sub(r" < \S+", "", command.replace("[", "").replace("]", ""))
    words = shlex.split(re.sub(r"\b(VERSION|N|H|PEERS)\b", "1", typed))[1:]
    found: Any = typer.main.get_command(app)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    if hasattr(found, "commands"):
        assert not words, f"there is no {words[0]!r}"
        return
    with found.make_context("hivegrpo", words):  # UsageError if it is not called like this
        pass


def test_every_make_target_is_one_that_there_is() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, ROOT / "benchmarks" / "README.md"):
        for command in commands(page, "make"):
            named = {word for word in command.split()[1:] if "=" not in word}
            assert named <= targets, f"{page.name}: {command}"
    named = set(re.findall(r"`make ([\w-]+)`", (ROOT / "README.md").read_text()))
    assert named <= targets


class Running:
    """A command that runs, and the lines that it has printed."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        with (folder / f"{words[1]}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hivegrpo.cli.main", *words[1:]],
                cwd=folder,
                env=os.environ | {"HIVEGRPO_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._killer = threading.Timer(2 * SECONDS, self.process.kill)
        self._killer.start()

    def line(self) -> str:
        """The next line on stdout; empty at its end, which comes in time."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> int:
        """Interrupt it if it still runs; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        assert self.process.stdout is not None
        with self.process.stdout:
            code = self.process.wait(30)
        self._killer.cancel()
        return code


def once(words: Sequence[str], folder: Path, typed: str = "") -> str:
    """Run a command to its end; what it printed on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "hivegrpo.cli.main", *words[1:]],
        cwd=folder,
        env=os.environ | {"HIVEGRPO_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"},
        input=typed,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run that was launched as the README says, and the line that its coordinator printed."""
    folder = tmp_path_factory.mktemp("readme")
    addition_config(folder, run={"versions": 2, "start_peers": 1}, admission={"mode": "invite"})
    coordinator = Running(written("hivegrpo coordinator run"), folder)
    try:
        yield folder, shlex.split(coordinator.line())
    finally:
        assert coordinator.end() == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_paths_of_the_readme_run_as_written(host: tuple[Path, list[str]]) -> None:
    """Host, join, chat: each command is the README's, with nothing but address, token and prompt filled in."""
    folder, printed = host
    join, address = written("hivegrpo peer run"), printed[3]
    assert [INVITE.sub("", ADDRESS.sub(address, word)) for word in join] == [INVITE.sub("", word) for word in printed]

    token = once(["hivegrpo", "coordinator", "invite"], folder).split()[-1]
    assert token.startswith("hive_")
    peer = Running([INVITE.sub(token, ADDRESS.sub(address, word)) for word in join], folder)
    assert peer.process.wait(SECONDS) == 0, (folder / "peer.log").read_text()[-2000:]
    assert peer.end() == 0

    chat = [ADDRESS.sub(address, word) for word in written("hivegrpo chat ADDRESS")]
    assert once(chat, folder, "12+34=\n").strip().isdigit()
