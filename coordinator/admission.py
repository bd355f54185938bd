"""Who may join, and the one thing that stops a coordinator: a newer chain under its own signature."""

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.invites import ASK_HINT, invite_refusal
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.checks import check_addresses
from hivegrpo.protocol.config import AdmissionSection
from hivegrpo.protocol.envelope import PROTOCOL
from hivegrpo.protocol.errors import ChainError, FrameError, SignatureError, StaleError
from hivegrpo.protocol.invites import open_token

MAX_AGENT = 100


def refusal(join: pb.Join, peer: str, run: pb.RunManifest, admission: AdmissionSection) -> str | None:
    """Why a peer may not join, in words for its user; None if it may. FrameError for addresses that are not its own."""
    if join.protocol != PROTOCOL:
        theirs = join.protocol[:40] or "nothing"
        return f"protocol: this run speaks {PROTOCOL}, you speak {theirs}; upgrade with pip install -U hivegrpo"
    if join.known_answer != run.digests["known_answer"]:
        return (
            "numerics: your machine's known-answer digest differs from the run's, so its results would not agree "
            "with the others'; install the versions that the run uses, and see docs/operations.md"
        )
    if admission.mode == "allow_list" and peer not in admission.peers:
        return f"admission: {peer} is not on this run's list; ask whoever launched it to add this peer id"
    check_addresses(join.addresses)
    if any(address.rpartition("/p2p/")[2] != peer for address in join.addresses):
        raise FrameError("an address of the join does not end in the peer's own id")
    return None


def use_of_invite(
    state: State, join: pb.Join, peer: str, run_id: str, coordinator: str, now: float
) -> str | list[ev.Event]:
    """What happens by the invite that a join comes with, if this peer needs one; or why it may not join with it."""
    admission = state.terms.config.admission
    if admission.mode != "invite" or peer in state.members or peer in admission.peers:
        return []
    if not join.invite:
        return f"invite: this run admits by invite, and this peer came without one; {ASK_HINT}, and {GIVE_HINT}"
    try:
        token = open_token(join.invite, run_id, coordinator)
    except FrameError as error:
        return f"invite: this is no whole token ({error.message}); paste all of it"
    except StaleError as error:
        return f"invite: this token is for another run ({error.message}); check the address, or {ASK_HINT}"
    except SignatureError as error:
        return f"invite: this token is forged or damaged ({error.message}); {ASK_HINT}"
    refused = invite_refusal(state.invites, token, now)
    if refused is not None:
        return f"invite: {refused}"
    return [ev.InviteUsed(now, token.id.hex(), peer, float(token.expires), token.uses)]


GIVE_HINT = "give it with --invite, as HIVEGRPO_PEER_INVITE, or as invite in peer.toml"


def check_head(chain: Chain, presented: pb.Signed) -> None:
    """Compare a head that a peer once verified with our own chain.

    SignatureError if it does not carry our signature, or that of a coordinator before us on a version of its time.
    ChainError if it is newer than ours, or another one at its height: going on would fork the chain.
    """
    head = chain.open_version(presented)
    version = head.message.version
    if version <= chain.height and chain.entries[version].manifest.digest == head.digest:
        return
    raise ChainError(
        f"A peer holds version {version} ({head.digest.hex()[:16]}) under this coordinator's signature, but the chain "
        f"here ends at version {chain.height} without it: this home is older than the run, and going on would fork it.",
        "Start the coordinator from the newer home folder (restore it), or start a new run: see docs/operations.md.",
    )
