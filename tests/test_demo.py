"""The demo: ordinary commands as processes, what is shown of them, and that none is left behind."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from support.processes import ADDITION, addition_config
from support.programs import WAIT, gone, python

from hivegrpo.cli import demo
from hivegrpo.cli.accuracy import Accuracy
from hivegrpo.cli.display import display, picture, sparkline
from hivegrpo.cli.output import Record
from hivegrpo.cli.plot import plot_rewards
from hivegrpo.cli.progress import Progress
from hivegrpo.cli.report import differing_versions, report, summary
from hivegrpo.coordinator.events import PeerLeft
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.inference.cost import Cost, describe_cost
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.errors import HiveError

ALICE, BOB = "12D3KooWAlice", "12D3KooWBob"
GOOD, BAD = "ab" * 32, "cd" * 32
COST = Cost(2, 3600.0, 0.0, 0, 800, 300, 163)


def status(version: int, **fields: Any) -> Record:
    peer = {"peer": ALICE, "state": "online", "version": version, "tokens_per_second": 12.0, "contributed": 1}
    return {
        "kind": "status", "run_id": "ef" * 32, "name": "test", "phase": "rollout", "version": version, "versions": 2,
        "state_root": GOOD, "trouble": "", "peers": [peer], **fields,
    }  # fmt: skip


def version(number: int, **metrics: float) -> Record:
    return {"kind": "version", "version": number, "versions": 2, "state_root": GOOD, "metrics": metrics}


def vote(number: int, peer: str, root: str = GOOD, **metrics: float) -> Record:
    return {"kind": "root", "version": number, "peer": peer, "state_root": root, "metrics": metrics}


RUN = [
    {"kind": "started", "run_id": "ef" * 32},
    vote(0, ALICE),
    vote(0, BOB),
    version(0),
    status(0),
    vote(1, ALICE, bytes_sent=100.0, bytes_received=70.0, **{"seconds/exchange": 0.1, "seconds/step": 0.3}),
    vote(1, BOB, bytes_sent=80.0, bytes_received=90.0, **{"seconds/exchange": 0.3, "seconds/step": 0.5}),
    version(1, reward=0.25, num_tokens=300.0, **{"eval/accuracy": 0.5, "seconds/rollout": 1.5, "seconds/gradient": 2}),
    vote(2, ALICE, bytes_sent=1.0, bytes_received=2.0),
    version(2, reward=0.75, num_tokens=500.0),
    vote(2, BOB, bytes_sent=2.0, bytes_received=1.0),
    status(2),
]


@pytest.fixture
def progress() -> Progress:
    """After `RUN`, whose versions came two seconds apart."""
    times = iter(range(0, 100, 2))
    progress = Progress(clock=lambda: float(next(times)))
    for record in RUN:
        progress.take(record)
    return progress


def test_progress_follows_the_coordinators_lines(progress: Progress) -> None:
    assert progress.finished
    assert progress.curve("reward") == [(0, 0.25), (1, 0.75)]  # of the policies that were sampled
    assert progress.latest("eval/accuracy") == 0.5
    assert progress.latest("kl") is None
    assert progress.bytes_exchanged == 70 + 90 + 2 + 1
    assert progress.tokens_per_second == (300 + 500) / 4  # versions 1 and 2, at 2 s and 4 s


def test_the_report_says_what_each_peer_did(progress: Progress) -> None:
    content = json.loads(json.dumps(report(progress, Accuracy(0.3, 0.9, 500), COST, 12.3456)))
    assert content["run_id"] == "ef" * 32
    assert content["accuracy"] == {"before": 0.3, "after": 0.9, "problems": 500}
    assert content["cost"] == asdict(COST)
    assert content["seconds_total"] == 12.346
    assert [entry["version"] for entry in content["versions"]] == [0, 1, 2]
    assert content["versions"][1] == {
        "version": 1,
        "state_root": GOOD,
        "roots": {ALICE: GOOD, BOB: GOOD},
        "reward": 0.25,
        "num_tokens": 300,
        "bytes_sent": {ALICE: 100, BOB: 80},
        "bytes_received": {ALICE: 70, BOB: 90},
        "seconds": {"rollout": 1.5, "gradient": 2, "exchange": pytest.approx(0.2), "step": pytest.approx(0.4)},
    }


def test_a_different_root_is_told(progress: Progress) -> None:
    assert differing_versions(progress) == []
    assert summary(progress, None, COST, 1.0)[-1] == describe_cost(COST)
    assert "same state root" in " ".join(summary(progress, None, COST, 1.0))
    progress.take(vote(2, BOB, BAD))
    assert differing_versions(progress) == [2]
    assert "different state roots for versions [2]" in " ".join(summary(progress, None, COST, 1.0))


def rendered(progress: Progress) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(picture(progress))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_picture_shows_the_run(progress: Progress) -> None:
    shown = rendered(progress)
    for part in ("version 2 of 2", "0.750", "0.500", "200", GOOD, ALICE, "online", "MB"):
        assert part in shown
    progress.take(status(2, trouble="a reducer is lost", state_root=None))
    assert "a reducer is lost" in rendered(progress)
    assert "waiting" in rendered(Progress())


def test_without_a_terminal_each_version_is_a_line(progress: Progress) -> None:
    console = Console(file=StringIO(), force_terminal=False)
    with display(progress, console) as show:
        for record in RUN:
            show(record)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[:4] for line in lines] == [["version", str(number), "of", "2"] for number in range(3)]
    assert "reward 0.750" in lines[2]


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [([], 4, ""), ([0.0, 0.5, 1.0], 4, "▁▅█"), ([0.0, 0.0, 1.0, 1.0], 2, "▁█"), ([-1.0, 2.0], 9, "▁█")],
)
def test_a_curve_fits_in_a_line(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_the_plot_is_a_png(progress: Progress, tmp_path: Path) -> None:
    plot_rewards(progress, tmp_path / "reward.png")
    content = (tmp_path / "reward.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


@pytest.fixture
def swarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What coordinator and peers of a demo do, as code; each of them notes its pid in a file first."""
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))
    home = tmp_path / "state" / "runs" / "ab" / "coordinator"
    home.mkdir(parents=True)
    lines = [{"kind": "started", "home": str(home), "address": "nowhere"}, *RUN[1:]]
    say = f"lines = json.loads({json.dumps(lines)!r})\nsay = lambda some: [print(json.dumps(line)) for line in some]\n"
    notes = f"open({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
    quiet = "sys.stdout.flush()\n"
    code = {"coordinator": f"say(lines[:1])\n{quiet}{WAIT}", "peer": WAIT, "peer-2": WAIT}

    def command(name: str) -> list[str]:
        program = python(notes + say + code.get(name, code["peer"]))
        return [part.replace("print(json.dumps({'pid': os.getpid()}), flush=True)", "") for part in program]

    monkeypatch.setattr(demo, "coordinator_command", lambda config: command("coordinator"))
    monkeypatch.setattr(demo, "peer_command", lambda address, home, threads: command(home.name))
    return code


async def train(tmp_path: Path) -> tuple[Path | None, Progress]:
    progress = Progress()
    run = await demo._train(tmp_path / "run.toml", 3, progress, Console(file=StringIO()))
    return run, progress


def pids(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "pids").read_text().split()]


def test_a_demo_ends_with_its_run(tmp_path: Path, swarm: dict[str, str]) -> None:
    swarm["coordinator"] = "say(lines)\nsys.stdout.flush()\n"
    run, progress = asyncio.run(train(tmp_path))
    assert run == tmp_path / "state" / "runs" / "ab"
    assert progress.finished
    assert sorted(path.name for path in (run / "logs").iterdir()) == [
        "coordinator.log", "peer-1.log", "peer-2.log", "peer-3.log"
    ]  # fmt: skip
    assert gone(pids(tmp_path))


def test_a_demo_whose_peer_dies_says_which_and_ends(tmp_path: Path, swarm: dict[str, str]) -> None:
    swarm["peer-2"] = "sys.exit('out of memory')"
    with pytest.raises(HiveError, match="peer-2 ended with exit code 1") as failure:
        asyncio.run(train(tmp_path))
    assert "out of memory" in failure.value.message
    assert gone(pids(tmp_path))


def test_a_demo_whose_peer_leaves_early_ends(tmp_path: Path, swarm: dict[str, str]) -> None:
    swarm["peer-2"] = "sys.exit()"
    with pytest.raises(HiveError, match="peer-2 left before the run was finished"):
        asyncio.run(train(tmp_path))
    assert gone(pids(tmp_path))


def test_a_demo_whose_coordinator_cannot_start_says_so(tmp_path: Path, swarm: dict[str, str]) -> None:
    swarm["coordinator"] = "sys.exit('Error: the port is taken')"
    with pytest.raises(HiveError, match="the port is taken"):
        asyncio.run(train(tmp_path))


def test_an_interrupted_demo_leaves_no_child(tmp_path: Path, swarm: dict[str, str]) -> None:
    swarm["peer-2"] = f"os.kill(os.getppid(), signal.SIGINT)\n{WAIT}"
    run, _ = asyncio.run(train(tmp_path))
    assert run is None
    assert len(pids(tmp_path)) >= 2
    assert gone(pids(tmp_path))


class Demo:
    """A real one, with small rounds."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    @classmethod
    async def start(cls, folder: Path, *flags: str) -> "Demo":
        config = addition_config(
            folder,
            run={"name": "test", "versions": 2, "start_peers": 3, "seed": 1},
            evaluation={"path": str(ADDITION / "heldout.jsonl"), "limit": 50},
        )
        command = [sys.executable, "-m", "hivegrpo.cli.main", "demo", "--config", str(config), *flags]
        environment = os.environ | {"HIVEGRPO_HOME": str(folder / "state")}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
        )
        return cls(process)

    async def until(self, version: int) -> None:
        """Wait for the line of a version."""
        assert self.process.stderr is not None
        while not any(line.split()[:2] == ["version", str(version)] for line in self.lines):
            line = await self.process.stderr.readline()
            assert line, "".join(self.lines)
            self.lines.append(line.decode())

    def family(self) -> dict[int, str]:
        """What runs below it, by pid: coordinator, peer or p2pd."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                roles = [role for role in ("coordinator", "peer") if role in command]
                found[process.pid] = "p2pd" if "p2pd" in process.name() else (roles or [" ".join(command)])[0]
        return found

    async def end(self) -> tuple[int, str]:
        """Exit code and what it said on stdout."""
        out, err = await self.process.communicate()
        self.lines.append(err.decode())
        assert self.process.returncode is not None
        return self.process.returncode, out.decode()


def with_demo(folder: Path, scenario: Callable[[Demo], Awaitable[None]], *flags: str) -> None:
    async def run() -> None:
        started = await Demo.start(folder, *flags)
        try:
            async with asyncio.timeout(240):
                await scenario(started)
        finally:
            if started.process.returncode is None:
                started.process.kill()
                await started.process.wait()

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_is_a_coordinator_three_peers_and_a_p2pd_each(tmp_path: Path) -> None:
    family: dict[int, str] = {}

    async def scenario(started: Demo) -> None:
        await started.until(0)
        family.update(started.family())
        code, out = await started.end()
        assert code == 0, "".join(started.lines)
        assert "every peer reported the same state root" in out
        assert "of 50 held-out problems" in out
        assert "device-hours on CPUs" in out
        command = next(line for line in out.splitlines() if line.startswith("Talk to it:")).split(":", 1)[1].split()
        assert command[1] == "chat"
        assert (Path(command[2]) / "reward.png").is_file()

    with_demo(tmp_path, scenario, "--report", str(tmp_path / "report.json"))
    assert Counter(family.values()) == {"coordinator": 1, "peer": 3, "p2pd": 4}
    assert gone(list(family))
    content = json.loads((tmp_path / "report.json").read_text())
    assert [entry["version"] for entry in content["versions"]] == [0, 1, 2]
    for entry in content["versions"]:
        assert len(entry["roots"]) == 3
        assert set(entry["roots"].values()) == {entry["state_root"]}
    for entry in content["versions"][1:]:
        assert len(entry["bytes_sent"]) == 3
        # Each of three reducers gets its span from two peers, and each peer two spans from others: four vectors in all,
        # of 40,960 values at 33 bytes for 32, and little else.
        assert sum(entry["bytes_received"].values()) == pytest.approx(4 * 40_960 * 33 / 32, rel=0.03)
        assert min(entry["seconds"].values()) > 0.0
    assert content["accuracy"]["problems"] == 50
    assert (content["cost"]["versions"], content["cost"]["untimed"], content["cost"]["gpu_seconds"]) == (2, 0, 0.0)
    assert content["cost"]["device_seconds"] > 0.0
    # Two versions of three contributors: 2 (3 - 1) vectors each; the rest is framing.
    told = sum(sum(entry["bytes_sent"].values()) for entry in content["versions"])
    assert content["cost"]["bytes_exchanged"] == 2 * 4 * 40_960 * 33 // 32
    assert told == pytest.approx(content["cost"]["bytes_exchanged"], rel=0.03)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_the_demo_and_all_its_processes(tmp_path: Path) -> None:
    async def scenario(started: Demo) -> None:
        await started.until(1)
        family = started.family()
        assert len(family) == 8
        os.killpg(started.process.pid, signal.SIGINT)  # as a terminal does it
        code, _ = await started.end()
        assert code == demo.INTERRUPTED, "".join(started.lines)
        assert gone(list(family))

    with_demo(tmp_path, scenario)
    (home,) = (tmp_path / "state" / "runs").glob("*/coordinator")
    with closing(EventLog(home / LOG_FILE, ChainFile.open(home).chain.run_id)) as log:
        assert sum(isinstance(event, PeerLeft) for event in log.replay()) == 3
