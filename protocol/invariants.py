"""Whether a run kept its promises, judged from what the coordinator and the peers wrote down.

`Checker` takes the coordinator's records one by one, in memory that grows by little more than what counts; `check` is
the same for histories that are there as a whole. They cover the invariants of the architecture:

1. same version, same state root, on every honest peer;
2. a contribution that was acknowledged is in exactly one manifest, or rejected with a reason;
3. nothing counts twice: no prompt position (but in the iterations of one lease), no contribution, no version;
4. one chain: no fork, no gap, across crashes of anything;
5. every committed span equals its rule applied to the sealed chunks;
6. no honest peer is banned by rule: each ban that no operator ordered names a blob, which proves a fault of the peer;
7. once nothing goes wrong any more, the next version is committed within a stated time.

The coordinator's records are those of `coordinator.history.read_records`. Of a peer's records it reads "version"
{version, state_root, manifest} and "contribution_acked" {lease, iteration}. A record without an iteration is of the
first one, 0.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from hivegrpo.protocol.history import Record
from hivegrpo.protocol.scalars import fp32_bits
from hivegrpo.protocol.values import value

Recompute = Callable[[Record, Record, int], bytes | None]
"""(plan, seal, index of a span) -> the span's root, made anew from the sealed chunks; None if these are gone."""

Judge = Callable[[bytes, int], Collection[str]]
"""(root, size of a blob that is said to be a proof) -> who is guilty by it; nobody if it is gone, or shows nothing."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    invariant: int
    text: str


@dataclass(frozen=True, slots=True)
class Calm:
    """From `begin` to `end` nothing went wrong: a version has to be committed within `within` seconds of `begin`.

    Times are those of the coordinator's records. Whoever knows of the faults says so; a run that is finished by then
    has nothing to commit, and no calm.
    """

    begin: float
    end: float
    within: float


def check(
    coordinator: Iterable[Record],
    peers: Mapping[str, Iterable[Record]],
    recompute: Recompute | None = None,
    judge: Judge | None = None,
    calm: Iterable[Calm] = (),
) -> list[Violation]:
    """All violations; empty if the histories are as they should be.

    Invariant 5 needs `recompute`, 6 `judge`, and 7 `calm`.
    """
    checker = Checker(recompute)
    found = [violation for record in coordinator for violation in checker.take(record)]
    return found + checker.finish(peers, judge, calm)


Name = tuple[int, int]
"""Lease and iteration: what a contribution is named by."""


def _name(record: Record) -> Name:
    return record["lease"], record.get("iteration", 0)


def _words(name: Name) -> str:
    lease, iteration = name
    return f"lease {lease}" + (f", iteration {iteration}" if iteration else "")


def _positions(lease: Record) -> range:
    return range(lease["start"], lease["start"] + lease["count"])


@value
class _Lease:
    """What later records are compared with."""

    peer: str
    positions: range


@value
class _Contribution:
    """Likewise."""

    version: int
    used: list[int]
    weight: int
    root: str


@value
class _Version:
    """Likewise."""

    digest: str
    state_root: str
    at: float


class Checker:
    """What follows from the coordinator's records so far."""

    def __init__(self, recompute: Recompute | None = None) -> None:
        self._recompute = recompute
        self._run_id = ""
        self._leases: dict[Name, _Lease] = {}
        self._newest = 0
        """The highest number of a lease."""
        self._live: dict[int, int] = {}
        """Positions that are leased, or used by a contribution that can still count: position -> lease."""
        self._spent: dict[int, int] = {}
        """Positions that counted, or can never be used: position -> lease."""
        self._contributions: dict[Name, _Contribution] = {}
        self._counted: dict[Name, int] = {}
        """A contribution in a manifest -> version."""
        self._rejected: dict[Name, str] = {}
        self._plans: dict[str, Record] = {}
        """Of the version to come, by digest; likewise the seals."""
        self._seals: dict[str, Record] = {}
        self._versions: list[_Version] = []
        self._numbers: set[int] = set()
        """Of the versions; without a gap they are those from 0 to the height."""
        self._bans: dict[str, Record] = {}
        self._found: list[Violation] = []
        """In what was taken last."""

    def take(self, record: Record) -> list[Violation]:
        """Take one record of the coordinator's: what it breaks."""
        self._found = []
        match record["kind"]:
            case "lease" if record.get("iteration", 0):
                self._renewed(record)
            case "lease":
                self._lease(record)
            case "contribution":
                self._contribution(record)
            case "lease_expired":
                self._free(_name(record))
            case "contribution_rejected":
                self._reject(record)
            case "plan":
                self._plans[record["digest"]] = record
                for peer in sorted({item["peer"] for item in record["contributors"]} & self._bans.keys()):
                    self._note(6, f"{peer} was banned, and is in a later plan, of version {record['version']}")
            case "banned":
                self._bans[record["peer"]] = record
            case "ban_lifted":
                if self._bans.pop(record["peer"], record).get("proof"):
                    self._note(6, f"the ban of {record['peer']} was lifted, and there is a proof of its fault")
            case "seal":
                self._seals[record["digest"]] = record
            case "version":
                self._version(record)
            case "run":
                self._run_id = record["run_id"]
        return self._found

    def finish(
        self, peers: Mapping[str, Iterable[Record]], judge: Judge | None = None, calm: Iterable[Calm] = ()
    ) -> list[Violation]:
        """What only shows at the end, and in the peers' histories."""
        self._found = []
        self._check_resolved()
        for peer, records in sorted(peers.items()):
            self._check_peer(peer, records)
        if judge is not None:
            self._check_bans(judge)
        self._check_calm(calm)
        return self._found

    def _note(self, invariant: int, text: str) -> None:
        self._found.append(Violation(invariant, text))

    @property
    def _height(self) -> int:
        return len(self._versions) - 1

    def _check_resolved(self) -> None:
        """Contributions with neither manifest nor rejection, outside the round that is in flight at the end."""
        for name, contribution in self._contributions.items():
            settled = name in self._counted or name in self._rejected or contribution.weight == 0
            if not settled and contribution.version < self._height:
                self._note(2, f"the contribution of {_words(name)} is in no manifest and was not rejected")

    def _lease(self, record: Record) -> None:
        lease: int = record["lease"]
        if lease <= self._newest:
            self._note(4, f"lease {lease} was granted after lease {self._newest}")
        self._newest = max(self._newest, lease)
        self._take_lease(record)
        positions, live, spent = _positions(record), self._live, self._spent
        if not (live.keys().isdisjoint(positions) and spent.keys().isdisjoint(positions)):
            for position in positions:
                other = live.get(position, spent.get(position))
                if other is not None:
                    self._note(3, f"position {position} of lease {lease} was taken by lease {other}")
        live.update(dict.fromkeys(positions, lease))

    def _renewed(self, record: Record) -> None:
        """A lease for another gradient of a rollout: of the same prompts, and after the gradient before has counted."""
        lease, iteration = _name(record)
        before = self._leases.get((lease, iteration - 1))
        if before != _Lease(record["peer"], _positions(record)):
            self._note(3, f"{_words(_name(record))} does not renew the iteration before it")
        if self._counted.get((lease, iteration - 1)) != record["version"]:
            self._note(3, f"{_words(_name(record))} goes on with a rollout that its version was not made from")
        self._take_lease(record)

    def _take_lease(self, record: Record) -> None:
        name = _name(record)
        if record["version"] != self._height + record.get("ahead", False):
            self._note(4, f"{_words(name)} is for version {record['version']} at height {self._height}")
        self._leases[name] = _Lease(record["peer"], _positions(record))

    def _contribution(self, record: Record) -> None:
        name = _name(record)
        if name in self._contributions:
            self._note(3, f"two contributions were taken for {_words(name)}")
            return
        self._contributions[name] = _Contribution(record["version"], record["used"], record["weight"], record["root"])
        if name not in self._leases:
            self._note(3, f"a contribution was taken for {_words(name)}, which was never granted")
            return
        offsets = [*record["used"], *record["dropped"], *record["returned"]]
        lease, iteration = name
        if iteration:
            first = self._contributions.get((lease, 0))
            if record["used"] not in ([], first.used if first else []) or len(offsets) != len(record["used"]):
                self._note(3, f"the contribution of {_words(name)} uses other positions than iteration 0")
            return
        start, live = self._leases[name].positions.start, self._live
        if not {live.get(start + offset) for offset in offsets} <= {lease}:
            self._note(3, f"the contribution of {_words(name)} has positions that the lease no longer had")
        for offset in record["returned"]:
            live.pop(start + offset, None)
        for offset in record["dropped"]:
            live.pop(start + offset, None)
            self._spent[start + offset] = lease

    def _reject(self, record: Record) -> None:
        name = _name(record)
        if not record["reason"]:
            self._note(2, f"the contribution of {_words(name)} was rejected without a reason")
        if name in self._counted or name in self._rejected:
            self._note(2, f"the contribution of {_words(name)} was rejected after it was settled")
        self._rejected[name] = record["reason"]
        self._free(name)

    def _free(self, name: Name) -> None:
        """What a lease still had goes back, but by iteration 0 only: later ones hold no position."""
        lease, iteration = name
        if iteration == 0 and name in self._leases:
            for position in self._leases[name].positions:
                if self._live.get(position) == lease:
                    del self._live[position]

    def _version(self, record: Record) -> None:
        version = record["version"]
        if version in self._numbers:
            self._note(3, f"version {version} was committed twice")
        if version != self._height + 1:
            self._note(4, f"version {version} was committed at height {self._height}")
        parent = self._versions[-1].digest if self._versions else self._run_id
        if record["parent"] != parent:
            self._note(4, f"version {version} does not continue the version before it")
        self._versions.append(_Version(record["digest"], record["state_root"], record["at"]))
        self._numbers.add(version)
        if record.get("restores") is not None:
            self._rollback(record)
        elif version > 0:
            self._origin(record)
        self._plans, self._seals = {}, {}
        if len({contributor.get("iteration", 0) for contributor in record["contributors"]}) > 1:
            self._note(3, f"version {version} counts contributions of several iterations")
        for contributor in record["contributors"]:
            self._count(contributor, version)

    def _rollback(self, record: Record) -> None:
        """It has the state of an older version, and nothing was averaged for it."""
        version, older = record["version"], record["restores"]
        if not 0 <= older < self._height or record["state_root"] != self._versions[older].state_root:
            self._note(1, f"version {version} goes back to version {older}, and has another state root")
        if record["contributors"] or record["spans"]:
            self._note(2, f"version {version} goes back to version {older}, and counts contributions")

    def _origin(self, record: Record) -> None:
        """The manifest follows from its plan and seal, and the seal's coefficients from the plan's weights."""
        version = record["version"]
        plan, seal = self._plans.get(record["plan"]), self._seals.get(record["seal"])
        if plan is None or seal is None or seal["plan"] != plan["digest"] or plan["version"] != version:
            self._note(4, f"version {version} names a plan or a seal that was not made for it")
            return
        sealed = {item["peer"]: item["coefficient"] for item in seal["contributors"]}
        named = [contributor for contributor in plan["contributors"] if contributor["peer"] in sealed]
        if record["contributors"] != named or len(named) != len(sealed):
            self._note(2, f"version {version} names other contributors than its seal")
        total = sum(contributor["weight"] for contributor in named)
        if plan["rule"] == "mean" and any(
            sealed[contributor["peer"]] != fp32_bits(contributor["weight"] / total) for contributor in named
        ):
            self._note(5, f"the coefficients of version {version} are not the shares of the weight")
        if self._recompute is None:
            return
        for index, span in enumerate(record["spans"]):
            root = self._recompute(plan, seal, index)
            if root is not None and root.hex() != span["root"]:
                self._note(5, f"span {index} of version {version} is not its rule's result")

    def _count(self, contributor: Record, version: int) -> None:
        name = _name(contributor)
        contribution = self._contributions.get(name)
        if contribution is None:
            self._note(2, f"version {version} counts {_words(name)}, for which no contribution was taken")
            return
        if name in self._counted:
            self._note(3, f"the contribution of {_words(name)} is in versions {self._counted[name]} and {version}")
        if name in self._rejected:
            self._note(2, f"the contribution of {_words(name)} is in version {version}, and was rejected")
        if (contribution.weight, contribution.root) != (contributor["weight"], contributor["root"]):
            self._note(2, f"version {version} counts another contribution than {_words(name)} committed to")
        self._counted[name] = version
        lease, iteration = name
        if iteration:
            return
        start = self._leases[name].positions.start if name in self._leases else 0
        spent, live = self._spent, self._live
        for offset in contribution.used:
            position = start + offset
            if position in spent:
                self._note(3, f"position {position} counted for leases {spent[position]} and {lease}")
            spent[position] = lease
            live.pop(position, None)

    def _check_peer(self, peer: str, records: Iterable[Record]) -> None:
        for record in records:
            if record["kind"] == "contribution_acked" and _name(record) not in self._contributions:
                self._note(2, f"{_words(_name(record))} was acknowledged to {peer}, and is not in the log")
            if record["kind"] == "version":
                self._check_version(peer, record)

    def _check_version(self, peer: str, record: Record) -> None:
        version = record["version"]
        if not 0 <= version <= self._height:
            self._note(4, f"{peer} holds version {version}; the log ends at {self._height}")
            return
        committed = self._versions[version]
        if record["state_root"] != committed.state_root:
            self._note(1, f"{peer} holds version {version} with another state root than was committed")
        if record["manifest"] != committed.digest:
            self._note(4, f"{peer} holds another manifest of version {version} than the log")

    def _check_bans(self, judge: Judge) -> None:
        for peer, record in self._bans.items():
            proof = record["proof"]
            if proof is None:
                continue
            if peer not in judge(bytes.fromhex(proof["root"]), proof["size"]):
                self._note(6, f"{peer} is banned by a blob that does not prove its fault: {proof['root'][:16]}")

    def _check_calm(self, calm: Iterable[Calm]) -> None:
        for span in calm:
            limit = span.begin + span.within
            next_commit = min((version.at for version in self._versions if version.at > span.begin), default=None)
            if (next_commit is None or next_commit > limit) and span.end >= limit:
                self._note(7, f"no version was committed within {span.within:g} s of {span.begin:g}")
