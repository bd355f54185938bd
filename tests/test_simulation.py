"""The simulation: the same seed does the same, no seed breaks an invariant, and a broken coordinator is found out."""

import ast
import json
import subprocess
import sys
import time
from copy import copy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import typer
from support.machine import canonical

from hivegrpo.cli import simulate
from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.positions import Positions
from hivegrpo.coordinator.simulation.faults import MODERATE, Faults
from hivegrpo.coordinator.simulation.outcome import Outcome
from hivegrpo.coordinator.simulation.sequencer import Answer, Sequencer, Session, Told
from hivegrpo.coordinator.simulation.setting import Setting, config_for
from hivegrpo.coordinator.simulation.stubs import GENESIS_ROOT, proof_against
from hivegrpo.coordinator.simulation.world import World, _absorb
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.invariants import Violation

SIMULATION = Path(__file__).parents[1] / "coordinator" / "simulation"


def setting_of(
    peers: int = 12, rounds: int = 8, seed: int = 1, faults: str = "all", **sections: dict[str, Any]
) -> Setting:
    config = config_for(peers, rounds)
    tables = config.model_dump(exclude_unset=True)
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    return Setting(RunConfig.model_validate(tables), peers, seed, Faults.parse(faults))


def outcome_of(**what: Any) -> Outcome:
    return World(setting_of(**what)).run()


# Replay.


def in_a_process(hash_seed: str, *options: str) -> dict[str, Any]:
    """By the command, where strings hash otherwise: no set's order may matter."""
    code = (
        "import sys\nfrom hivegrpo.cli.main import main\nsys.argv = ['hivegrpo', 'simulate', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n"
        "    assert not {'torch', 'hivemind'} & set(sys.modules), 'it needs neither'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--peers", "12", "--rounds", "6", "--faults", "all", "--json", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_one_seed_gives_one_history() -> None:
    first, again, other = (
        in_a_process(hash_seed, "--seed", seed) for hash_seed, seed in (("1", "5"), ("2", "5"), ("1", "6"))
    )
    assert first.pop("cpu_seconds") > 0.0
    again.pop("cpu_seconds")
    assert first == again
    assert first["digest"] != other["digest"]


@pytest.mark.parametrize("path", sorted(SIMULATION.glob("*.py")), ids=lambda path: str(path.name))
def test_nothing_in_it_knows_the_time_or_draws_elsewhere(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            assert names == ["Random"], "a generator of one's own, never the global one"
        elif isinstance(node, ast.Import):
            assert not {"random", "time", "datetime", "threading", "asyncio", "secrets", "os", "uuid"} & set(names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in ("time", "datetime", "threading", "asyncio", "secrets", "os", "uuid")


def test_a_restart_makes_the_same_state_of_the_history() -> None:
    world = World(setting_of(faults="churn,loss,crashes,coordinator=0.5,liars"))
    assert world.run().restarts > 0
    assert world.sequencer.snapshot is None
    assert canonical(replayed(world)) == canonical(world.sequencer.state)


class Snapping(Sequencer):
    """Keeps a snapshot every few events, and counts the starts from one."""

    snapshot_every = 20

    def __init__(self, *terms: Any, **rest: Any) -> None:
        super().__init__(*terms, **rest)
        self.shortened = 0

    def start(self) -> None:
        self.shortened += self.snapshot is not None
        super().start()


@pytest.mark.parametrize("seed", range(4))
def test_starts_from_snapshots_and_from_the_history_come_to_the_same(seed: int) -> None:
    setting = setting_of(faults="churn,loss,crashes,coordinator=0.7,liars", seed=seed)
    plain, world = World(setting).run(), World(setting, sequencer=Snapping)
    assert world.run() == plain
    assert isinstance(world.sequencer, Snapping)
    assert world.sequencer.shortened > 0
    assert canonical(replayed(world)) == canonical(world.sequencer.state)


def test_a_crash_takes_the_snapshot_of_what_was_not_on_disk() -> None:
    world = World(setting_of(), sequencer=Snapping)
    sequencer = world.sequencer
    sequencer.start()
    for _ in range(Snapping.snapshot_every):
        assert sequencer.join(world._new_peer(), (-1, b""))
    assert len(sequencer.unwritten) > Snapping.snapshot_every
    sequencer.crash()
    sequencer.start()
    world.scheduler.run(1000)
    assert sequencer.history
    assert sequencer.snapshot is None


def replayed(world: World) -> State:
    """The state by all events, from the first one on."""
    state = State(world.sequencer.state.terms)
    for event in (*world.sequencer.history, *world.sequencer.unwritten):
        apply(state, event)
    return state


# No seed breaks an invariant: bounded versions of `make bench-simulate`.


@pytest.mark.parametrize("seed", range(20))
def test_no_seed_breaks_an_invariant(seed: int) -> None:
    outcome = outcome_of(peers=30, rounds=8, seed=seed)
    assert (outcome.versions, outcome.violations) == (8, ())


@pytest.mark.parametrize(
    "sections",
    [
        {"averaging": {"overlap": True}},
        {"grpo": {"num_iterations": 3, "prompts_per_round": 48}},
        {"grpo": {"dynamic_sampling_factor": 1.5, "prompts_per_round": 48}},
        {"averaging": {"rule": "mean", "audit_rate": 1.0}},
    ],
    ids=["overlap", "iterations", "dynamic sampling", "audits"],
)
def test_no_mode_breaks_an_invariant(sections: dict[str, Any]) -> None:
    for seed in range(3):
        outcome = outcome_of(rounds=10, seed=seed, **sections)
        assert (outcome.versions, outcome.violations) == (10, ())


def test_a_large_swarm_under_churn_and_loss() -> None:
    outcome = outcome_of(peers=200, rounds=10, faults="churn=0.2,loss=0.05")
    assert (outcome.versions, outcome.violations) == (10, ())
    assert 200 + 8 * 20 <= outcome.peers <= 200 + 12 * 20, "about a tenth of 200 joined in each round"


def test_churn_leaves_the_swarm_as_large_as_it_was() -> None:
    """Half of a round's share goes, as many come; a peer that is on its way out is not drawn again."""
    world = World(setting_of(peers=60, rounds=40, seed=3, faults="churn=0.4"))
    assert world.run().violations == ()
    here = [peer for peer in world._present if not peer.gone]
    assert len(world.names) > 60 + 40 * 60 * 0.4 / 2 / 2
    assert 54 <= len(here) <= 66


# Every fault shows.


def test_without_faults_nothing_goes_wrong() -> None:
    outcome = outcome_of(faults="none")
    troubles = (outcome.expired, outcome.rejected, outcome.failed, outcome.refused)
    assert not any(sum(trouble.values()) for trouble in troubles)
    assert outcome.events["PeerJoined"] == outcome.peers == 12


@pytest.mark.parametrize(
    ("faults", "event"),
    [
        ("churn=0.5", "PeerLeft"),
        ("crashes=0.5", "PeerDisconnected"),
        ("loss=0.1", "PeerDisconnected"),
        ("partitions=1", "PeerDisconnected"),
        ("slow=0.5", "LeaseExpired"),
        ("liars=0.3", "AttemptFailed"),
    ],
)
def test_every_fault_shows(faults: str, event: str) -> None:
    outcome = outcome_of(faults=faults, rounds=12, timing={"lease": 60.0})
    assert outcome.events[event] > 0
    assert (outcome.versions, outcome.violations) == (12, ())


def test_liars_are_refused_for_each_reason() -> None:
    outcomes = [outcome_of(faults="liars=0.3", rounds=40, seed=seed) for seed in range(3, 7)]
    refused = {reason for outcome in outcomes for reason in outcome.refused}
    assert {"SignatureError", "FrameError", "invalid", "stale", "refused"} <= refused
    assert any(outcome.events.get("PeerBanned") for outcome in outcomes)


def test_a_crash_takes_what_was_not_on_disk() -> None:
    outcome = outcome_of(faults="coordinator=1")
    assert outcome.restarts >= 4
    assert outcome.events["CoordinatorStarted"] == 1 + outcome.restarts


def test_rounds_with_mixed_speeds_get_shorter() -> None:
    """The first lease is an even share; then shares follow the speeds that were seen."""
    outcomes = [outcome_of(peers=30, rounds=10, faults="none", seed=seed) for seed in range(3)]
    first = fmean(outcome.rounds[0] for outcome in outcomes)
    later = fmean(fmean(outcome.rounds[5:]) for outcome in outcomes)
    assert later < 0.6 * first


# A coordinator that breaks its promises is found out.


class Hasty(Sequencer):
    """Answers before what follows is on disk, and takes its time with that."""

    write_seconds = 3.0

    def report(self, signed: pb.Signed, peer: str, answer: Answer) -> None:
        if self.up:
            answer(True, "")
        super().report(signed, peer, lambda *_: None)


class Forgetful(Sequencer):
    """Comes back from an older history than it had."""

    def start(self) -> None:
        del self.history[-40:]
        super().start()


class Repeating(Sequencer):
    """Leases again what it has leased."""

    def join(self, peer: Any, head: tuple[int, bytes]) -> Session | None:
        if self.state.version > 2:
            self.state.positions = Positions()
        return super().join(peer, head)


class Unjust(Sequencer):
    """Bans whoever joins late, for nothing."""

    def join(self, peer: Any, head: tuple[int, bytes]) -> Session | None:
        session = super().join(peer, head)
        if self.state.version > 2:
            self.ban(peer.name, "no reason", proof_against("somebody else"))
        return session


class Tired(Sequencer):
    """Tells of no more plans once it has made some."""

    def _send_frame(self, session: Session, told: Told) -> None:
        if told.type != "RoundPlan" or self.state.version < 7:
            super()._send_frame(session, told)


@pytest.mark.parametrize(
    ("sequencer", "faults", "invariant"),
    [
        (Hasty, "coordinator=1", 2),
        (Forgetful, "coordinator=1", 4),
        (Repeating, "churn", 3),
        (Unjust, "churn", 6),
        (Tired, "churn", 7),
    ],
)
def test_a_broken_coordinator_is_found_out(sequencer: type[Sequencer], faults: str, invariant: int) -> None:
    found: set[int] = set()
    for seed in range(5):
        outcome = World(setting_of(faults=faults, seed=seed), sequencer=sequencer).run()
        found |= {violation.invariant for violation in outcome.violations}
    assert invariant in found


def test_a_peer_that_holds_another_state_is_found_out() -> None:
    class Drifting(World):
        def root_of(self, version: int) -> bytes:
            return GENESIS_ROOT if version == 5 else super().root_of(version)

    assert 1 in {violation.invariant for violation in Drifting(setting_of(faults="none")).run().violations}


# The command.


def test_faults_are_read_as_they_are_written() -> None:
    assert Faults.parse("none") == Faults.parse("") == Faults()
    assert Faults.parse("all") == Faults(**MODERATE)
    assert Faults.parse("churn = 0.2, loss") == Faults(churn=0.2, loss=MODERATE["loss"])
    for faults in (Faults(), Faults.parse("all"), Faults(liars=0.1 + 0.2)):
        assert Faults.parse(str(faults)) == faults


@pytest.mark.parametrize("text", ["chrn=0.2", "churn=2", "churn=-0.1", "loss=nan", "loss=lots"])
def test_faults_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Faults.parse(text)


NUMBERS = {"peers": 5, "rounds": 2, "values": 100_000, "speed": 0.5, "upload_mbit": 20.0}


def test_a_broken_invariant_ends_with_the_command_that_shows_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(World):
        def run(self) -> Outcome:
            self._found.append(Violation(3, "planted"))
            return super().run()

    monkeypatch.setattr(simulate, "World", Broken)
    with pytest.raises(typer.Exit) as ended:
        simulate.run_simulation(NUMBERS, seed=None, faults="loss", config=None, as_json=False)
    told = capsys.readouterr()
    assert ended.value.exit_code == 1
    assert "VIOLATION       invariant 3: planted" in told.out
    assert "hivegrpo simulate --peers 5 --rounds 2 --values 100000 --speed 0.5 --upload-mbit 20.0 --seed " in told.err
    assert told.err.rstrip().endswith("--faults loss=0.05")


def test_an_error_of_the_coordinator_ends_with_that_command_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(World):
        def run(self) -> Outcome:
            raise AssertionError("planted")

    monkeypatch.setattr(simulate, "World", Failing)
    with pytest.raises(AssertionError, match="planted"):
        simulate.run_simulation(NUMBERS, seed=9, faults="none", config=None, as_json=False)
    assert "--seed 9 --faults none" in capsys.readouterr().err


def test_what_the_coordinator_waited_is_no_cpu_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Idle(World):
        def run(self) -> Outcome:
            time.sleep(1.0)
            return replace(super().run(), cpu_seconds=1.0)

    monkeypatch.setattr(simulate, "World", Idle)
    simulate.run_simulation(NUMBERS, seed=1, faults="none", config=None, as_json=True)
    assert json.loads(capsys.readouterr().out)["cpu_seconds"] < 0.5


def test_a_run_toml_gives_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(
        '[run]\nname = "mine"\nversions = 9\n[model]\npath = "m"\n[dataset]\npath = "rows.jsonl"\n'
        '[rewards]\nfunctions = ["exact"]\n[grpo]\nprompts_per_round = 50\n[timing]\nlease = 30.0\n'
    )
    simulate.run_simulation(NUMBERS, seed=1, faults="none", config=toml, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["versions"] == 2
    assert told["command"].endswith(f"--config {toml}")
    assert "no contribution within" in told["expired"], "of 10 groups, a peer that is slow does not do 15 in 30 s"


def test_events_that_nobody_checks_are_in_the_digest() -> None:
    world = World(setting_of(faults="none", rounds=2))
    before = world.run().digest
    world._note([ev.PeerProbed(0.0, "somebody", True)])
    assert world._outcome().digest != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ev.PlanMade(1.0, b"ab"), ev.PlanMade(1.0, b"ac")),
        (ev.PlanMade(1.0, b"ab"), ev.PlanMade(1.0, b"abc")),
        (ev.PlanMade(1.0, b"ab"), ev.PlanMade(2.0, b"ab")),
        (ev.PlanMade(1.0, b"ab"), ev.SealMade(1.0, b"ab")),
        (ev.CoordinatorStarted(1.0), ev.CoordinatorStarted(2.0)),
        (ev.PeerLeft(1.0, "somebody", "tired"), ev.PeerLeft(1.0, "somebody", "bored")),
        (ev.PeerReady(1.0, "somebody", 3, bytes(32)), ev.PeerReady(1.0, "somebody", 3, bytes(31) + b"x")),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_that_differ_differ_in_the_digest(one: ev.Event, other: ev.Event) -> None:
    def digest(*events: ev.Event) -> bytes:
        taken = sha256()
        _absorb(taken, events)
        return taken.digest()

    assert digest(one) != digest(other)
    assert digest(one, other) != digest(other, one)
    assert digest(one) == digest(copy(one))


def test_what_one_event_holds_is_not_taken_for_another_event() -> None:
    class Taken(bytearray):
        def update(self, data: bytes, /) -> None:
            self.extend(data)

    def taken(*events: ev.Event) -> bytes:
        told = Taken()
        _absorb(told, events)
        return bytes(told)

    second = ev.PlanMade(2.0, b"b")
    assert taken(ev.PlanMade(1.0, b"a"), second) != taken(ev.PlanMade(1.0, b"a" + taken(second)))
