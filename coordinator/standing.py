"""Who spoiled attempts, remembered over rounds, so that a spoiler is not a reducer in each version's first attempt.

A charge keeps a peer from reducing for 2, 4, 8, ... versions, as far as others can; each later version that it
contributes to takes one charge back. Standing decides about nothing but that job: a charge needs no proof, and may be
unjust.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hivegrpo.coordinator.round import Attempt

MOST_DOUBLINGS = 6
"""Nobody is kept from reducing for more than 64 versions at a time."""


@dataclass(slots=True)
class Record:
    """What is held against one peer."""

    charges: int = 0
    until: int = 0
    """The first version that it may help to reduce again."""


@dataclass(slots=True)
class Standing:
    """Records by peer; those against whom nothing is held have none."""

    records: dict[str, Record] = field(default_factory=dict)

    def charge(self, peers: Iterable[str], version: int) -> None:
        """These spoiled an attempt at `version`."""
        for peer in peers:
            record = self.records.setdefault(peer, Record())
            record.charges += 1
            record.until = version + 1 + 2 ** min(record.charges, MOST_DOUBLINGS)

    def credit(self, peers: Iterable[str], version: int) -> None:
        """These did their part in a version that was committed."""
        for peer in peers:
            if peer in self.records and self.is_good(peer, version):
                self.records[peer].charges -= 1
                if self.records[peer].charges <= 0:
                    del self.records[peer]

    def charges(self, peer: str) -> int:
        """Charges that are not taken back yet."""
        return self.records[peer].charges if peer in self.records else 0

    def is_good(self, peer: str, version: int) -> bool:
        """Whether nothing keeps a peer from reducing `version`."""
        return peer not in self.records or version >= self.records[peer].until

    def preferred(self, peers: Sequence[str], version: int) -> list[str]:
        """Those in good standing; if nobody is, those with the fewest charges."""
        good = [peer for peer in peers if self.is_good(peer, version)]
        fewest = min(map(self.charges, peers), default=0)
        return good or [peer for peer in peers if self.charges(peer) == fewest]


def deniers(attempt: Attempt, standing: Standing) -> dict[str, str]:
    """Reducers that alone lack a sender which all others have: reducer -> that sender.

    Either may be the liar: the sender can leave one reducer out, the reducer can say that it was. Whoever has fewer
    charges is believed, and at par the sender: leaving a reducer out for one attempt costs less than a contribution.
    """
    found: dict[str, str] = {}
    if len(attempt.reports) < 2:
        return found
    lacking: dict[str, list[str]] = {}
    for reducer, complete in attempt.reports.items():
        for sender in attempt.roster.difference(complete):
            lacking.setdefault(sender, []).append(reducer)
    for sender, reducers in sorted(lacking.items()):
        if len(reducers) == 1 and reducers != [sender] and standing.charges(sender) <= standing.charges(reducers[0]):
            found.setdefault(reducers[0], sender)
    return found


def withholders(attempt: Attempt) -> list[str]:
    """Who may have kept its span to itself when the step's time is up: reducers whose span no other peer had.

    A vote shows that its sender had every span, and peers pass spans on. If others had them all, it is those that did
    not vote.
    """
    voters = set(attempt.votes)
    reducers = [reducer.peer for reducer in attempt.plan.reducers]
    return [peer for peer in reducers if voters <= {peer}] or sorted(attempt.roster - voters)
