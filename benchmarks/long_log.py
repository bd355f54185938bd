"""The home of a coordinator whose run has gone on for long: made by its state machine, by peers that always answer.

Only the chain is signed: peers' signatures and digests are random bytes, which a start does not look at, and which are
as hard to compress as real ones.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import SNAPSHOT_EVERY
from hivegrpo.coordinator.snapshots import take_snapshot
from hivegrpo.coordinator.state import Phase, State, Terms
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import DIGEST_BYTES, PROTOCOL, run_id_of, sign_payload
from hivegrpo.protocol.identity import Identity

VALUES = 2_000_000
"""Enough chunks for 64 reducers."""

SECONDS = 0.01
"""Between two events, on the clock of the run that is made."""

SIGNATURE_BYTES = 64
BATCH = 2000
"""Events of one transaction."""


def make_run(identity: Identity, peers: int) -> tuple[pb.Signed, RunConfig]:
    """A run that does not end."""
    config = RunConfig.model_validate(
        {
            "run": {"name": "benchmark", "versions": 1_000_000, "start_peers": peers},
            "model": {"path": "none"},
            "dataset": {"path": "none.jsonl"},
            "rewards": {"functions": ["exact_match"]},
            "admission": {"mode": "open"},
            "grpo": {"prompts_per_round": peers},
            "averaging": {"audit_rate": 0.0},
            "distribution": {"anchor_every": 1_000_000, "keep_versions": 1_000_000},
        }
    )
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=identity.peer_id,
        config=config.canonical_json(),
        digests={"known_answer": bytes(DIGEST_BYTES)},
        layout=[pb.Tensor(name="a", shape=[VALUES])],
    )
    payload = manifest.SerializeToString(deterministic=True)
    return sign_payload(identity, run_id_of(payload), "RunManifest", payload), config


class LongRun:
    """Plays a run into a home, as `coordinator.service` would write it."""

    def __init__(self, home: Path, peers: int) -> None:
        self.identity = Identity.load_or_create(home / "identity.key")
        self.run, config = make_run(self.identity, peers)
        self.run_id = run_id_of(self.run.payload)
        self.chain = ChainFile.create(home, self.run, self.identity.peer_id)
        self.log = EventLog(home / LOG_FILE, self.run_id)
        self.state = State(Terms.of(self.run, config))
        self._peers = sorted(Identity.generate().peer_id for _ in range(peers))
        self._now = 0.0
        self._batch: list[ev.Event] = []
        self._chance = random.Random(0)

    def write(self, events: int) -> None:
        """So many events; the newest snapshot is as old as it can be."""
        newest = events - (SNAPSHOT_EVERY - 1)
        for number, event in zip(range(1, events + 1), self._events(), strict=False):
            entry = self._entry(event) if isinstance(event, ev.VersionCommitted) else None
            apply(self.state, event)
            self._batch.append(event)
            if len(self._batch) == BATCH:
                self._flush()
            if entry is not None:
                self.chain.append(entry)
            if number <= newest and (newest - number) % SNAPSHOT_EVERY == 0:
                self._flush()
                self.log.compact(take_snapshot(self.state, number))
        self._flush()

    def _flush(self) -> None:
        self.log.append(self._batch)
        self._batch.clear()

    def _events(self) -> Iterator[ev.Event]:
        """Each is applied before the next one is asked for."""
        yield ev.CoordinatorStarted(self._at())
        for peer in self._peers:
            yield ev.PeerJoined(self._at(), peer, (f"/ip4/10.0.0.1/tcp/1/p2p/{peer}",), "benchmark")
            yield ev.PeerReady(self._at(), peer, 0, bytes(DIGEST_BYTES))
        while True:
            due = decide(self.state, self._at()).events
            yield from due or self._answers()

    def _at(self) -> float:
        self._now += SECONDS
        return self._now

    def _answers(self) -> Iterable[ev.Event]:
        current = self.state.round
        if self.state.phase is Phase.ROLLOUT:
            leases = [granted.message for granted in self.state.leases.values()]
            return [
                ev.ContributionReceived(self._at(), self._signed(lease.peer, self._contribution(lease)))
                for lease in leases
            ]
        attempt = current.attempt
        assert attempt is not None
        if self.state.phase is Phase.EXCHANGE:
            complete = [pb.Complete(peer=peer, norm_squared=b"\1" * 16) for peer in sorted(attempt.roster)]
            report = pb.SenderReport(plan=attempt.digest, complete=complete)
            return [
                ev.SendersReported(self._at(), self._signed(reducer.peer, report)) for reducer in attempt.plan.reducers
            ]
        self._now += 1.0  # the votes that are still to come are waited for no longer
        vote = pb.StepReport(
            version=current.version,
            plan=attempt.digest,
            seal=attempt.seal_digest,
            spans=[pb.Blob(root=self._chance.randbytes(DIGEST_BYTES), size=1000) for _ in attempt.plan.reducers],
            state_root=self._chance.randbytes(DIGEST_BYTES),
            receipts=[self._chance.randbytes(SIGNATURE_BYTES) for _ in attempt.plan.reducers],
        )
        waiting = sorted(attempt.roster - attempt.votes.keys())
        return [ev.StepReported(self._at(), self._signed(peer, vote)) for peer in waiting]

    def _contribution(self, lease: pb.Lease) -> pb.Contribution:
        return pb.Contribution(
            lease=lease.id,
            version=lease.version,
            used=range(lease.count),
            weight=lease.count,
            root=self._chance.randbytes(DIGEST_BYTES),
            metrics={"reward": self._chance.random(), "num_tokens": 10.0},
        )

    def _signed(self, peer: str, message: pb.Contribution | pb.SenderReport | pb.StepReport) -> bytes:
        payload = message.SerializeToString(deterministic=True)
        name, signature = message.DESCRIPTOR.name, self._chance.randbytes(SIGNATURE_BYTES)
        return pb.Signed(type=name, payload=payload, signer=peer, signature=signature).SerializeToString()

    def _entry(self, event: ev.VersionCommitted) -> pb.ChainEntry:
        attempt = self.state.round.attempt
        entry = pb.ChainEntry(manifest=sign_payload(self.identity, self.run_id, "VersionManifest", event.payload))
        if attempt is not None:
            entry.plan.CopyFrom(sign_payload(self.identity, self.run_id, "RoundPlan", attempt.payload))
            entry.seal.CopyFrom(sign_payload(self.identity, self.run_id, "Seal", attempt.seal_payload))
        return entry
