"""`hivegrpo verify-span`, and the judge that a coordinator starts."""

import asyncio
import json
from pathlib import Path

import pytest
from support.evidence import Evidence

from hivegrpo.cli import judge as judging
from hivegrpo.cli.judge import judge_apart
from hivegrpo.cli.verify_span import verify
from hivegrpo.protocol.errors import CommitmentError, ConfigError, MismatchError

CASE = Evidence()
HOLDS = CASE.covered_span().SerializeToString(deterministic=True)
SHOWS_NOTHING = CASE.accuse_honest_span().SerializeToString(deterministic=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.proof"
    path.write_bytes(HOLDS)
    return path


def test_a_proof_is_told_in_lines(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(file, None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {CASE.run_id} (test), coordinator {CASE.coordinator.peer_id}"
    assert lines[1] == "version 1, attempt 1, span 0"
    assert lines[2].startswith(f"guilty: {CASE.peer(0)} signed span 0 of version 1")
    assert lines[3].startswith(f"guilty: {CASE.peer(3)} signed, as its auditor")


def test_a_proof_is_told_in_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(file, CASE.run_id, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["run_id"], told["version"], told["span"]) == (CASE.run_id, 1, 0)
    assert [peer for peer, _ in told["guilty"]] == [CASE.peer(0), CASE.peer(3)]


def test_what_shows_nothing_ends_with_76_and_what_is_none_with_78(file: Path) -> None:
    with pytest.raises(MismatchError, match="of run") as ending:
        verify(file, "0" * 64, as_json=False)
    assert ending.value.exit_code == 76
    file.write_bytes(SHOWS_NOTHING)
    with pytest.raises(MismatchError, match="is what its rule gives"):
        verify(file, None, as_json=False)
    for content in (b"", b"\xff" * 100, HOLDS[:-1]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="no proof of fault") as ending:
            verify(file, None, as_json=False)
        assert ending.value.exit_code == 78
    with pytest.raises(ConfigError, match="cannot be read"):
        verify(file / "none", None, as_json=False)


@pytest.mark.slow
def test_a_judge_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def three() -> list[object]:
        return await asyncio.gather(
            judge_apart(CASE.run_id, HOLDS),
            judge_apart(CASE.run_id, SHOWS_NOTHING),
            judge_apart(CASE.run_id, b"\xff" * 100),
            return_exceptions=True,
        )

    guilty, nothing, none = asyncio.run(three())
    assert isinstance(guilty, list)
    assert [peer for peer, _ in guilty] == [CASE.peer(0), CASE.peer(3)]
    assert isinstance(nothing, CommitmentError)
    assert "is what its rule gives" in nothing.message
    assert isinstance(none, CommitmentError)
    assert "no proof of fault" in none.message
    monkeypatch.setattr(judging, "JUDGE_SECONDS", 0.01)
    with pytest.raises(CommitmentError, match="took more than"):
        asyncio.run(judge_apart(CASE.run_id, HOLDS))
