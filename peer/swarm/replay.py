"""From one version to the next, out of nothing but signed and content-addressed bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hivegrpo.peer.learn.step import PolicyState, adamw_step
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.scalars import StepScalars


class AveragedGradient:
    """A plan's averaged gradient, decoded span by span, in any order: while some spans are still on their way."""

    def __init__(self, plan: pb.RoundPlan) -> None:
        self._plan = plan
        self._vector: Tensor | None = None
        self._decoded: set[int] = set()

    def add(self, index: int, span: bytes) -> None:
        """Decode span `index`, unless it is here. CommitmentError if it is not what the plan's codec makes."""
        if index in self._decoded:
            return
        if self._vector is None:
            self._vector = torch.empty(self._plan.values)
        reducer = self._plan.reducers[index]
        part = self._vector[reducer.first * CHUNK_VALUES :][: reducer.chunks * CHUNK_VALUES]
        part.copy_(decode_vector(get_codec(self._plan.codec), span, part.numel()))
        self._decoded.add(index)

    def take(self, spans: Sequence[bytes]) -> Tensor:
        """The vector, fp32, of all spans of the plan, in order; those that were added are the same. Errors as `add`.

        Nothing of it is here afterwards.
        """
        assert len(spans) == len(self._plan.reducers)
        for index, span in enumerate(spans):
            self.add(index, span)
        vector, self._vector = self._vector, None
        self._decoded.clear()
        assert vector is not None
        return vector


def replay(
    state: PolicyState, plan: pb.RoundPlan, spans: Sequence[bytes], gradient: AveragedGradient | None = None
) -> PolicyState:
    """The state after the plan's step, in new buffers; `state`, which is the plan's parent, stays as it is.

    `gradient` may have some of the spans already. CommitmentError if the spans are not what the plan's codec makes.
    """
    shadow = state.empty_like()
    vector = (gradient or AveragedGradient(plan)).take(spans)
    adamw_step(state, vector, StepScalars.from_bits(list(plan.scalars)), out=shadow)
    return shadow
