"""Two receipts of one reducer for one span, found in the votes: proof enough to ban it, without any arithmetic."""

from collections.abc import Iterator
from functools import lru_cache

from hivegrpo.coordinator.readings import ballot_of
from hivegrpo.coordinator.round import Attempt
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import receipt_of
from hivegrpo.protocol.envelope import open_signed
from hivegrpo.protocol.errors import SignatureError


def two_receipts(attempt: Attempt, report: pb.StepReport, run_id: str) -> Iterator[tuple[str, int, pb.TwoReceipts]]:
    """Reducers (with the span) that signed what `report`, a new vote, names, and what an earlier vote names instead.

    A vote whose signatures do not verify proves nothing, against nobody.
    """
    _, spans = ballot_of(report)
    for index, content in enumerate(spans):
        others = {votes[1][index]: voter for voter, votes in attempt.votes.items() if votes[1][index] != content}
        if not others:
            continue
        mine = _receipt(attempt, index, content, report.receipts[index], run_id)
        if mine is None:
            continue
        for other, voter in others.items():
            theirs = _receipt(attempt, index, other, attempt.receipts[voter][index], run_id)
            if theirs is not None:
                yield attempt.plan.reducers[index].peer, index, pb.TwoReceipts(first=theirs, second=mine)
                break


def _receipt(
    attempt: Attempt, span: int, content: tuple[bytes, int], signature: bytes, run_id: str
) -> pb.Signed | None:
    root, size = content
    payload = receipt_of(attempt.digest, attempt.seal_digest, span, pb.Blob(root=root, size=size))
    signer = attempt.plan.reducers[span].peer
    if not _is_signed(run_id, payload, signer, signature):
        return None
    return pb.Signed(type="SpanReceipt", payload=payload, signer=signer, signature=signature)


@lru_cache(maxsize=1 << 14)
def _is_signed(run_id: str, payload: bytes, signer: str, signature: bytes) -> bool:
    """Cached, since a bad vote would be verified again with every other vote."""
    try:
        open_signed(
            pb.Signed(type="SpanReceipt", payload=payload, signer=signer, signature=signature), run_id, pb.SpanReceipt
        )
    except SignatureError:
        return False
    return True
