"""Whether a run kept its promises, judged from what the coordinator and the peers wrote down.

`check` covers invariants 1 to 6 of the architecture:

1. same version, same state root, on every honest peer;
2. a contribution that was acknowledged is in exactly one manifest, or rejected with a reason;
3. nothing counts twice: no prompt position (but in the iterations of one lease), no contribution, no version;
4. one chain: no fork, no gap, across crashes of anything;
5. every committed span equals its rule applied to the sealed chunks;
6. no honest peer is banned by rule: each ban that no operator ordered names a blob, which proves a fault of the peer.

The coordinator's records are those of `coordinator.history.read_records`. Of a peer's records it reads "version"
{version, state_root, manifest} and "contribution_acked" {lease, iteration}. A record without an iteration is of the
first one, 0.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from hivegrpo.protocol.history import Record
from hivegrpo.protocol.scalars import fp32_bits

Recompute = Callable[[Record, Record, int], bytes | None]
"""(plan, seal, index of a span) -> the span's root, made anew from the sealed chunks; None if these are gone."""

Judge = Callable[[bytes, int], Collection[str]]
"""(root, size of a blob that is said to be a proof) -> who is guilty by it; nobody if it is gone, or shows nothing."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    invariant: int
    text: str


def check(
    coordinator: Iterable[Record],
    peers: Mapping[str, Iterable[Record]],
    recompute: Recompute | None = None,
    judge: Judge | None = None,
) -> list[Violation]:
    """All violations; empty if the histories are as they should be. Invariant 5 needs `recompute`, 6 `judge`."""
    book = _Book()
    found = [violation for record in coordinator for violation in book.take(record)]
    found += book.unresolved()
    for peer, records in sorted(peers.items()):
        found += _check_peer(peer, records, book)
    if recompute is not None:
        found += _check_spans(book, recompute)
    if judge is not None:
        found += _check_bans(book, judge)
    return found


Name = tuple[int, int]
"""Lease and iteration: what a contribution is named by."""


def _name(record: Record) -> Name:
    return record["lease"], record.get("iteration", 0)


def _words(name: Name) -> str:
    lease, iteration = name
    return f"lease {lease}" + (f", iteration {iteration}" if iteration else "")


@dataclass(slots=True)
class _Book:
    """What follows from the coordinator's records so far."""

    run_id: str = ""
    leases: dict[Name, Record] = field(default_factory=dict)
    newest: int = 0
    """The highest number of a lease."""
    live: dict[int, int] = field(default_factory=dict)
    """Positions that are leased, or used by a contribution that can still count: position -> lease."""
    spent: dict[int, int] = field(default_factory=dict)
    """Positions that counted, or can never be used: position -> lease."""
    contributions: dict[Name, Record] = field(default_factory=dict)
    counted: dict[Name, int] = field(default_factory=dict)
    """A contribution in a manifest -> version."""
    rejected: dict[Name, str] = field(default_factory=dict)
    plans: dict[str, Record] = field(default_factory=dict)
    seals: dict[str, Record] = field(default_factory=dict)
    versions: list[Record] = field(default_factory=list)
    bans: dict[str, Record] = field(default_factory=dict)

    def take(self, record: Record) -> Iterator[Violation]:
        """Take one record of the coordinator's."""
        match record["kind"]:
            case "run":
                self.run_id = record["run_id"]
            case "lease":
                yield from self._renewed(record) if record.get("iteration", 0) else self._lease(record)
            case "lease_expired":
                self._free(_name(record))
            case "contribution":
                yield from self._contribution(record)
            case "contribution_rejected":
                yield from self._rejected(record)
            case "plan":
                self.plans[record["digest"]] = record
                for peer in sorted({item["peer"] for item in record["contributors"]} & self.bans.keys()):
                    yield Violation(6, f"{peer} was banned, and is in a later plan, of version {record['version']}")
            case "banned":
                self.bans[record["peer"]] = record
            case "ban_lifted":
                if self.bans.pop(record["peer"], record).get("proof"):
                    yield Violation(6, f"the ban of {record['peer']} was lifted, and there is a proof of its fault")
            case "seal":
                self.seals[record["digest"]] = record
            case "version":
                yield from self._version(record)

    def unresolved(self) -> Iterator[Violation]:
        """Contributions with neither manifest nor rejection, outside the round that is in flight at the end."""
        for name, contribution in self.contributions.items():
            settled = name in self.counted or name in self.rejected or contribution["weight"] == 0
            if not settled and contribution["version"] < self.height:
                yield Violation(2, f"the contribution of {_words(name)} is in no manifest and was not rejected")

    @property
    def height(self) -> int:
        return len(self.versions) - 1

    def _lease(self, record: Record) -> Iterator[Violation]:
        lease = record["lease"]
        if lease <= self.newest:
            yield Violation(4, f"lease {lease} was granted after lease {self.newest}")
        self.newest = max(self.newest, lease)
        yield from self._take_lease(record)
        for position in _positions(record):
            other = self.live.get(position, self.spent.get(position))
            if other is not None:
                yield Violation(3, f"position {position} of lease {lease} was taken by lease {other}")
            self.live[position] = lease

    def _renewed(self, record: Record) -> Iterator[Violation]:
        """A lease for another gradient of a rollout: of the same prompts, and after the gradient before has counted."""
        lease, iteration = _name(record)
        before = self.leases.get((lease, iteration - 1))
        if before is None or any(before[key] != record[key] for key in ("peer", "start", "count")):
            yield Violation(3, f"{_words(_name(record))} does not renew the iteration before it")
        if self.counted.get((lease, iteration - 1)) != record["version"]:
            yield Violation(3, f"{_words(_name(record))} goes on with a rollout that its version was not made from")
        yield from self._take_lease(record)

    def _take_lease(self, record: Record) -> Iterator[Violation]:
        name = _name(record)
        if record["version"] != self.height + record.get("ahead", False):
            yield Violation(4, f"{_words(name)} is for version {record['version']} at height {self.height}")
        self.leases[name] = record

    def _contribution(self, record: Record) -> Iterator[Violation]:
        name = _name(record)
        if name in self.contributions:
            yield Violation(3, f"two contributions were taken for {_words(name)}")
            return
        self.contributions[name] = record
        if name not in self.leases:
            yield Violation(3, f"a contribution was taken for {_words(name)}, which was never granted")
            return
        offsets = [*record["used"], *record["dropped"], *record["returned"]]
        lease, iteration = name
        if iteration:
            first = self.contributions.get((lease, 0), {"used": []})
            if record["used"] not in ([], first["used"]) or len(offsets) != len(record["used"]):
                yield Violation(3, f"the contribution of {_words(name)} uses other positions than iteration 0")
            return
        start = self.leases[name]["start"]
        if any(self.live.get(start + offset) != lease for offset in offsets):
            yield Violation(3, f"the contribution of {_words(name)} has positions that the lease no longer had")
        for position in (start + offset for offset in (*record["dropped"], *record["returned"])):
            self.live.pop(position, None)
        self.spent.update((start + offset, lease) for offset in record["dropped"])

    def _rejected(self, record: Record) -> Iterator[Violation]:
        name = _name(record)
        if not record["reason"]:
            yield Violation(2, f"the contribution of {_words(name)} was rejected without a reason")
        if name in self.counted or name in self.rejected:
            yield Violation(2, f"the contribution of {_words(name)} was rejected after it was settled")
        self.rejected[name] = record["reason"]
        self._free(name)

    def _free(self, name: Name) -> None:
        """What a lease still had goes back, but by iteration 0 only: later ones hold no position."""
        lease, iteration = name
        if iteration == 0 and name in self.leases:
            for position in _positions(self.leases[name]):
                if self.live.get(position) == lease:
                    del self.live[position]

    def _version(self, record: Record) -> Iterator[Violation]:
        version = record["version"]
        if version in {other["version"] for other in self.versions}:
            yield Violation(3, f"version {version} was committed twice")
        if version != self.height + 1:
            yield Violation(4, f"version {version} was committed at height {self.height}")
        parent = self.versions[-1]["digest"] if self.versions else self.run_id
        if record["parent"] != parent:
            yield Violation(4, f"version {version} does not continue the version before it")
        self.versions.append(record)
        if record.get("restores") is not None:
            yield from self._rollback(record)
        elif version > 0:
            yield from self._origin(record)
        if len({contributor.get("iteration", 0) for contributor in record["contributors"]}) > 1:
            yield Violation(3, f"version {version} counts contributions of several iterations")
        for contributor in record["contributors"]:
            yield from self._count(contributor, version)

    def _rollback(self, record: Record) -> Iterator[Violation]:
        """It has the state of an older version, and nothing was averaged for it."""
        version, older = record["version"], record["restores"]
        if not 0 <= older < version or record["state_root"] != self.versions[older]["state_root"]:
            yield Violation(1, f"version {version} goes back to version {older}, and has another state root")
        if record["contributors"] or record["spans"]:
            yield Violation(2, f"version {version} goes back to version {older}, and counts contributions")

    def _origin(self, record: Record) -> Iterator[Violation]:
        """The manifest follows from its plan and seal, and the seal's coefficients from the plan's weights."""
        version = record["version"]
        plan, seal = self.plans.get(record["plan"]), self.seals.get(record["seal"])
        if plan is None or seal is None or seal["plan"] != plan["digest"] or plan["version"] != version:
            yield Violation(4, f"version {version} names a plan or a seal that was not made for it")
            return
        sealed = {item["peer"]: item["coefficient"] for item in seal["contributors"]}
        named = [contributor for contributor in plan["contributors"] if contributor["peer"] in sealed]
        if record["contributors"] != named or len(named) != len(sealed):
            yield Violation(2, f"version {version} names other contributors than its seal")
        total = sum(contributor["weight"] for contributor in named)
        shares = {contributor["peer"]: fp32_bits(contributor["weight"] / total) for contributor in named}
        if plan["rule"] == "mean" and sealed != shares:
            yield Violation(5, f"the coefficients of version {version} are not the shares of the weight")

    def _count(self, contributor: Record, version: int) -> Iterator[Violation]:
        name = _name(contributor)
        words, contribution = _words(name), self.contributions.get(name)
        if contribution is None:
            yield Violation(2, f"version {version} counts {words}, for which no contribution was taken")
            return
        if name in self.counted:
            yield Violation(3, f"the contribution of {words} is in versions {self.counted[name]} and {version}")
        if name in self.rejected:
            yield Violation(2, f"the contribution of {words} is in version {version}, and was rejected")
        if (contribution["weight"], contribution["root"]) != (contributor["weight"], contributor["root"]):
            yield Violation(2, f"version {version} counts another contribution than {words} committed to")
        self.counted[name] = version
        lease, iteration = name
        start = self.leases[name]["start"] if name in self.leases else 0
        for position in (start + offset for offset in contribution["used"] if iteration == 0):
            if position in self.spent:
                yield Violation(3, f"position {position} counted for leases {self.spent[position]} and {lease}")
            self.spent[position] = lease
            self.live.pop(position, None)


def _positions(lease: Record) -> range:
    return range(lease["start"], lease["start"] + lease["count"])


def _check_peer(peer: str, records: Iterable[Record], book: _Book) -> Iterator[Violation]:
    for record in records:
        if record["kind"] == "contribution_acked" and _name(record) not in book.contributions:
            yield Violation(2, f"{_words(_name(record))} was acknowledged to {peer}, and is not in the log")
        if record["kind"] == "version":
            yield from _check_version(peer, record, book)


def _check_version(peer: str, record: Record, book: _Book) -> Iterator[Violation]:
    version = record["version"]
    if not 0 <= version <= book.height:
        yield Violation(4, f"{peer} holds version {version}; the log ends at {book.height}")
        return
    committed = book.versions[version]
    if record["state_root"] != committed["state_root"]:
        yield Violation(1, f"{peer} holds version {version} with another state root than was committed")
    if record["manifest"] != committed["digest"]:
        yield Violation(4, f"{peer} holds another manifest of version {version} than the log")


def _check_spans(book: _Book, recompute: Recompute) -> Iterator[Violation]:
    for record in book.versions[1:]:
        plan, seal = book.plans.get(record["plan"]), book.seals.get(record["seal"])
        if plan is None or seal is None or seal["plan"] != plan["digest"]:
            continue
        for index, span in enumerate(record["spans"]):
            root = recompute(plan, seal, index)
            if root is not None and root.hex() != span["root"]:
                yield Violation(5, f"span {index} of version {record['version']} is not its rule's result")


def _check_bans(book: _Book, judge: Judge) -> Iterator[Violation]:
    for peer, record in book.bans.items():
        proof = record["proof"]
        if proof is None:
            continue
        if peer not in judge(bytes.fromhex(proof["root"]), proof["size"]):
            yield Violation(6, f"{peer} is banned by a blob that does not prove its fault: {proof['root'][:16]}")
