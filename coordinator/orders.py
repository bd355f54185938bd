"""What whoever operates a run may order, as it comes over the coordinator's local socket."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from hivegrpo.protocol.invites import MAX_USES

MAX_TEXT = 200
MAX_HOURS = 10 * 366 * 24.0

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Version = Annotated[int, Field(ge=0, lt=2**63)]
Hours = Annotated[float, Field(gt=0.0, le=MAX_HOURS)]


class _Order(BaseModel):
    """One JSON object; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Status(_Order):
    """Tell how the run stands."""

    command: Literal["status"]


class Pause(_Order):
    """Grant no more leases; the round in flight ends with what it has."""

    command: Literal["pause"]
    reason: Text = ""


class Resume(_Order):
    """Grant leases again."""

    command: Literal["resume"]


class PromoteReference(_Order):
    """Move the KL reference, from the next version on: to that version itself, or to an older one."""

    command: Literal["promote-reference"]
    version: Version | None = None


class Rollback(_Order):
    """Make a new version whose state is that of an older one."""

    command: Literal["rollback"]
    version: Version


class BanPeer(_Order):
    """Keep a peer out, for some hours or until it is unbanned."""

    command: Literal["ban"]
    peer: Text
    reason: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    hours: Hours | None = None


class Unban(_Order):
    """Let a peer in again that an operator banned."""

    command: Literal["unban"]
    peer: Text


class MakeInvite(_Order):
    """Make a token to join with."""

    command: Literal["invite"]
    hours: Hours = 72.0
    uses: Annotated[int, Field(ge=0, le=MAX_USES)] = 1
    note: Text = ""


class Revoke(_Order):
    """Let nobody join with a token any more; named by its id, or by the token itself."""

    command: Literal["revoke"]
    invite: Annotated[str, Field(max_length=2 * MAX_TEXT)]


Order = Status | Pause | Resume | PromoteReference | Rollback | BanPeer | Unban | MakeInvite | Revoke

read_order: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="command")])
