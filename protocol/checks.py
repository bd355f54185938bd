"""Structural checks of messages: bounds, lengths and internal consistency, before anything is computed with them.

Signatures say who wrote a message; these say that it makes sense on its own. All raise FrameError.
"""

import math
import sys
from collections.abc import Mapping, Sequence, Set

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import chunk_count
from hivegrpo.protocol.coefficients import coefficients
from hivegrpo.protocol.envelope import DIGEST_BYTES
from hivegrpo.protocol.errors import FrameError
from hivegrpo.protocol.scalars import StepScalars

MAX_METRICS = 64
MAX_METRIC_NAME = 64
MAX_METRIC = 1e30
"""Largest magnitude of a reported metric: what is summed and weighted over a whole roster stays finite."""

MAX_LEASE_POSITIONS = 1 << 18
"""Positions of a lease: its contribution, which lists them all, fits in a call, and no peer plans for ever."""

MAX_ADDRESSES = 16
MAX_ROSTER = 4096
MAX_REDUCERS = 64
MAX_NORM_BYTES = 64
"""Of a squared norm: reducers take at most 2^418 units a span, so 64 spans come to less than 2^425."""

SIGNATURE_BYTES = 64
MAX_REFUSED_REASON = 200
MAX_VALUES = 1 << 34
MAX_SECONDS = 86_400.0


def check_metrics(metrics: Mapping[str, float], most: float = MAX_METRIC) -> None:
    """Few, shortly named numbers of bounded magnitude."""
    if len(metrics) > MAX_METRICS:
        raise FrameError(f"{len(metrics)} metrics; at most {MAX_METRICS} are taken")
    for name in metrics:  # a map of protobuf's hands out its items through several calls each
        value = metrics[name]
        if len(name.encode()) > MAX_METRIC_NAME or not abs(value) <= most:
            raise FrameError(f"metric {name[:MAX_METRIC_NAME]!r} is too long, too large or not a number")


def check_digest(value: bytes, what: str) -> None:
    """Exactly 32 bytes."""
    if len(value) != DIGEST_BYTES:
        raise FrameError(f"{what} has {len(value)} bytes, not {DIGEST_BYTES}")


def check_addresses(addresses: Sequence[str]) -> None:
    """Few and short; that they parse is the dialler's business."""
    if len(addresses) > MAX_ADDRESSES or any(len(address.encode()) > 256 for address in addresses):
        raise FrameError("too many or too long addresses")


def check_seconds(value: float, what: str) -> None:
    """A positive duration of at most a day."""
    if not 0.0 < value <= MAX_SECONDS:
        raise FrameError(f"{what} is {value}, not a duration of at most {MAX_SECONDS:.0f} s")


def check_lease(lease: pb.Lease) -> None:
    """A non-empty range of bounded length, of which some is wanted, with a bound on its weight."""
    if lease.count == 0 or lease.max_weight == 0:
        raise FrameError("an empty lease")
    if lease.count > MAX_LEASE_POSITIONS:
        raise FrameError(f"a lease of {lease.count} positions; at most {MAX_LEASE_POSITIONS} are taken")
    if not 1 <= lease.wanted <= lease.count:
        raise FrameError(f"a lease of {lease.count} positions that wants {lease.wanted} of them")
    check_seconds(lease.seconds, "the lease's duration")


def check_contribution(contribution: pb.Contribution, lease: pb.Lease, rollout: Sequence[int] | None = None) -> None:
    """Each offset of the lease is accounted for exactly once, and the weight is within what the used ones allow.

    Returned offsets are the lease's last ones, so that nobody can shred the positions that others may lease.

    `rollout`, for iterations after 0: the offsets that iteration 0 used; they are used again, all or none.
    """
    check_digest(contribution.root, "the contribution's root")
    check_metrics(contribution.metrics)
    if contribution.iteration != lease.iteration:
        raise FrameError(f"iteration {contribution.iteration} of a lease that is at iteration {lease.iteration}")
    used, returned, count = contribution.used[:], contribution.returned[:], lease.count
    offsets = [*used, *contribution.dropped, *returned]
    if rollout is not None:
        if used not in ([], [*rollout]) or len(offsets) != len(used):
            raise FrameError("a later iteration does not use what iteration 0 used")
    elif len(offsets) != count or sorted(offsets) != list(range(count)):
        raise FrameError("used, dropped and returned offsets do not cover the lease exactly once")
    elif returned and sorted(returned) != list(range(count - len(returned), count)):
        raise FrameError("what is returned is not the end of the lease: positions are worked on in order")
    if len(used) > lease.wanted:
        raise FrameError(f"{len(used)} groups are used of a lease that wants {lease.wanted}")
    most = lease.max_weight * len(used) // lease.wanted
    if contribution.weight > most:
        raise FrameError(f"weight {contribution.weight} is above the lease's bound of {most} for what is used")
    if bool(used) != bool(contribution.weight):
        raise FrameError("a contribution has weight if and only if it uses a group")


def check_plan(plan: pb.RoundPlan) -> None:
    """A roster in canonical order, reducers whose spans cover all chunks in order, sane scalars and durations."""
    check_digest(plan.parent, "the plan's parent")
    if not 1 <= plan.values <= MAX_VALUES or plan.attempt < 1 or plan.version < 1:
        raise FrameError("the plan's version, attempt or vector length is out of range")
    peers = [contributor.peer for contributor in plan.contributors]
    if not 1 <= len(peers) <= MAX_ROSTER or peers != sorted(set(peers)):
        raise FrameError("the plan's roster is empty, too long, or not in order")
    for contributor in plan.contributors:
        check_digest(contributor.root, "a contributor's root")
        if contributor.weight == 0:
            raise FrameError("a contributor without weight")
        if contributor.iteration != plan.contributors[0].iteration:
            raise FrameError("a plan of contributions of several iterations")
    if not 1 <= len(plan.reducers) <= MAX_REDUCERS:
        raise FrameError(f"{len(plan.reducers)} reducers; between 1 and {MAX_REDUCERS} can serve")
    position = 0
    for reducer in plan.reducers:
        check_addresses(reducer.addresses)
        if reducer.first != position or reducer.chunks == 0 or reducer.peer not in peers:
            raise FrameError("the plan's spans are not contiguous, or a reducer is not in the roster")
        position += reducer.chunks
    if position != chunk_count(plan.values):
        raise FrameError("the plan's spans do not cover the vector")
    StepScalars.from_bits(list(plan.scalars))
    check_seconds(plan.exchange_seconds, "the exchange's duration")
    check_seconds(plan.step_seconds, "the step's duration")
    check_seconds(plan.audit_seconds, "the audit's duration")


def check_sender_report(report: pb.SenderReport, roster: Set[str]) -> None:
    """Names each complete sender of the plan's roster at most once, with an exact norm of bounded size."""
    complete = report.complete[:]  # a slice makes its items once, and faster than a loop does
    if any(len(item.norm_squared) > MAX_NORM_BYTES for item in complete):
        raise FrameError("a norm is longer than any fp32 vector's")
    if not all(0.0 <= item.seconds <= MAX_SECONDS for item in complete):
        raise FrameError("a push took no such time")
    peers = {item.peer for item in complete}
    if len(peers) != len(complete) or not peers <= roster:
        raise FrameError("a sender is named twice, or is not in the plan's roster")
    refused = {item.peer for item in report.refused}
    if len(refused) != len(report.refused) or not refused <= roster or refused & peers:
        raise FrameError("a sender was refused twice, is complete as well, or is not in the plan's roster")
    if any(len(item.reason) > MAX_REFUSED_REASON for item in report.refused):
        raise FrameError("a refusal's reason is too long")


def check_seal(seal: pb.Seal, plan: pb.RoundPlan) -> None:
    """A non-empty subset of the plan's roster, in its order, with the coefficients that weights and norms give."""
    check_digest(seal.plan, "the seal's plan")
    peers = [sealed.peer for sealed in seal.contributors]
    weights = {contributor.peer: contributor.weight for contributor in plan.contributors}
    if not peers or peers != sorted(set(peers)) or not set(peers) <= weights.keys():
        raise FrameError("the seal's contributors are not an ordered subset of the plan's roster")
    if any(len(sealed.norm_squared) > MAX_NORM_BYTES for sealed in seal.contributors):
        raise FrameError("a norm is longer than any fp32 vector's")
    norms = [int.from_bytes(sealed.norm_squared, "big") for sealed in seal.contributors]
    if coefficients(plan.rule, [weights[peer] for peer in peers], norms) != [
        sealed.coefficient for sealed in seal.contributors
    ]:
        raise FrameError("the seal's coefficients are not those of its norms and the plan's weights")


def check_step_report(report: pb.StepReport, plan: pb.RoundPlan) -> None:
    """One span per reducer, well-formed digests and signatures, measurements of bounded size."""
    check_digest(report.state_root, "the state root")
    check_digest(report.seal, "the seal's digest")
    check_metrics(report.metrics)
    reducers = len(plan.reducers)
    if len(report.spans) != reducers:
        raise FrameError(f"{len(report.spans)} spans for {reducers} reducers")
    if {len(span.root) for span in report.spans[:]} != {DIGEST_BYTES}:
        raise FrameError(f"the root of a span does not have {DIGEST_BYTES} bytes")
    if len(report.receipts) != reducers or set(map(len, report.receipts)) != {SIGNATURE_BYTES}:
        raise FrameError("a vote has one receipt's signature a span")
    if len(report.seconds) not in (0, reducers) or not all(0.0 <= s <= MAX_SECONDS for s in report.seconds):
        raise FrameError("a vote has one duration a span, or none")
    if len(report.dots) > len(plan.contributors) + 1 or not all(map(math.isfinite, report.dots)):
        raise FrameError("a vote has more inner products than contributors, or one that is not finite")


def check_manifest(manifest: pb.VersionManifest) -> None:
    """Well-formed digests and a reference that exists; version 0 and rollbacks have no plan, all others have one."""
    check_digest(manifest.parent, "the manifest's parent")
    check_digest(manifest.state.root, "the state root")
    check_metrics(manifest.metrics, most=sys.float_info.max)
    if manifest.reference_version > manifest.version:
        raise FrameError(f"version {manifest.version} refers to version {manifest.reference_version}, which is to come")
    restores = manifest.HasField("restores")
    if restores and (manifest.restores >= manifest.version or manifest.spans or manifest.contributors):
        raise FrameError(f"version {manifest.version} is no rollback to an older version")
    for digest in (manifest.plan, manifest.seal):
        if manifest.version == 0 or restores:
            if digest:
                raise FrameError(f"version {manifest.version} names a plan or a seal")
        else:
            check_digest(digest, "the manifest's plan or seal")
    for span in manifest.spans:
        check_digest(span.root, "a span's root")
