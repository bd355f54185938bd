"""From one version to the next, out of nothing but signed and content-addressed bytes."""

from collections.abc import Sequence

from hivegrpo.peer.learn.step import PolicyState, adamw_step
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.scalars import StepScalars


def replay(state: PolicyState, plan: pb.RoundPlan, spans: Sequence[bytes]) -> PolicyState:
    """The state after the plan's step, in new buffers; `state`, which is the plan's parent, stays as it is.

    CommitmentError if the spans are not what the plan's codec makes.
    """
    shadow = state.empty_like()
    gradient = decode_vector(get_codec(plan.codec), b"".join(spans), plan.values)
    adamw_step(state, gradient, StepScalars.from_bits(list(plan.scalars)), out=shadow)
    return shadow
