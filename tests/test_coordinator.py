"""The coordinator's state machine, driven by reports and a clock of its own: no network, no disk."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.admission import check_head, refusal
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.log import EventLog
from hivegrpo.coordinator.planning import merge_metrics
from hivegrpo.coordinator.positions import Positions
from hivegrpo.coordinator.reports import Verdict, judge
from hivegrpo.coordinator.round import Held
from hivegrpo.coordinator.schedule import learning_rate
from hivegrpo.coordinator.state import Phase, State, Terms, apply
from hivegrpo.coordinator.status import Pulse, snapshot
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.checks import check_manifest, check_plan, check_seal
from hivegrpo.protocol.config import AdmissionSection, OptimizerSection, RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, digest_of, run_id_of, sign, sign_payload
from hivegrpo.protocol.errors import ChainError, FrameError, SignatureError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import StepScalars, fp32_from_bits

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
        "timing": {"lease": 60.0, "exchange": 10.0, "step": 20.0, "grace": 5.0, "max_attempts": 3},
    }
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    return RunConfig.model_validate(tables)


class Machine:
    """A coordinator's state machine with a hand-turned clock, and peers that say what they are told to say."""

    def __init__(self, peers: int = 3, **sections: dict[str, Any]) -> None:
        self.coordinator = Identity.generate()
        self.config = make_config(**sections)
        layout = [pb.Tensor(name="a", shape=[VALUES // 100, 100])]
        manifest = pb.RunManifest(
            protocol=PROTOCOL,
            coordinator=self.coordinator.peer_id,
            config=self.config.canonical_json(),
            layout=layout,
            digests={"known_answer": b"k" * 32},
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

    def replayed(self) -> State:
        """The state that a restart would make of the events."""
        state = State(self.terms)
        for event in self.events:
            apply(state, event)
        return state

    def accounted(self) -> list[int]:
        """Every position below the cursor, wherever the book has it; each should be there once."""
        held = self.state.round.contributions.values()
        places: list[int] = [position for run in self.state.positions.returned for position in run]
        places += [p for lease in self.state.leases.values() for p in run_of(lease.message)]
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


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    assert canonical(machine.replayed()) == canonical(machine.state), "a restart would not remember the same"


def test_a_round_from_genesis_to_commit(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    assert machine.manifest.version == 0
    assert machine.manifest.parent == bytes.fromhex(machine.run_id)
    assert machine.manifest.state == pb.Blob(root=b"0" * 32, size=12 * VALUES + 8)
    check_manifest(machine.manifest)
    # 10 positions over 3 peers: 4, then an even share of the 6 that are left.
    assert [len(run_of(machine.lease(peer))) for peer in machine.state.round.served] == [4, 3, 3]
    assert sorted(p for peer in machine.peers for p in run_of(machine.lease(peer))) == list(range(10))
    assert machine.lease(a).max_weight == machine.lease(a).count * 4 * 8

    genesis = machine.state.head
    machine.contribute(*machine.peers)
    plan = machine.plan
    check_plan(plan)
    assert (plan.version, plan.attempt, plan.parent) == (1, 1, genesis.digest if genesis else b"")
    assert [contributor.peer for contributor in plan.contributors] == machine.peers
    assert [(reducer.first, reducer.chunks) for reducer in plan.reducers] == [(0, 1), (1, 1), (2, 1)]
    expected = StepScalars.for_step(1, learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    assert list(plan.scalars) == expected.to_bits()

    machine.exchange()
    check_seal(machine.seal, plan)
    shares = [fp32_from_bits(sealed.coefficient) for sealed in machine.seal.contributors]
    weights = [contributor.weight for contributor in plan.contributors]
    assert shares == pytest.approx([weight / 100 for weight in weights], rel=1e-7)  # 100 = 10 positions of weight 10

    machine.vote(a, b)
    assert machine.state.version == 0, "it gives the third vote half a second"
    machine.vote(c)
    assert machine.manifest.version == 1
    assert machine.manifest.state.root == bytes([1]) * 32
    assert machine.manifest.contributors == plan.contributors
    assert machine.manifest.metrics["num_tokens"] == 100.0
    # Means by weight: groups of 4, 3 and 3 with weights of ten times that.
    assert machine.manifest.metrics["reward"] == pytest.approx((4 * 40 + 3 * 30 + 3 * 30) / 100)
    assert [machine.lease(peer).version for peer in machine.peers] == [1, 1, 1], "voters are leased again at once"


def test_a_run_ends_after_its_last_version(machine: Machine) -> None:
    machine.start()
    for _ in range(3):
        machine.round()
    assert machine.state.phase is Phase.FINISHED
    assert machine.manifest.version == 3
    assert machine.state.leases == {}
    assert decide(machine.state, machine.now + 1e6).events == ()
    assert [member.contributed for member in machine.state.members.values()] == [3, 3, 3]


def test_genesis_waits_for_enough_peers_that_agree() -> None:
    machine = Machine(peers=4, run={"start_peers": 3})
    a, b, c, d = machine.peers
    machine.join(a, b, c, d)
    machine.ready(a, b)
    assert machine.state.phase is Phase.GENESIS, "two of the three it waits for"
    machine.ready(c, root=b"x" * 32)
    assert machine.manifest.state.root == b"0" * 32, "two of three agree"
    assert machine.state.idle == {}
    assert set(machine.state.round.served) == {a, b}, "a peer with another root gets no work"
    answer = machine.report(c, pb.Ready(version=0, state_root=b"x" * 32))
    assert not answer.accepted
    assert answer.reason.startswith("invalid")


def test_genesis_does_not_settle_a_tie() -> None:
    machine = Machine(peers=3)
    machine.join(*machine.peers)
    for index, peer in enumerate(machine.peers):
        machine.ready(peer, root=bytes([index]) * 32)
    machine.wait(3600)
    assert machine.state.head is None
    assert snapshot(machine.state, {}, machine.now)["trouble"] == "the peers report 3 different states for version 0"


def test_an_expired_lease_is_leased_again(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    before = {peer: run_of(machine.lease(peer)) for peer in machine.peers}
    assert machine.report(a, machine.contribution(a, returned=range(machine.lease(a).count))).accepted
    late = machine.contribution(b)
    machine.wait(59.9)
    assert len(machine.of(ev.LeaseExpired)) == 0
    machine.wait(0.1)
    assert {event.lease for event in machine.of(ev.LeaseExpired)} == {2, 3}
    assert set(run_of(machine.lease(b))) | set(run_of(machine.lease(c))) == set(range(10)), "a's come back, too"
    assert machine.accounted() == sorted(p for run in before.values() for p in run)
    answer = machine.report(b, late)
    assert (answer.accepted, answer.reason) == (False, "stale: lease 2 expired")


def test_a_lost_peer_keeps_its_lease_for_the_grace(machine: Machine) -> None:
    a, b, _ = machine.peers
    machine.start()
    machine.lose(a)
    machine.wait(4.9)
    machine.join(a)
    machine.wait(10)
    assert machine.of(ev.LeaseExpired) == []
    machine.lose(a)
    machine.wait(5)
    assert [event.reason for event in machine.of(ev.LeaseExpired)] == ["its peer was lost"]
    machine.happen(ev.PeerDisconnected(machine.now, b), ev.PeerLeft(machine.now, b, "enough for today"))
    assert machine.of(ev.LeaseExpired)[1].reason == "its peer left"


def test_every_position_is_in_one_place_over_epochs(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.report(a, machine.contribution(a, dropped=[0], returned=[1, 3]))
    machine.contribute(b, c)
    used = {p for h in machine.state.round.contributions.values() for p in (h.lease.start + o for o in h.message.used)}
    assert used == {2, *range(4, 10)}
    assert machine.state.positions.returned == [range(1, 2), range(3, 4)]
    machine.exchange()
    machine.vote(*machine.peers)
    leased = sorted(p for peer in machine.peers for p in run_of(machine.lease(peer)))
    # The two returned ones are less than half of what a peer is to have; they wait, and the cursor goes on.
    assert leased == list(range(10, 20))
    assert machine.state.positions == Positions(cursor=20, returned=[range(1, 2), range(3, 4)])


def test_positions_are_picked_taken_and_merged() -> None:
    book = Positions()
    book.take(book.pick(10))
    assert (book.cursor, book.returned) == (10, [])
    book.give_back([2, 3, 7])
    book.give_back(range(4, 6))
    assert book.returned == [range(2, 6), range(7, 8)]
    assert book.pick(3) == range(2, 5), "the first that is long enough"
    assert book.pick(8) == range(2, 6), "half of what is wanted is taken"
    assert book.pick(9) == range(10, 19), "less than that is left for smaller requests"
    book.take(range(3, 5))
    assert book.returned == [range(2, 3), range(5, 6), range(7, 8)]
    book.give_back(range(3, 5))
    book.give_back([6])
    assert book.returned == [range(2, 8)]


def test_the_plan_is_made_at_the_deadline_with_what_there_is(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a)
    machine.wait(59.9)
    assert machine.state.phase is Phase.ROLLOUT
    machine.wait(0.1)
    assert [contributor.peer for contributor in machine.plan.contributors] == [a]
    assert {event.lease for event in machine.of(ev.LeaseExpired)} == {2, 3}
    assert not machine.report(b, pb.Contribution(lease=2, used=range(3), weight=1, root=b"r" * 32)).accepted
    assert machine.state.members[c].lease is None, "no new leases while the round is averaged"


def test_a_contributor_that_is_away_is_waited_for_and_then_left_out(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a)
    machine.lose(a)
    machine.wait(1)
    machine.contribute(b, c)
    assert machine.state.phase is Phase.PLAN
    machine.wait(3.9)
    machine.join(a)
    assert len(machine.plan.contributors) == 3, "it came back within the grace"
    machine.exchange()
    machine.vote(a, b, c)
    machine.contribute(a, b)
    machine.lose(b)
    machine.wait(5)
    machine.contribute(c)
    assert [contributor.peer for contributor in machine.plan.contributors] == sorted([a, c])
    assert [(event.peer, event.reason) for event in machine.of(ev.ContributionRejected)] == [(b, "peer lost")]


def test_a_lost_reducer_leads_to_an_attempt_of_the_survivors(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    first = machine.plan
    machine.exchange(c)
    machine.lose(c)
    machine.wait(4.9)
    assert machine.plan is first
    machine.wait(0.1)
    second = machine.plan
    check_plan(second)
    assert (second.version, second.attempt) == (1, 2)
    assert list(second.contributors) == list(first.contributors)[:2], "the same contributions, without the lost one"
    assert [reducer.peer for reducer in second.reducers] == [a, b]
    assert [event.peer for event in machine.of(ev.ContributionRejected)] == [c]
    machine.exchange()
    machine.vote(a, b)
    assert [contributor.peer for contributor in machine.manifest.contributors] == [a, b]
    assert machine.state.trouble == ""


def test_a_reducer_that_does_not_report_in_time_is_left_out(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange(b)
    machine.wait(12)
    assert machine.plan.attempt == 2
    assert [contributor.peer for contributor in machine.plan.contributors] == [a, c]
    (rejected,) = machine.of(ev.ContributionRejected)
    assert (rejected.peer, rejected.reason) == (b, "as a reducer, it did not report in time")


def test_a_contributor_incomplete_at_one_reducer_does_not_count(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.senders(a, a, b, c)
    machine.senders(b, a, b)
    assert machine.state.phase is Phase.EXCHANGE
    machine.senders(c, c, b, a)
    check_seal(machine.seal, machine.plan)
    assert [sealed.peer for sealed in machine.seal.contributors] == [a, b]
    weights = [contributor.weight for contributor in machine.plan.contributors][:2]
    assert fp32_from_bits(machine.seal.contributors[0].coefficient) == pytest.approx(
        weights[0] / sum(weights), rel=1e-7
    )
    assert machine.of(ev.ContributionRejected) == [], "another attempt could still have it"
    positions = machine.accounted()
    machine.vote(a, b, c)
    assert [contributor.peer for contributor in machine.manifest.contributors] == [a, b]
    (rejected,) = machine.of(ev.ContributionRejected)
    assert (rejected.peer, rejected.reason) == (c, f"incomplete at reducer {b}")
    again = {p for peer in machine.peers for p in run_of(machine.lease(peer))}
    assert again | {p for run in machine.state.positions.returned for p in run} > set(positions[-3:])


def test_without_a_common_sender_there_is_a_new_attempt(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    for peer in machine.peers:
        machine.senders(peer, peer)
    assert machine.plan.attempt == 2
    assert [contributor.peer for contributor in machine.plan.contributors] == [a, b, c]
    assert machine.state.trouble == "no contributor was complete at every reducer"


def test_votes_that_disagree_lead_to_a_new_attempt(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(a, root=b"x" * 32)
    machine.vote(b, root=b"y" * 32)
    assert machine.state.phase is Phase.STEP, "the third vote can still make a quorum"
    machine.vote(c, root=b"z" * 32)
    assert machine.plan.attempt == 2
    assert machine.state.trouble == "the votes disagree: 3 different results"


def test_a_quorum_waits_half_a_second_for_the_last_votes(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(a, b)
    last = machine.step_report(b"x" * 32)
    machine.wait(0.49)
    assert machine.state.version == 0
    machine.wait(0.01)
    assert machine.state.version == 1
    assert machine.state.members[c].lease is None
    assert machine.report(c, last).accepted, "a late vote is written down"
    assert machine.state.members[c].lease is None, "but its root is another one, so it does not hold the version"
    assert len(machine.of(ev.StepReported)) == 3


def test_a_late_vote_that_agrees_makes_a_peer_ready(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    vote = machine.step_report()
    machine.vote(a, b)
    machine.wait(0.5)
    assert machine.report(c, vote).accepted
    assert machine.lease(c).version == 1


def test_nobody_waits_for_the_votes_of_the_lost(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.lose(c)
    machine.vote(a, b)
    assert machine.state.version == 1


def test_a_reducer_lost_before_anyone_has_all_spans_is_not_waited_for(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.lose(c)
    machine.wait(5)
    assert [contributor.peer for contributor in machine.plan.contributors] == [a, b]


def test_too_few_survivors_for_a_quorum_lead_to_a_new_attempt(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(a)
    machine.lose(b, c)
    machine.wait(5)
    assert [contributor.peer for contributor in machine.plan.contributors] == [a]
    machine.exchange()
    machine.vote(a)
    assert machine.state.version == 1


def test_a_round_that_fails_every_attempt_is_abandoned_and_begun_again(machine: Machine) -> None:
    machine.start()
    positions = sorted(p for peer in machine.peers for p in run_of(machine.lease(peer)))
    machine.contribute(*machine.peers)
    for attempt in (1, 2, 3):
        assert machine.plan.attempt == attempt
        machine.exchange()
        machine.wait(22)  # the step's time and two seconds
    (abandoned,) = machine.of(ev.RoundAbandoned)
    assert abandoned.reason == "no version after 3 attempts; the last: 0 of 3 votes within the step's time"
    assert len(machine.of(ev.ContributionRejected)) == 3
    assert sorted(p for peer in machine.peers for p in run_of(machine.lease(peer))) == positions
    machine.contribute(*machine.peers)
    assert machine.plan.attempt == 4, "a number that fences the attempts before"
    machine.exchange()
    machine.vote(*machine.peers)
    assert machine.state.version == 1


def test_without_a_reducer_that_can_be_dialled_the_round_is_abandoned_after_the_grace(machine: Machine) -> None:
    machine.join(*machine.peers, dialable=False)
    machine.ready(*machine.peers)
    machine.contribute(*machine.peers)
    machine.wait(4.9)
    assert machine.state.phase is Phase.PLAN
    machine.wait(0.1)
    assert len(machine.of(ev.RoundAbandoned)) == 1
    assert machine.state.phase is Phase.ROLLOUT


def test_an_empty_round_is_begun_again_with_other_prompts(machine: Machine) -> None:
    machine.start()
    for _ in range(2):
        for peer in machine.peers:
            everything = range(machine.lease(peer).count)
            assert machine.report(peer, machine.contribution(peer, dropped=everything)).accepted
    assert machine.state.empty_rounds == 2
    assert machine.of(ev.PlanMade) == []
    assert sorted(p for peer in machine.peers for p in run_of(machine.lease(peer))) == list(range(20, 30))
    machine.round()
    assert machine.state.version == 1
    assert machine.state.empty_rounds == 0


def test_a_peer_without_anything_learnt_does_not_hold_up_the_others(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.report(a, machine.contribution(a, dropped=range(machine.lease(a).count)))
    machine.contribute(b, c)
    assert [contributor.peer for contributor in machine.plan.contributors] == [b, c]


def test_a_late_joiner_gets_what_is_left(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.join(a, b, c)
    machine.ready(a, b, c)
    late = Identity.generate()
    machine.identities[late.peer_id] = late
    machine.join(late.peer_id)
    machine.ready(late.peer_id)
    assert machine.state.members[late.peer_id].lease is None, "all is leased"
    machine.report(a, machine.contribution(a, returned=[0, 1]))
    assert list(run_of(machine.lease(late.peer_id))) == [machine.state.leases[4].message.start + o for o in (0, 1)]


def test_reports_are_idempotent(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()

    again: list[tuple[str, Message]] = [(a, pb.Ready(version=0, state_root=b"0" * 32))]
    again += [(peer, machine.contribution(peer)) for peer in machine.peers]
    for peer, message in again[1:]:
        assert machine.report(peer, message).accepted
    attempt = machine.state.round.attempt
    assert attempt is not None
    everyone = [pb.Complete(peer=peer) for peer in machine.peers]
    again += [(peer, pb.SenderReport(plan=attempt.digest, complete=everyone)) for peer in machine.peers]
    for peer, message in again[4:]:
        assert machine.report(peer, message).accepted
    again += [(peer, machine.step_report()) for peer in (a, b)]
    machine.vote(a, b)
    count = len(machine.events)
    for peer, message in again:
        assert machine.report(peer, message).accepted, message
    assert len(machine.events) == count
    other = machine.step_report(b"x" * 32)
    assert machine.report(a, other).reason == "refused: this peer's vote was another one"
    machine.vote(c)
    count = len(machine.events)
    assert machine.report(*again[1]).accepted, "it counted in the version that was just made"
    assert len(machine.events) == count


def test_reports_that_make_no_sense_are_refused_and_change_nothing(machine: Machine) -> None:
    a, b, _ = machine.peers
    machine.start()
    count = len(machine.events)
    mine = machine.contribution(a)
    assert machine.report(b, mine).reason == "invalid: lease 1 is not this peer's"
    mine.version = 7
    assert machine.report(a, mine).reason == "invalid: lease 1 is for version 0"
    greedy = machine.contribution(a)
    greedy.weight = machine.lease(a).max_weight + 1
    with pytest.raises(FrameError, match="above the lease's bound"):
        machine.report(a, greedy)
    twice = machine.contribution(a)
    twice.returned.append(0)
    with pytest.raises(FrameError, match="exactly once"):
        machine.report(a, twice)
    assert machine.report(a, pb.Contribution(lease=99)).reason == "invalid: lease 99 is not this peer's"
    assert machine.report(a, pb.SenderReport(plan=b"p" * 32)).reason.startswith("stale")
    assert machine.report(a, pb.StepReport(plan=b"p" * 32)).reason.startswith("stale")
    assert machine.report(a, pb.Ready(version=4, state_root=b"0" * 32)).reason.startswith("invalid")
    with pytest.raises(FrameError, match="unknown type"):
        machine.report(a, pb.Welcome())
    stranger = Identity.generate()
    machine.identities[stranger.peer_id] = stranger
    assert machine.report(stranger.peer_id, pb.Leave()).reason == "unknown: this peer has not joined"
    signed = sign(machine.identities[a], machine.run_id, pb.Leave())
    with pytest.raises(SignatureError, match="is signed by"):
        judge(machine.state, signed, b, machine.run_id, machine.now)
    assert len(machine.events) == count


def test_only_one_lease_of_a_version_measures_accuracy() -> None:
    machine = Machine(evaluation={"path": "held_out.jsonl", "every": 2})
    a, b, c = machine.peers
    machine.start()
    assert [lease.message.evaluate for lease in machine.state.leases.values()] == [True, False, False]
    first = machine.state.leases[1].message.peer
    machine.happen(ev.PeerLeft(machine.now, first, ""))
    machine.join(first)
    assert machine.lease(first).evaluate, "another lease measures when the first is lost"
    for peer in (a, b, c):
        contribution = machine.contribution(peer)
        if machine.lease(peer).evaluate:
            contribution.metrics["eval/accuracy"] = 0.5
        assert machine.report(peer, contribution).accepted
    machine.exchange()
    machine.vote(a, b, c)
    assert machine.manifest.metrics["eval/accuracy"] == 0.5
    assert not any(lease.message.evaluate for lease in machine.state.leases.values()), "version 1 is not measured"
    machine.round()
    assert "eval/accuracy" not in machine.manifest.metrics
    assert sum(lease.message.evaluate for lease in machine.state.leases.values()) == 1


def test_a_restart_gives_everyone_their_time_again(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a)
    leased = canonical(machine.state.leases)
    machine.now += 10_000
    machine.happen(ev.CoordinatorStarted(machine.now))
    assert canonical(machine.state.leases) != leased
    assert len(machine.state.leases) == 2
    machine.wait(4.9)
    assert machine.of(ev.LeaseExpired) == []
    machine.join(a, b, c)
    machine.wait(50)
    machine.contribute(b, c)
    machine.exchange(c)
    machine.now += 10_000
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(a, b, c)
    machine.wait(11.9)
    assert machine.plan.attempt == 1
    machine.exchange()
    machine.now += 10_000
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(a, b, c)
    machine.vote(a, b, c)
    assert machine.state.version == 1
    assert [machine.lease(peer).version for peer in machine.peers] == [1, 1, 1]


def test_a_state_replayed_from_the_log_on_disk_is_equal(machine: Machine, tmp_path: Path) -> None:
    a, b, _ = machine.peers
    machine.start()
    machine.round()
    machine.contribute(a)
    machine.lose(b)
    log = EventLog(tmp_path / "events.sqlite", machine.run_id)
    log.append(machine.events[:5])
    log.append(machine.events[5:])
    log.close()
    state = State(machine.terms)
    reopened = EventLog(tmp_path / "events.sqlite", machine.run_id)
    for event in reopened.replay():
        apply(state, event)
    assert list(reopened.replay()) == machine.events
    assert canonical(state) == canonical(machine.state)
    reopened.close()


def test_joins_are_refused_in_words() -> None:
    run = pb.RunManifest(digests={"known_answer": b"k" * 32})
    peer = Identity.generate().peer_id
    anyone, listed = AdmissionSection(), AdmissionSection(mode="allow_list", peers=(peer,))
    join = pb.Join(protocol=PROTOCOL, known_answer=b"k" * 32, addresses=[f"/ip4/10.0.0.1/tcp/1/p2p/{peer}"])
    assert refusal(join, peer, run, anyone) is None
    assert refusal(join, peer, run, listed) is None
    other = pb.Join(protocol=PROTOCOL, known_answer=b"k" * 32)
    assert str(refusal(other, "12D3KooWsomeone", run, listed)).startswith("admission: 12D3KooWsomeone is not on")
    assert str(refusal(pb.Join(protocol="hivegrpo/9"), peer, run, anyone)).startswith("protocol: ")
    assert str(refusal(pb.Join(protocol=PROTOCOL, known_answer=b"x"), peer, run, anyone)).startswith("numerics: ")
    with pytest.raises(FrameError, match="own id"):
        refusal(join, Identity.generate().peer_id, run, anyone)


def test_a_newer_or_another_head_under_our_signature_stops_everything() -> None:
    machine = Machine()
    chain = Chain(machine.run, machine.coordinator.peer_id)
    payload = pb.VersionManifest(parent=chain.manifest.digest, state=pb.Blob(root=b"r" * 32, size=8))
    ours = sign(machine.coordinator, machine.run_id, payload)
    chain.append(pb.ChainEntry(manifest=ours))
    check_head(chain, ours)
    payload.state.root = b"s" * 32
    with pytest.raises(ChainError, match=r"holds version 0 .* without it"):
        check_head(chain, sign(machine.coordinator, machine.run_id, payload))
    payload.version = 1
    with pytest.raises(ChainError, match=r"holds version 1 .* ends at version 0"):
        check_head(chain, sign(machine.coordinator, machine.run_id, payload))
    with pytest.raises(SignatureError):
        check_head(chain, sign(Identity.generate(), machine.run_id, payload))


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        # Two warm-up steps of ten from 0, then p = 0, 1/8, 2/8, ... of the way: transformers' get_*_schedule.
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.875, 0.75]),
        ("cosine", [0.0, 0.5, 1.0, 0.9619397662556434, 0.8535533905932737]),
    ],
)
def test_the_learning_rate_follows_its_schedule(kind: str, rates: list[float]) -> None:
    optimizer = OptimizerSection.model_validate({"learning_rate": 1.0, "lr_scheduler_type": kind, "warmup_steps": 2})
    assert [learning_rate(step, 10, optimizer) for step in range(1, 6)] == pytest.approx(rates, abs=1e-15)


def test_metrics_are_summed_or_averaged_by_weight() -> None:
    light = pb.Contribution(weight=1, metrics={"reward": 1.0, "num_tokens": 5.0, "kl": 2.0})
    heavy = pb.Contribution(weight=3, metrics={"reward": 3.0, "num_tokens": 7.0, "eval/accuracy": 0.1})
    merged = merge_metrics([Held(pb.Lease(), light, b""), Held(pb.Lease(), heavy, b"")], {"eval/accuracy": 0.9})
    # (1 * 1 + 3 * 3) / 4 and 5 + 7; kl only from the one that has it.
    assert merged == {"reward": 2.5, "num_tokens": 12.0, "kl": 2.0, "eval/accuracy": 0.9}


def test_what_people_are_shown(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.join(a, b, c)
    machine.ready(a, b)
    shown = {peer["peer"]: peer["state"] for peer in snapshot(machine.state, {}, machine.now)["peers"]}
    assert shown == {a: "online", b: "online", c: "joining"}
    machine.ready(c)
    machine.round()
    machine.lose(a)
    machine.happen(ev.PeerLeft(machine.now, b, ""))
    pulse = Pulse(machine.now, 1, "draining", {"tokens_per_second": 12.5})
    view = snapshot(machine.state, {c: pulse, a: pulse}, machine.now + 4.9)
    assert [(peer["state"], peer["contributed"]) for peer in view["peers"]] == [
        ("unreachable", 1),
        ("offline", 1),
        ("draining", 1),
    ]
    assert [peer["tokens_per_second"] for peer in view["peers"]] == [0.0, 0.0, 12.5]
    assert view["state_root"] == (bytes([1]) * 32).hex()
    assert snapshot(machine.state, {}, machine.now + 5)["peers"][0]["state"] == "offline"
