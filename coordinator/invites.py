"""Invites: which tokens were given out, who came with them, and which are revoked. Pure.

What a token allows is in the token itself, under the coordinator's signature; what became of it is here. The first
peer of a single-use token has it: it is a member from then on, and members need none.
"""

from dataclasses import dataclass, field
from typing import Literal

from hivegrpo.protocol import hivegrpo_pb2 as pb

Standing = Literal["open", "used", "expired", "revoked"]


@dataclass(slots=True)
class Invite:
    """One token, by what is known of it."""

    expires: float
    """Unix time, by the coordinator's clock."""
    uses: int
    """Peers that may join with it; 0 for any number."""
    note: str = ""
    """For whom it is, in its maker's words."""
    peers: dict[str, None] = field(default_factory=dict)
    """Who joined with it, in that order."""
    revoked: bool = False

    def standing(self, now: float) -> Standing:
        """Whether another peer could join with it now, or why not."""
        if self.revoked:
            return "revoked"
        if now >= self.expires:
            return "expired"
        return "used" if self.uses and len(self.peers) >= self.uses else "open"


def invite_refusal(invites: dict[str, Invite], token: pb.Invite, now: float) -> str | None:
    """Why nobody can join with a genuine token any more, in words for who holds it; None if somebody can."""
    name = token.id.hex()
    invite = invites.get(name) or Invite(token.expires, token.uses)
    match invite.standing(now):
        case "open":
            return None
        case "revoked":
            return f"invite {name} was revoked; {ASK_HINT}"
        case "expired":
            return f"invite {name} expired {_ago(now - invite.expires)} ago; {ASK_HINT}"
        case "used":
            number = "another peer" if invite.uses == 1 else f"{invite.uses} other peers"
            return f"invite {name} was used by {number}, and serves no further one; {ASK_HINT}"


def _ago(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.0f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


ASK_HINT = "ask whoever launched the run for another one"
