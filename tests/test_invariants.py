"""The checker finds nothing in a faithful history, and each planted lie."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from hivegrpo.protocol.history import Record
from hivegrpo.protocol.invariants import Violation, check
from hivegrpo.protocol.scalars import fp32_bits

RUN = "f" * 64


def root(*parts: object) -> str:
    return "".join(str(part) for part in parts).encode().hex().ljust(64, "0")[:64]


class Histories:
    """What a coordinator and two peers wrote: two versions of two contributions each, a lost lease, an empty one."""

    def __init__(self) -> None:
        self.coordinator: list[Record] = [{"kind": "run", "run_id": RUN}, {"kind": "started", "at": 0.0}]
        self.peers: dict[str, list[Record]] = {"alice": [], "bob": []}
        self.commit(0, parent=RUN, plan="", seal="", contributors=[])
        self.next_lease = 1
        self.position = 0
        self.round(1)
        self.coordinator.append({"kind": "started", "at": 9.0})
        self.round(2)
        self.lease("alice", 2, 0)  # in flight at the end
        self.contribute("alice", 2, used=[0, 1, 2], dropped=[3])

    def lease(self, peer: str, version: int, returned: int) -> None:
        self.coordinator.append(
            {
                "kind": "lease",
                "lease": self.next_lease,
                "peer": peer,
                "version": version,
                "start": self.position,
                "count": 4,
            }
        )
        self.next_lease += 1
        self.position += 4 - returned

    def contribute(self, peer: str, version: int, **offsets: list[int]) -> Record:
        lease = self.next_lease - 1
        groups = {"used": [], "dropped": [], "returned": [], **offsets}
        record: Record = {
            "kind": "contribution",
            "lease": lease,
            "peer": peer,
            "version": version,
            **groups,
            "weight": 8 * len(groups["used"]),
            "root": root(peer, lease),
        }
        self.coordinator.append(record)
        self.peers[peer].append({"kind": "contribution_acked", "lease": lease})
        return {"peer": peer, "lease": lease, "weight": record["weight"], "root": record["root"]}

    def round(self, version: int) -> None:
        before = version - 1
        self.lease("bob", before, 4)
        self.coordinator.append({"kind": "lease_expired", "lease": self.next_lease - 1, "reason": "lost"})
        self.lease("bob", before, 1)
        bob = self.contribute("bob", before, used=[0, 1], dropped=[2], returned=[3])
        self.lease("alice", before, 0)
        alice = self.contribute("alice", before, used=[0, 1, 2, 3])
        self.lease("bob", before, 0)
        empty = self.contribute("bob", before, dropped=[0, 1, 2, 3])
        assert empty["weight"] == 0
        self.lease("bob", before, 4)
        slow = self.contribute("bob", before, used=[0, 1, 2, 3])
        rejection = {"kind": "contribution_rejected", "lease": slow["lease"], "peer": "bob", "reason": "peer lost"}
        self.coordinator.append(rejection)
        contributors = [alice, bob]
        plan: Record = {"kind": "plan", "digest": root("plan", version), "version": version, "attempt": 1}
        self.coordinator.append({**plan, "rule": "mean", "contributors": contributors, "reducers": [{}, {}]})
        total = alice["weight"] + bob["weight"]
        sealed = [{"peer": one["peer"], "coefficient": fp32_bits(one["weight"] / total)} for one in contributors]
        digest = root("seal", version)
        self.coordinator.append({"kind": "seal", "digest": digest, "plan": plan["digest"], "contributors": sealed})
        parent = next(r["digest"] for r in reversed(self.coordinator) if r["kind"] == "version")
        self.commit(version, parent=parent, plan=plan["digest"], seal=digest, contributors=contributors)

    def commit(self, version: int, **fields: Any) -> None:
        spans = [{"root": root("span", version, index), "size": 1} for index in range(2 if version else 0)]
        record = {"kind": "version", "version": version, "digest": root("manifest", version), "spans": spans}
        self.coordinator.append({**record, "state_root": root("state", version), **fields})
        for peer in self.peers.values():
            held = {"version": version, "state_root": root("state", version), "manifest": record["digest"]}
            peer.append({"kind": "version", **held})

    def first(self, kind: str, **fields: Any) -> Record:
        """A record of the coordinator's."""
        return next(
            record
            for record in self.coordinator
            if record["kind"] == kind and all(record[name] == value for name, value in fields.items())
        )

    def check(self) -> list[Violation]:
        return check(self.coordinator, self.peers, honest_recompute)


def honest_recompute(plan: Record, seal: Record, index: int) -> bytes | None:
    assert seal["plan"] == plan["digest"]
    return bytes.fromhex(root("span", plan["version"], index)) if plan["version"] == 2 else None


def other_state(histories: Histories) -> None:
    next(r for r in histories.peers["bob"] if r.get("version") == 1)["state_root"] = root("state", "other")


def forgotten_acknowledgement(histories: Histories) -> None:
    histories.peers["alice"].append({"kind": "contribution_acked", "lease": 99})


def unresolved(histories: Histories) -> None:
    histories.coordinator.remove(histories.first("contribution_rejected"))


def no_reason(histories: Histories) -> None:
    histories.first("contribution_rejected")["reason"] = ""


def counted_and_rejected(histories: Histories) -> None:
    counted = histories.first("version", version=1)["contributors"][0]
    rejection = {"kind": "contribution_rejected", "lease": counted["lease"], "peer": "alice", "reason": "late"}
    histories.coordinator.append(rejection)


def unsealed_contributor(histories: Histories) -> None:
    histories.first("seal")["contributors"].pop()


def swapped_contribution(histories: Histories) -> None:
    histories.first("contribution", lease=3)["root"] = root("other")


def position_in_two_leases(histories: Histories) -> None:
    histories.first("lease", lease=8)["start"] = histories.first("lease", lease=3)["start"]


def position_counted_twice(histories: Histories) -> None:
    """The returned position is counted all the same."""
    contribution = histories.first("contribution", lease=2)
    contribution["used"] = [0, 1, 3]


def contribution_in_two_versions(histories: Histories) -> None:
    second = histories.first("version", version=2)
    second["contributors"] = copy.deepcopy(histories.first("version", version=1)["contributors"])


def version_twice(histories: Histories) -> None:
    histories.coordinator.append(dict(histories.first("version", version=2)))


def gap(histories: Histories) -> None:
    histories.coordinator.remove(histories.first("version", version=1))


def fork_in_the_log(histories: Histories) -> None:
    histories.first("version", version=2)["parent"] = root("manifest", 0)


def other_run(histories: Histories) -> None:
    histories.first("version", version=0)["parent"] = "0" * 64


def fork_at_a_peer(histories: Histories) -> None:
    next(r for r in histories.peers["bob"] if r.get("version") == 2)["manifest"] = root("other")


def peer_ahead_of_the_log(histories: Histories) -> None:
    held = {"kind": "version", "version": 3, "state_root": root("state", 3), "manifest": root("manifest", 3)}
    histories.peers["alice"].append(held)


def foreign_plan(histories: Histories) -> None:
    histories.first("version", version=2)["plan"] = root("plan", 1)


def lease_number_again(histories: Histories) -> None:
    """As after a restart from an older log."""
    histories.first("lease", lease=7)["lease"] = 3


def lying_reducer(histories: Histories) -> None:
    histories.first("version", version=2)["spans"][1]["root"] = root("lie")


def wrong_share(histories: Histories) -> None:
    histories.first("seal")["contributors"][0]["coefficient"] += 1


def test_a_faithful_history_has_no_violation() -> None:
    assert Histories().check() == []


@pytest.mark.parametrize(
    ("lie", "invariant", "words"),
    [
        (other_state, 1, "another state root"),
        (forgotten_acknowledgement, 2, "is not in the log"),
        (unresolved, 2, "in no manifest and was not rejected"),
        (no_reason, 2, "without a reason"),
        (counted_and_rejected, 2, "after it was settled"),
        (unsealed_contributor, 2, "other contributors than its seal"),
        (swapped_contribution, 2, "another contribution than lease"),
        (position_in_two_leases, 3, "was taken by lease"),
        (position_counted_twice, 3, "position 3"),
        (contribution_in_two_versions, 3, "is in versions 1 and 2"),
        (version_twice, 3, "committed twice"),
        (gap, 4, "was committed at height 0"),
        (fork_in_the_log, 4, "does not continue"),
        (other_run, 4, "does not continue"),
        (fork_at_a_peer, 4, "another manifest"),
        (peer_ahead_of_the_log, 4, "the log ends at 2"),
        (foreign_plan, 4, "a plan or a seal that was not made for it"),
        (lease_number_again, 4, "was granted after"),
        (lying_reducer, 5, "span 1 of version 2"),
        (wrong_share, 5, "shares of the weight"),
    ],
)
def test_each_lie_is_found(lie: Callable[[Histories], None], invariant: int, words: str) -> None:
    histories = Histories()
    lie(histories)
    found = histories.check()
    assert any(violation.invariant == invariant and words in violation.text for violation in found), found


def test_chunks_that_are_gone_are_not_judged() -> None:
    histories = Histories()
    histories.first("version", version=1)["spans"][0]["root"] = root("lie")
    assert histories.check() == []


def test_what_is_in_flight_at_the_end_may_be_open() -> None:
    histories = Histories()
    assert histories.coordinator[-1]["kind"] == "contribution"
    histories.coordinator[-1]["version"] = 1
    assert [violation.invariant for violation in histories.check()] == [2]
