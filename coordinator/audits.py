"""Which spans of an attempt still lack the auditors that have to agree with them. Pure."""

from hivegrpo.coordinator.round import Attempt
from hivegrpo.protocol.audits import TURNS, Draw


def unaudited(attempt: Attempt, now: float) -> list[int]:
    """Drawn spans of the ballot that has the quorum with which too few auditors agree whose turn has come."""
    ballot = attempt.winner()
    assert ballot is not None
    _, spans = ballot
    return [
        drawn.span for drawn in attempt.drawn if _agreeing(attempt, drawn, spans[drawn.span][0], now) < drawn.needed
    ]


def audits_until(attempt: Attempt) -> float:
    """When audits that are still missing end an attempt: a few turns, and an exchange's time, after the quorum."""
    assert attempt.quorum_at is not None
    return attempt.quorum_at + TURNS * attempt.plan.audit_seconds + attempt.plan.exchange_seconds


def next_turn(attempt: Attempt, now: float) -> float | None:
    """When the next auditor's turn comes that has reported already; None if nobody has before its turn."""
    turns = [
        _turn(attempt, drawn, auditor)
        for drawn in attempt.drawn
        for auditor in attempt.audits.get(drawn.span, {})
        if _turn(attempt, drawn, auditor) > now
    ]
    return min(turns, default=None)


def _agreeing(attempt: Attempt, drawn: Draw, root: bytes, now: float) -> int:
    audits = attempt.audits.get(drawn.span, {})
    return sum(audit.content == root and _turn(attempt, drawn, auditor) <= now for auditor, audit in audits.items())


def _turn(attempt: Attempt, drawn: Draw, auditor: str) -> float:
    assert attempt.quorum_at is not None
    return attempt.quorum_at + drawn.starts(drawn.order.index(auditor), attempt.plan.audit_seconds)
