"""The checker finds nothing in a faithful history, and each planted lie."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from hivegrpo.protocol.history import Record
from hivegrpo.protocol.invariants import Calm, Checker, Violation, check
from hivegrpo.protocol.scalars import fp32_bits

RUN = "f" * 64


def root(*parts: object) -> str:
    return "".join(str(part) for part in parts).encode().hex().ljust(64, "0")[:64]


class Histories:
    """What a coordinator and two peers wrote: two versions of two contributions each, a lost lease, an empty one.

    Version 3 is a second gradient of the rollouts of version 2; of the third one nothing comes.
    """

    def __init__(self) -> None:
        self.coordinator: list[Record] = [{"kind": "run", "run_id": RUN}, {"kind": "started", "at": 0.0}]
        self.peers: dict[str, list[Record]] = {"alice": [], "bob": []}
        self.commit(0, parent=RUN, plan="", seal="", contributors=[])
        self.next_lease = 1
        self.position = 0
        self.round(1)
        self.coordinator.append({"kind": "started", "at": 9.0})
        self.round(2)
        self.again(3)
        self.renew(7, 3, 2)
        self.coordinator.append({"kind": "lease_expired", "lease": 7, "iteration": 2, "reason": "lost"})
        self.renew(8, 3, 2)
        self.contribute("alice", 3, lease=8, iteration=2)
        self.coordinator.append({"kind": "round_abandoned", "version": 4, "reason": "no rollout is left"})
        self.lease("alice", 3, 0)  # in flight at the end
        self.contribute("alice", 3, used=[0, 1, 2], dropped=[3])

    def lease(self, peer: str, version: int, returned: int) -> None:
        self.coordinator.append(
            {
                "kind": "lease",
                "lease": self.next_lease,
                "iteration": 0,
                "peer": peer,
                "version": version,
                "start": self.position,
                "count": 4,
            }
        )
        self.next_lease += 1
        self.position += 4 - returned

    def renew(self, lease: int, version: int, iteration: int) -> None:
        before = self.first("lease", lease=lease)
        self.coordinator.append({**before, "version": version, "iteration": iteration})

    def contribute(
        self, peer: str, version: int, lease: int | None = None, iteration: int = 0, **offsets: list[int]
    ) -> Record:
        lease = self.next_lease - 1 if lease is None else lease
        groups = {"used": [], "dropped": [], "returned": [], **offsets}
        record: Record = {
            "kind": "contribution",
            "lease": lease,
            "iteration": iteration,
            "peer": peer,
            "version": version,
            **groups,
            "weight": 8 * len(groups["used"]),
            "root": root(peer, lease, iteration),
        }
        self.coordinator.append(record)
        self.peers[peer].append({"kind": "contribution_acked", "lease": lease, "iteration": iteration})
        named = ("peer", "lease", "iteration", "weight", "root")
        return {name: record[name] for name in named}

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
        self.average(version, [alice, bob])

    def again(self, version: int) -> None:
        """The next iteration of the version before."""
        before = self.first("version", version=version - 1)["contributors"]
        for one in before:
            self.renew(one["lease"], version - 1, one["iteration"] + 1)
        alice, bob = (
            self.contribute(
                one["peer"],
                version - 1,
                lease=one["lease"],
                iteration=one["iteration"] + 1,
                used=self.first("contribution", lease=one["lease"])["used"],
            )
            for one in before
        )
        self.average(version, [alice, bob])

    def average(self, version: int, contributors: list[Record]) -> None:
        plan: Record = {"kind": "plan", "digest": root("plan", version), "version": version, "attempt": 1}
        self.coordinator.append({**plan, "rule": "mean", "contributors": contributors, "reducers": [{}, {}]})
        total = sum(one["weight"] for one in contributors)
        sealed = [{"peer": one["peer"], "coefficient": fp32_bits(one["weight"] / total)} for one in contributors]
        digest = root("seal", version)
        self.coordinator.append({"kind": "seal", "digest": digest, "plan": plan["digest"], "contributors": sealed})
        parent = next(r["digest"] for r in reversed(self.coordinator) if r["kind"] == "version")
        self.commit(version, parent=parent, plan=plan["digest"], seal=digest, contributors=contributors)

    def commit(self, version: int, **fields: Any) -> None:
        spans = [{"root": root("span", version, index), "size": 1} for index in range(2 if version else 0)]
        at = 10.0 * version
        record = {"kind": "version", "at": at, "version": version, "digest": root("manifest", version), "spans": spans}
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

    def ban(self, peer: str) -> None:
        proof = {"root": root("proof of", peer), "size": 9}
        self.coordinator.append({"kind": "banned", "peer": peer, "reason": "it lied", "proof": proof})

    def check(self, *calm: Calm) -> list[Violation]:
        return check(self.coordinator, self.peers, honest_recompute, honest_judge, calm)


def honest_judge(blob: bytes, size: int) -> list[str]:
    """There is a proof against carol, and nobody else."""
    return ["carol"] if (blob.hex(), size) == (root("proof of", "carol"), 9) else []


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
    held = {"kind": "version", "version": 4, "state_root": root("state", 4), "manifest": root("manifest", 4)}
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


def renewed_with_other_prompts(histories: Histories) -> None:
    histories.first("lease", lease=8, iteration=1)["start"] += 1


def renewed_for_another_peer(histories: Histories) -> None:
    histories.first("lease", lease=8, iteration=1)["peer"] = "bob"


def iteration_left_out(histories: Histories) -> None:
    histories.first("lease", lease=8, iteration=1)["iteration"] = 2


def renewed_after_a_rejection(histories: Histories) -> None:
    """Lease 10 had been rejected when version 2 was made."""
    rejected = histories.first("lease", lease=10)
    after = histories.coordinator.index(histories.first("version", version=2)) + 1
    histories.coordinator.insert(after, {**rejected, "version": 2, "iteration": 1})


def other_positions_again(histories: Histories) -> None:
    histories.first("contribution", lease=8, iteration=1)["used"] = [0, 1, 2]


def positions_given_back_late(histories: Histories) -> None:
    histories.first("contribution", lease=8, iteration=1).update(used=[0, 1], returned=[2, 3])


def iteration_twice(histories: Histories) -> None:
    contribution = histories.first("contribution", lease=8, iteration=1)
    histories.coordinator.insert(histories.coordinator.index(contribution), dict(contribution))


def iteration_never_granted(histories: Histories) -> None:
    histories.coordinator.remove(histories.first("lease", lease=8, iteration=1))


def iteration_unresolved(histories: Histories) -> None:
    histories.first("version", version=3)["contributors"].pop()


def iteration_rejected_and_counted(histories: Histories) -> None:
    rejection = {"kind": "contribution_rejected", "lease": 8, "iteration": 1, "peer": "alice", "reason": "late"}
    histories.coordinator.insert(histories.coordinator.index(histories.first("version", version=3)), rejection)


def iterations_mixed(histories: Histories) -> None:
    histories.first("version", version=3)["contributors"][0]["iteration"] = 0


def iteration_counted_twice(histories: Histories) -> None:
    contributors = histories.first("version", version=3)["contributors"]
    contributors.append(contributors[0])


def forgotten_iteration(histories: Histories) -> None:
    histories.peers["alice"].append({"kind": "contribution_acked", "lease": 8, "iteration": 3})


def banned_without_a_proof(histories: Histories) -> None:
    histories.ban("alice")


def planned_after_a_ban(histories: Histories) -> None:
    histories.ban("bob")
    histories.again(4)


def test_a_ban_that_is_proved_is_no_violation() -> None:
    histories = Histories()
    histories.ban("carol")
    assert histories.check() == []


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
        (peer_ahead_of_the_log, 4, "the log ends at 3"),
        (foreign_plan, 4, "a plan or a seal that was not made for it"),
        (lease_number_again, 4, "was granted after"),
        (renewed_with_other_prompts, 3, "lease 8, iteration 1 does not renew"),
        (renewed_for_another_peer, 3, "lease 8, iteration 1 does not renew"),
        (iteration_left_out, 3, "lease 8, iteration 2 does not renew"),
        (renewed_after_a_rejection, 3, "lease 10, iteration 1 goes on with a rollout"),
        (other_positions_again, 3, "uses other positions than iteration 0"),
        (positions_given_back_late, 3, "uses other positions than iteration 0"),
        (iteration_twice, 3, "two contributions were taken for lease 8, iteration 1"),
        (iteration_never_granted, 3, "lease 8, iteration 1, which was never granted"),
        (iteration_unresolved, 2, "lease 7, iteration 1 is in no manifest and was not rejected"),
        (iteration_rejected_and_counted, 2, "lease 8, iteration 1 is in version 3, and was rejected"),
        (iterations_mixed, 3, "version 3 counts contributions of several iterations"),
        (iteration_counted_twice, 3, "lease 8, iteration 1 is in versions 3 and 3"),
        (forgotten_iteration, 2, "lease 8, iteration 3 was acknowledged"),
        (lying_reducer, 5, "span 1 of version 2"),
        (wrong_share, 5, "shares of the weight"),
        (banned_without_a_proof, 6, "alice is banned by a blob that does not prove its fault"),
        (planned_after_a_ban, 6, "bob was banned, and is in a later plan, of version 4"),
    ],
)
def test_each_lie_is_found(lie: Callable[[Histories], None], invariant: int, words: str) -> None:
    histories = Histories()
    lie(histories)
    found = histories.check()
    assert any(violation.invariant == invariant and words in violation.text for violation in found), found


def test_a_version_that_comes_too_late_after_the_last_fault_is_found() -> None:
    """Versions are committed at 0, 10, 20 and 30 seconds."""
    histories = Histories()
    late = Calm(begin=10.0, end=60.0, within=9.9)
    assert histories.check(late) == [Violation(7, "no version was committed within 9.9 s of 10")]
    never = Calm(begin=30.0, end=60.0, within=30.0)
    assert histories.check(never) == [Violation(7, "no version was committed within 30 s of 30")]
    in_time, not_over_yet = Calm(10.0, 60.0, 10.0), Calm(30.0, 59.9, 30.0)
    assert histories.check(in_time, not_over_yet) == []


def test_chunks_that_are_gone_are_not_judged() -> None:
    histories = Histories()
    histories.first("version", version=1)["spans"][0]["root"] = root("lie")
    assert histories.check() == []


def test_what_is_in_flight_at_the_end_may_be_open() -> None:
    histories = Histories()
    assert histories.coordinator[-1]["kind"] == "contribution"
    histories.coordinator[-1]["version"] = 2
    assert [violation.invariant for violation in histories.check()] == [2]


def test_what_a_damaged_record_broke_is_not_laid_to_the_next() -> None:
    checker = Checker()
    with pytest.raises(KeyError):
        checker.take(
            {"kind": "version", "version": 5, "parent": "another", "digest": "d", "state_root": "r", "at": 0.0}
        )
    assert checker.take({"kind": "run", "run_id": RUN}) == []
