"""`hivegrpo coordinator verify`: what of a run is here holds, what is not is said, and damage is named."""

import asyncio
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import typer
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.cli.verify_chain import verify_chain
from hivegrpo.coordinator import orders
from hivegrpo.coordinator.log import LOG_FILE, _crc
from hivegrpo.peer.home import CONTRIBUTIONS_FOLDER
from hivegrpo.protocol.chainfile import ENTRIES_FILE, ChainFile
from hivegrpo.protocol.errors import ChainError
from hivegrpo.protocol.identity import Identity

VALUES = 40_000
VERSIONS = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two peers, one of whose versions is a rollback to version 0."""
    config = small_config(run={"versions": VERSIONS}, averaging={"codec": "fp32"})
    coordinator = Identity.generate()
    folder = tmp_path_factory.mktemp("run")
    swarm = Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            node = await swarm.start_coordinator()
            for name in ("a", "b"):
                await swarm.start_peer(name, IntegerLearner(VALUES))
            await swarm.committed(1)
            assert swarm.service is not None
            await swarm.service.operator.execute(orders.Rollback(command="rollback", version=0))
            await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
            await node.leave()

    asyncio.run(scenario())
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def verify(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], int]:
    """What is reported, and the exit code."""
    capsys.readouterr()
    code = 0
    try:
        verify_chain(run, as_json=True)
    except typer.Exit as ending:
        code = ending.exit_code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report, code


def averaged(run: Path) -> list[int]:
    entries = ChainFile.open(run / "coordinator").chain.entries
    return [entry.manifest.message.version for entry in entries if entry.plan is not None]


def test_all_of_a_run_whose_homes_are_here_is_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, code = verify(run, capsys)
    assert (code, report["wrong"], report["versions"]) == (0, [], VERSIONS + 1)
    assert len(averaged(run)) == VERSIONS - 1
    assert report["quorums"] == report["steps"] == averaged(run)
    assert report["spans"] == report["reductions"] == report["all_spans"] > 0


def test_what_is_not_here_is_not_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "coordinator" / LOG_FILE).unlink()
    for name in ("a", "b"):
        shutil.rmtree(run / name / CONTRIBUTIONS_FOLDER)
        shutil.rmtree(run / name / "blobs")
    report, code = verify(run, capsys)
    assert (code, report["wrong"]) == (0, [])
    assert (report["quorums"], report["steps"], report["spans"], report["reductions"]) == ([], [], 0, 0)
    assert report["states"], "the coordinator keeps some"
    verify_chain(run, as_json=False)
    assert f"quorums: 0 of {len(averaged(run))} versions" in capsys.readouterr().out


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_state_or_span_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = ChainFile.open(run / "coordinator").chain
    assert chain.head is not None
    manifest = chain.head.manifest.message
    for home in (run / "coordinator", run / "a", run / "b"):
        for blob in (manifest.state, manifest.spans[0]):
            path = home / "blobs" / blob.root.hex()
            if path.exists():
                flip(path)
    report, code = verify(run, capsys)
    assert code == 76
    damaged = [f"Span 0 of version {VERSIONS} is damaged", f"The state of version {VERSIONS} is damaged"]
    assert [text.split(":")[0] for text in report["wrong"]] == damaged
    assert VERSIONS not in report["steps"]


def test_votes_that_are_missing_or_changed_make_no_quorum(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = run / "coordinator" / LOG_FILE
    with sqlite3.connect(log) as database:
        database.execute("DROP TRIGGER events_keep")
        vote = "SELECT sequence, body FROM events WHERE kind = 'StepReported' ORDER BY sequence LIMIT 1"
        ((sequence, body),) = database.execute(vote)
        changed = body.replace(b'"signed":"', b'"signed":"AAAA')
        row = changed, _crc(sequence, ("StepReported", changed)), sequence
        database.execute("UPDATE events SET body = ?, crc = ? WHERE sequence = ?", row)
    report, code = verify(run, capsys)
    assert code == 76
    assert len(report["wrong"]) == 1
    assert report["wrong"][0].startswith("a vote in the log does not verify")
    assert report["quorums"] == averaged(run)[1:]


def test_a_damaged_chain_is_refused(run: Path) -> None:
    for home in ("coordinator", "a", "b"):
        flip(run / home / ENTRIES_FILE)
    with pytest.raises(ChainError):
        verify_chain(run, as_json=True)
