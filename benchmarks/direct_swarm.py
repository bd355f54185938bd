"""A swarm's versions without its network: what its peers compute in a round, by the product's own pure functions.

Same contributions, same residuals, same plan, same bytes, same state: a test holds the state roots against those of a
real run. What is left out is waiting, signing and sending, and each contribution's bytes are not written to disk.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from hivegrpo.peer.feedback import ErrorFeedback
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.learner import LearnedContribution, Learner
from hivegrpo.peer.learn.step import PolicyState, state_bytes
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.reducer import reduce_span
from hivegrpo.peer.swarm.replay import replay
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.chain import Entry
from hivegrpo.protocol.chunks import chunk_count, chunk_values, split_evenly
from hivegrpo.protocol.coefficients import coefficients, norm_bytes, planned_rule
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import Opened
from hivegrpo.protocol.scalars import StepScalars
from hivegrpo.protocol.schedule import learning_rate


@dataclass(frozen=True)
class Share:
    """A lease, and whose it is."""

    peer: str
    lease: int
    positions: range


def even_shares(version: int, prompts: int, peers: Sequence[str]) -> list[Share]:
    """The leases under a version, of so many prompts, as the coordinator grants them to peers that all wait."""
    shares, start, end = [], version * prompts, (version + 1) * prompts
    for number, peer in enumerate(peers):
        stop = start - (start - end) // (len(peers) - number)
        shares.append(Share(peer, version * len(peers) + number + 1, range(start, stop)))
        start = stop
    return shares


class DirectSwarm:
    """The versions of one run. One learner does the work of all peers: nothing of a lease is left in it by the next.

    So only for runs with `num_iterations` of 1, `beta` of 0 and an adapter.
    """

    def __init__(self, config: RunConfig, learner: Learner, folder: Path) -> None:
        """folder: for the peers' residuals, if the codec has error feedback."""
        assert config.grpo.num_iterations == 1
        assert config.grpo.beta == 0.0
        self.config, self.learner = config, learner
        self.codec = get_codec(config.averaging.codec)
        self.state = PolicyState.initial(version_zero(learner.layout, config, None))
        self._folder = folder
        self._feedback: dict[str, ErrorFeedback] = {}
        self._head = pb.VersionManifest()
        learner.load(0, self.state.parameters)

    @property
    def state_root(self) -> bytes:
        """Of the newest version."""
        return blob_root(state_bytes(self.state))

    def advance(self, shares: Iterable[Share]) -> float:
        """One version, from these leases; the mean reward of its rollouts. None is made of nothing: AssertionError."""
        learned = {share.peer: self._learn(share) for share in shares}
        weights = {peer: contribution.weight for peer, contribution in learned.items() if contribution.weight}
        assert weights
        encoded = {peer: self._encode(peer, learned[peer]) for peer in weights}
        chunks = {peer: contribution.chunks for peer, contribution in encoded.items()}
        plan = self._plan({peer: contribution.root for peer, contribution in sorted(encoded.items())})
        norms = [self._norm_squared(chunks[contributor.peer]) for contributor in plan.contributors]
        bits = coefficients(plan.rule, [weights[contributor.peer] for contributor in plan.contributors], norms)
        seal = pb.Seal(
            contributors=[
                pb.Sealed(peer=contributor.peer, coefficient=coefficient, norm_squared=norm_bytes(norm))
                for contributor, coefficient, norm in zip(plan.contributors, bits, norms, strict=True)
            ]
        )
        spans = []
        for index, reducer in enumerate(plan.reducers):
            own = slice(reducer.first, reducer.first + reducer.chunks)
            spans.append(reduce_span(plan, index, seal, {peer: parts[own] for peer, parts in chunks.items()}))
        self.state = replay(self.state, plan, spans)
        self._head = pb.VersionManifest(version=plan.version, contributors=plan.contributors)
        self.learner.load(self.state.step, self.state.parameters)
        return fmean(contribution.metrics["reward"] for contribution in learned.values())

    def _learn(self, share: Share) -> LearnedContribution:
        count = len(share.positions)
        return self.learner.contribute(share.lease, share.positions.start, count, count, threading.Event())

    def _encode(self, peer: str, learned: LearnedContribution) -> EncodedVector:
        if not self.codec.feedback:
            return EncodedVector.encode(self.codec, learned.vector)
        if peer not in self._feedback:
            folder = self._folder / f"peer-{len(self._feedback)}"
            folder.mkdir(parents=True)
            self._feedback[peer] = ErrorFeedback(folder, self.codec, peer)
        head = Entry(Opened(self._head, bytes(32), "", pb.Signed()), None, None)
        return self._feedback[peer].encode(head, learned.vector)

    def _plan(self, roster: Mapping[str, bytes]) -> pb.RoundPlan:
        """What of a plan bears on the result; roster: the peers in order, and the roots of their contributions."""
        optimizer, version = self.config.optimizer, self.state.step + 1
        values = self.state.parameters.numel()
        chunks = chunk_count(values)
        scalars = StepScalars.for_step(
            version,
            learning_rate=learning_rate(version, self.config.run.versions, optimizer),
            beta1=optimizer.adam_beta1,
            beta2=optimizer.adam_beta2,
            epsilon=optimizer.adam_epsilon,
            weight_decay=optimizer.weight_decay,
        )
        return pb.RoundPlan(
            version=version,
            codec=self.codec.name,
            rule=planned_rule(self.config.averaging.rule, len(roster)),
            values=values,
            contributors=[pb.Contributor(peer=peer, root=root) for peer, root in roster.items()],
            reducers=[
                pb.Reducer(peer=peer, first=span.start, chunks=len(span))
                for peer, span in zip(roster, split_evenly(chunks, min(len(roster), chunks)), strict=False)
            ],
            scalars=scalars.to_bits(),
        )

    def _norm_squared(self, chunks: Sequence[bytes]) -> int:
        values = self.state.parameters.numel()
        return sum(self.codec.norm_squared(chunk, chunk_values(values, index)) for index, chunk in enumerate(chunks))
