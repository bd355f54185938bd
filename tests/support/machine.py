"""The coordinator's state machine with a hand-turned clock, and peers that say what they are told to say."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from google.protobuf.message import Message

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.reports import Verdict, judge
from hivegrpo.coordinator.snapshots import read_snapshot, take_snapshot
from hivegrpo.coordinator.state import State, Terms
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, digest_of, run_id_of, sign, sign_payload
from hivegrpo.protocol.identity import Identity

VALUES = 40_000
"""Three chunks."""


def make_config(**sections: dict[str, Any]) -> RunConfig:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "versions": 3, "start_peers": 3},
        "model": {"path": "starter"},
        "dataset": {"path": "rows.jsonl"},
        "rewards": {"functions": ["exact"]},
        "grpo": {"num_generations": 4, "prompts_per_round": 10, "max_completion_length": 8, "loss_type": "dapo"},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        "averaging": {"audit_rate": 0.0},
        "timing": {"lease": 60.0, "exchange": 10.0, "step": 20.0, "grace": 5.0, "max_attempts": 3},
    }
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    return RunConfig.model_validate(tables)


class Machine:
    """A coordinator's state machine with a hand-turned clock, and peers that say what they are told to say."""

    def __init__(self, peers: int = 3, genesis: bytes = b"", **sections: dict[str, Any]) -> None:
        self.coordinator = Identity.generate()
        self.config = make_config(**sections)
        layout = [pb.Tensor(name="a", shape=[VALUES // 100, 100])]
        manifest = pb.RunManifest(
            protocol=PROTOCOL,
            coordinator=self.coordinator.peer_id,
            config=self.config.canonical_json(),
            layout=layout,
            digests={"known_answer": b"k" * 32, "genesis": genesis},
        )
        payload = manifest.SerializeToString(deterministic=True)
        self.run_id = run_id_of(payload)
        self.run = sign_payload(self.coordinator, self.run_id, "RunManifest", payload)
        self.terms = Terms.of(self.run, self.config)
        self.state = State(self.terms)
        self.events: list[ev.Event] = []
        self.now = 1000.0
        self.identities = {key.peer_id: key for key in (Identity.generate() for _ in range(peers))}
        self.peers = sorted(self.identities)

    def happen(self, *events: ev.Event) -> None:
        """Take events, then let everything happen that is due."""
        for event in events:
            self._take(event)
        for _ in range(100):
            decision = decide(self.state, self.now)
            if not decision.events:
                assert decision.wake is None or decision.wake > self.now, "it would be asked again at once, for ever"
                return
            for event in decision.events:
                self._take(event)
        raise AssertionError("it never settles")

    def _take(self, event: ev.Event) -> None:
        self.events.append(event)
        apply(self.state, event)

    def wait(self, seconds: float) -> None:
        """Turn the clock, stopping wherever the machine asked to be woken."""
        until = self.now + seconds
        while (wake := decide(self.state, self.now).wake) is not None and wake <= until:
            self.now = wake
            self.happen()
        self.now = until
        self.happen()

    def join(self, *peers: str, dialable: bool = True) -> None:
        for peer in peers:
            addresses = (f"/ip4/10.0.0.1/tcp/1/p2p/{peer}",) if dialable else ()
            self.happen(ev.PeerJoined(self.now, peer, addresses, "test"))

    def lose(self, *peers: str) -> None:
        for peer in peers:
            self.happen(ev.PeerDisconnected(self.now, peer))

    def report(self, peer: str, message: Message) -> Verdict:
        verdict = judge(self.state, sign(self.identities[peer], self.run_id, message), peer, self.run_id, self.now)
        self.happen(*verdict.events)
        return verdict

    def ready(self, *peers: str, version: int = 0, root: bytes = b"0" * 32) -> None:
        for peer in peers:
            assert self.report(peer, pb.Ready(version=version, state_root=root)).accepted

    def lease(self, peer: str) -> pb.Lease:
        lease = self.state.members[peer].lease
        assert lease is not None, "this peer has no lease"
        return self.state.leases[lease].message

    def contribution(self, peer: str, dropped: Sequence[int] = (), returned: Sequence[int] = ()) -> pb.Contribution:
        lease = self.lease(peer)
        used = [offset for offset in range(lease.count) if offset not in {*dropped, *returned}]
        return pb.Contribution(
            lease=lease.id,
            version=lease.version,
            iteration=lease.iteration,
            used=used,
            dropped=dropped,
            returned=returned,
            weight=10 * len(used),
            root=digest_of(f"{peer} {lease.id}".encode()),
            metrics={"reward": float(len(used)), "num_tokens": 10.0 * len(used)},
        )

    def contribute(self, *peers: str) -> None:
        for peer in peers:
            assert self.report(peer, self.contribution(peer)).accepted

    @property
    def plan(self) -> pb.RoundPlan:
        assert self.state.round.attempt is not None, "there is no plan"
        return self.state.round.attempt.plan

    @property
    def seal(self) -> pb.Seal:
        assert self.state.round.attempt is not None
        assert self.state.round.attempt.seal is not None, "there is no seal"
        return self.state.round.attempt.seal

    def senders(self, peer: str, *complete: str) -> Verdict:
        assert self.state.round.attempt is not None
        report = pb.SenderReport(
            plan=self.state.round.attempt.digest, complete=[pb.Complete(peer=sender) for sender in complete]
        )
        return self.report(peer, report)

    def exchange(self, *silent: str) -> None:
        """Every reducer but the silent reports all senders."""
        roster = [contributor.peer for contributor in self.plan.contributors]
        for reducer in list(self.plan.reducers):
            if reducer.peer not in silent:
                self.senders(reducer.peer, *roster)

    def step_report(self, root: bytes | None = None) -> pb.StepReport:
        attempt = self.state.round.attempt
        assert attempt is not None
        return pb.StepReport(
            version=self.plan.version,
            plan=attempt.digest,
            seal=attempt.seal_digest,
            spans=[pb.Blob(root=bytes([index]) * 32, size=9) for index in range(len(self.plan.reducers))],
            state_root=root or bytes([self.plan.version]) * 32,
            receipts=[bytes(64)] * len(self.plan.reducers),
        )

    def vote(self, *peers: str, root: bytes | None = None) -> None:
        report = self.step_report(root)
        for peer in peers:
            assert self.report(peer, report).accepted

    def start(self) -> None:
        """To the leases of version 0."""
        self.join(*self.peers)
        self.ready(*self.peers)

    def round(self) -> None:
        """A whole round, without trouble, from leases to commit."""
        self.contribute(*self.peers)
        self.exchange()
        self.vote(*self.peers)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def manifest(self) -> pb.VersionManifest:
        assert self.state.head is not None
        return self.state.head.manifest

    def replayed(self, snapshot_at: int | None = None) -> State:
        """The state that a restart would make of the events, or of a snapshot after some of them and of the others."""
        state = State(self.terms)
        for sequence, event in enumerate(self.events):
            if sequence == snapshot_at:
                state = read_snapshot(take_snapshot(state, sequence), self.terms)
            apply(state, event)
        return state

    def check_replay(self, cuts: int = 4) -> None:
        """A restart has to remember the same, to the order of things; from so many snapshots, too."""
        assert canonical(self.replayed()) == canonical(self.state)
        for cut in range(cuts):
            at = (cut + 1) * len(self.events) // (cuts + 1)
            assert canonical(self.replayed(at)) == canonical(self.state), f"from a snapshot after {at} events"

    def accounted(self) -> list[int]:
        """Every position below the cursor, wherever the book has it; each should be there once."""
        held = self.state.round.contributions.values()
        places: list[int] = [position for run in self.state.positions.returned for position in run]
        places += [p for lease in self.state.leases.values() for p in run_of(lease.message)]
        places += [p for lease in self.state.ahead.leases.values() for p in run_of(lease.message)]
        places += [item.lease.start + offset for item in held for offset in item.message.used]
        return sorted(places)


def run_of(lease: pb.Lease) -> range:
    return range(lease.start, lease.start + lease.count)


def canonical(value: object) -> Any:
    """A dump that two equal states share, order of insertion included."""
    if isinstance(value, Message):
        return value.SerializeToString(deterministic=True)
    if isinstance(value, dict):
        return [(canonical(key), canonical(item)) for key, item in value.items()]
    if isinstance(value, (frozenset, set)):
        return sorted(map(canonical, value))
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if is_dataclass(value):
        return {field.name: canonical(getattr(value, field.name)) for field in fields(value)}
    return value
