"""Child processes end with their parent, whatever they do."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
from support.programs import STUBBORN, WAIT, Told, gone, python

from hivegrpo.cli.children import Children
from hivegrpo.protocol.errors import HiveError


def test_children_leave_when_asked_and_the_first_one_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        told = Told()
        async with Children(tmp_path) as children:
            for name in ("first", "second", "third"):
                ends = f"{WAIT}open({str(tmp_path / 'ends')!r}, 'a').write({name + ' '!r})"
                await children.start(name, python(ends), told.records.put_nowait)
            pids = await told.pids(3)
        assert gone(pids)

    asyncio.run(scenario())
    assert (tmp_path / "ends").read_text().split()[2] == "first"


def test_stubborn_children_are_killed_with_all_that_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hivegrpo.cli.children.GRACEFUL_SECONDS", 0.1)
    monkeypatch.setattr("hivegrpo.cli.children.SHORT", 0.5)

    async def scenario() -> None:
        told = Told()
        with suppress(ZeroDivisionError):
            async with Children(tmp_path) as children:
                await children.start("stubborn", python(STUBBORN), told.records.put_nowait)
                pids = await told.pids(2)
                assert not gone(pids)
                raise ZeroDivisionError
        assert gone(pids)

    asyncio.run(scenario())


def test_all_can_be_killed_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        told = Told()
        async with Children(tmp_path) as children:
            tasks = [await children.start(name, python(STUBBORN), told.records.put_nowait) for name in ("a", "b")]
            pids = await told.pids(4)
            children.kill()
            await asyncio.wait(tasks, timeout=60)
            assert gone(pids, seconds=10.0)  # killed, and not waited for

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("sys.exit('the disk is full')", "peer-1 ended with exit code 1. It said last:\nthe disk is full"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "peer-1 was ended by SIGKILL. It said nothing."),
        ("sys.stdout.write('{half a li'); sys.exit(3)", "peer-1 ended with exit code 3."),
    ],
)
def test_a_child_that_fails_is_named_with_its_last_words(tmp_path: Path, code: str, says: str) -> None:
    async def scenario() -> None:
        async with Children(tmp_path) as children:
            task = await children.start("peer-1", python(code), lambda record: None)
            with pytest.raises(HiveError) as failure:
                await task
            assert says in failure.value.message
            assert str(tmp_path / "peer-1.log") in failure.value.hint

    asyncio.run(scenario())


def test_logs_move_into_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()

    async def scenario() -> None:
        told = Told()
        async with Children(tmp_path / "before") as children:
            await children.start("one", python(f"{WAIT}sys.stderr.write('later')"), told.records.put_nowait)
            await told.pids(1)
            children.move_logs(tmp_path / "after")

    asyncio.run(scenario())
    assert (tmp_path / "after" / "one.log").read_text() == "later"
