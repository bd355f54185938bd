"""The commands that hand a run over to another coordinator key, and a swarm that goes on under it."""

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import support.evidence
from support.chains import ChainMaker
from support.evidence import Evidence
from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.cli.coordinator_home import KEY_FILE
from hivegrpo.cli.main import main
from hivegrpo.coordinator.events import AuditReported, PlanMade
from hivegrpo.peer.swarm.faults import judge
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.envelope import digest_of, parse, sign
from hivegrpo.protocol.errors import ReplayError, WireError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.identity import Identity

VALUES = 40_000
NAMES = ("a", "b", "c")


class Commands:
    """`hivegrpo` in this process; what it prints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        """Its stdout; it has to end with 0."""
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out

    def run(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["hivegrpo", *arguments])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, err

    def hand_over(self, home: Path, run_key: Path) -> str:
        """Both steps at the coordinator, and the one where the run key is; the signed succession."""
        program, *asked = shlex.split(self("coordinator", "succeed", str(home)))
        assert program == "hivegrpo"
        signed = self(*(str(run_key) if word == "RUN_KEY_FILE" else word for word in asked)).strip()
        self("coordinator", "succeed", str(home), "--succession", signed)
        return signed


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(monkeypatch, capsys)


@pytest.fixture
def run_key(tmp_path: Path, commands: Commands) -> Path:
    """A new run key's file."""
    line = commands("run-key", "create", str(tmp_path / "run.key"))
    key = Identity.from_bytes((tmp_path / "run.key").read_bytes())
    assert line == f'key = "{key.peer_id}"\n'
    assert (tmp_path / "run.key").stat().st_mode & 0o777 == 0o600
    return tmp_path / "run.key"


def identity(file: Path) -> Identity:
    return Identity.from_bytes(file.read_bytes())


def make_home(folder: Path, run_key: Path) -> ChainMaker:
    """A coordinator's home with versions 0 to 2."""
    maker = ChainMaker(run_key=identity(run_key))
    write_whole(folder / KEY_FILE, maker.identity.to_bytes())
    file = ChainFile.create(folder, maker.run, maker.identity.peer_id)
    for version in range(3):
        file.append(maker.entry(version))
    return maker


def test_a_key_file_is_not_overwritten(run_key: Path, commands: Commands) -> None:
    code, _, err = commands.run("run-key", "create", str(run_key))
    assert code == 78
    assert "is there already" in err


def test_a_home_is_handed_over_twice(tmp_path: Path, run_key: Path, commands: Commands) -> None:
    home = tmp_path / "home"
    maker = make_home(home, run_key)
    commands.hand_over(home, run_key)
    first = identity(home / KEY_FILE)
    assert first.peer_id != maker.identity.peer_id
    file = ChainFile.open(home, first.peer_id)
    maker.identity = first
    file.append(maker.entry(3))
    (home / KEY_FILE).unlink()  # lost, which is what a run key is for
    commands.hand_over(home, run_key)
    second = identity(home / KEY_FILE)
    chain = ChainFile.open(home, second.peer_id).chain
    assert [chain.signer_of(version) for version in (3, 4)] == [first.peer_id, second.peer_id]
    with pytest.raises(ReplayError):
        ChainFile.open(home, maker.identity.peer_id)


def test_a_crash_between_succession_and_key_is_mended(tmp_path: Path, run_key: Path, commands: Commands) -> None:
    home = tmp_path / "home"
    make_home(home, run_key)
    signed = commands.hand_over(home, run_key)
    key = (home / KEY_FILE).read_bytes()
    commands("coordinator", "succeed", str(home), "--succession", signed)
    (home / KEY_FILE).write_bytes(Identity.generate().to_bytes())
    (home / "next.key").write_bytes(key)
    commands("coordinator", "succeed", str(home), "--succession", signed)
    assert (home / KEY_FILE).read_bytes() == key
    assert not (home / "next.key").exists()


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"coordinator": Identity.generate().peer_id}, 78, "this home's next key is"),
        ({"first": 5}, 78, "the next one here is 3"),
        ({"first": 2}, 78, "the next one here is 3"),
        ({"number": 2}, 76, "Expected succession 1, got 2"),
        ({"parent": b"p" * 32}, 76, "continue another history"),
    ],
)
def test_another_succession_than_was_asked_for_is_refused(
    change: dict[str, object], code: int, says: str, tmp_path: Path, run_key: Path, commands: Commands
) -> None:
    from hivegrpo.cli.run_key import to_text

    home = tmp_path / "home"
    maker = make_home(home, run_key)
    commands("coordinator", "succeed", str(home))
    succession = pb.Succession(number=1, coordinator=identity(home / "next.key").peer_id, first=3, parent=maker.head)
    for name, value in change.items():
        setattr(succession, name, value)
    text = to_text(sign(identity(run_key), maker.run_id, succession))
    ended, _, err = commands.run("coordinator", "succeed", str(home), "--succession", text)
    assert (ended, says in err) == (code, True), err
    assert identity(home / KEY_FILE).peer_id == maker.identity.peer_id
    assert ChainFile.open(home, maker.identity.peer_id).chain.successions == []


def test_mistakes_are_explained(tmp_path: Path, run_key: Path, commands: Commands) -> None:
    home = tmp_path / "home"
    make_home(home, run_key)
    for text in ("not base64!", "aGVsbG8="):
        code, _, err = commands.run("coordinator", "succeed", str(home), "--succession", text)
        assert (code, "This is no signed succession" in err) == (78, True)
    other = ChainMaker()
    ChainFile.create(tmp_path / "keyless", other.run, None)
    code, _, err = commands.run("coordinator", "succeed", str(tmp_path / "keyless"))
    assert (code, "has no run key" in err) == (78, True)
    flags = ("--run", "ab" * 32, "--number", "1", "--coordinator", "me", "--first", "1", "--parent", "cd" * 32)
    code, _, err = commands.run("run-key", "sign", str(run_key), *flags)
    assert (code, "This is no succession" in err) == (78, True)
    code, _, err = commands.run("run-key", "sign", str(tmp_path / "gone"), *flags)
    assert (code, "no key file" in err) == (78, True)
    assert not (tmp_path / "gone").exists()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def test_a_swarm_goes_on_under_the_new_key_from_the_middle_of_an_attempt(
    tmp_path: Path, run_key: Path, commands: Commands
) -> None:
    """All die once version 2 is planned. Then: another key, the same plan and draws, a late joiner, one root."""
    config = small_config(
        run={"start_peers": 3, "versions": 4, "key": identity(run_key).peer_id}, averaging={"audit_rate": 1.0}
    )
    coordinator = Identity.generate()
    signed = signed_run(coordinator, config, VALUES, run_key=identity(run_key))
    swarm = Swarm(tmp_path, config, signed, coordinator)

    def plans() -> list[bytes]:
        """Digests of the plans for version 2."""
        made = [event.payload for event in swarm.events if isinstance(event, PlanMade)]
        return [digest_of(payload) for payload in made if parse(pb.RoundPlan, payload).version == 2]

    async def before() -> None:
        node = await swarm.start_coordinator()
        for name in NAMES:
            await swarm.start_peer(name, IntegerLearner(VALUES))
        await swarm.happened(lambda _: len(plans()) == 1)
        await swarm.crash(node)
        for peer in swarm.peers.values():
            await swarm.crash(peer)

    async def after() -> None:
        node = await swarm.start_coordinator()
        for name in (*NAMES, "late"):
            await swarm.start_peer(name, IntegerLearner(VALUES))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await node.leave()

    run(before)
    assert swarm.service is not None
    secret = swarm.service.state.terms.secret
    write_whole(swarm.coordinator_home / KEY_FILE, coordinator.to_bytes())
    height = ChainFile.open(swarm.coordinator_home).chain.height
    commands.hand_over(swarm.coordinator_home, run_key)
    swarm.coordinator_identity = identity(swarm.coordinator_home / KEY_FILE)
    swarm.successions = ChainFile.open(swarm.coordinator_home).chain.successions
    swarm._news = asyncio.Condition()
    run(after)
    chains = [ChainFile.open(swarm.peer_home(name)).chain for name in (*NAMES, "late")]
    assert {(chain.height, chain.coordinator) for chain in chains} == {(4, swarm.coordinator_identity.peer_id)}
    assert len({chain.entries[-1].manifest.digest for chain in chains}) == 1
    signers = [entry.manifest.signer for entry in chains[0].entries]
    assert signers == [coordinator.peer_id] * (height + 1) + [swarm.coordinator_identity.peer_id] * (4 - height)
    assert chains[0].entries[2].plan is not None
    assert [chains[0].entries[2].plan.digest] == plans(), "the attempt was finished, not made again"
    assert any(isinstance(event, AuditReported) for event in swarm.events)
    assert swarm.service.state.terms.secret == secret, "the draws of audits have to be the same at each start"
    for peer in swarm.peers.values():
        assert "SignatureError" not in peer.transport.rejected, "each version is told under its own signer's name"
    assert_invariants(swarm)


def test_a_proof_of_a_fault_under_the_new_coordinator_names_its_succession(monkeypatch: pytest.MonkeyPatch) -> None:
    run_key, new = Identity.generate(), Identity.generate()
    monkeypatch.setattr(support.evidence, "signed_run", partial(signed_run, run_key=run_key))
    case = Evidence()
    succession = pb.Succession(number=1, coordinator=new.peer_id, first=1, parent=bytes(32))
    named = sign(run_key, case.run_id, succession)
    case.coordinator = new
    case.plan = case.make_plan([vector.root for vector in case.vectors])
    case.seal = case.make_seal()
    proof = case.wrong_span()
    with pytest.raises(WireError):
        judge(proof.SerializeToString(), case.run_id)
    proof.successions.append(named)
    assert [peer for peer, _ in judge(proof.SerializeToString(), case.run_id)] == [case.peer(0)]
    proof.successions[0].CopyFrom(sign(new, case.run_id, succession))
    with pytest.raises(WireError):
        judge(proof.SerializeToString(), case.run_id)
