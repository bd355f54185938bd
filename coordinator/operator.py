"""Carries out what an operator orders: each order becomes events, or is refused with what to do instead."""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator import orders
from hivegrpo.coordinator.ahead import expire_all
from hivegrpo.coordinator.rollback import rollback_events
from hivegrpo.coordinator.state import Phase, State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.errors import ConfigError, WireError
from hivegrpo.protocol.identity import Identity, public_key_of
from hivegrpo.protocol.invites import ID_BYTES, PREFIX, make_token, open_token

SHOWN_VERSIONS = 20

Answer = dict[str, Any]


class Operator:
    """One coordinator's. Orders are answered once what they change is on disk."""

    def __init__(
        self,
        *,
        identity: Identity,
        chain: Chain,
        blobs: BlobStore,
        state: Callable[[], State],
        ready: Callable[[], Awaitable[object]],
        happen: Callable[[Sequence[ev.Event]], None],
        written: Callable[[], Awaitable[None]],
        snapshot: Callable[[], Answer],
        clock: Callable[[], float],
    ) -> None:
        self._identity = identity
        self._chain = chain
        self._blobs = blobs
        self._state = state
        self._ready = ready
        self._happen = happen
        self._written = written
        self._snapshot = snapshot
        self._clock = clock

    async def execute(self, order: orders.Order) -> Answer:
        """The answer to an order, once the coordinator has read its log.

        ConfigError if it cannot be carried out; nothing has changed then. RemoteError if the coordinator is stopping.
        """
        await self._ready()
        match order:
            case orders.Status():
                return self._snapshot() | {"invites": self._invites()}
            case orders.Pause(reason=reason):
                answer = self._pause(reason)
            case orders.Resume():
                answer = self._resume()
            case orders.PromoteReference(version=version):
                answer = self._promote(version)
            case orders.Rollback(version=version):
                answer = self._rollback(version)
            case orders.BanPeer():
                answer = self._ban(order)
            case orders.Unban(peer=peer):
                answer = self._unban(peer)
            case orders.MakeInvite():
                answer = self._invite(order)
            case orders.Revoke(invite=invite):
                answer = self._revoke(invite)
        await self._written()
        return answer

    def _pause(self, reason: str) -> Answer:
        if not self._state().paused:
            self._happen([ev.RunPaused(self._clock(), reason)])
        return {"paused": True}

    def _resume(self) -> Answer:
        if self._state().paused:
            self._happen([ev.RunResumed(self._clock())])
        return {"paused": False}

    def _promote(self, reference: int | None) -> Answer:
        state, now = self._state(), self._clock()
        self._require_going_on("promote")
        if state.terms.config.grpo.beta == 0.0:
            raise ConfigError("With [grpo] beta = 0 the run has no KL reference.", "There is nothing to promote.")
        if reference is not None:
            self._require_held(reference, "the reference")
        why = "the KL reference is to move"
        self._happen([*expire_all(state, now, why), ev.ReferencePromoted(now, state.round.version, reference)])
        version = state.round.version
        return {"version": version, "reference_version": version if reference is None else reference}

    def _rollback(self, version: int) -> Answer:
        state = self._state()
        self._require_going_on("roll back")
        if version == state.version:
            raise ConfigError(f"The newest version is {version} already.", "Name an older one.")
        self._require_held(version, "the new version")
        target = self._chain.entries[version].manifest.message
        if state.terms.config.grpo.beta > 0.0:
            self._require_held(target.reference_version, f"the KL reference at version {version}")
        self._happen(list(rollback_events(state, target, self._clock())))
        return {"version": state.version, "restores": version, "state_root": target.state.root.hex()}

    def _ban(self, order: orders.BanPeer) -> Answer:
        state, now = self._state(), self._clock()
        _require_peer_id(order.peer)
        held = state.banned.get(order.peer)
        if held is not None and held.proved:
            raise ConfigError(f"This peer is banned for good, by proof: {held.reason}.", "Nothing is left to do.")
        until = None if order.hours is None else now + 3600.0 * order.hours
        self._happen([ev.PeerBanned(now, order.peer, order.reason, until=until)])
        return {"peer": order.peer, "reason": order.reason, "until": until}

    def _unban(self, peer: str) -> Answer:
        held = self._state().banned.get(peer)
        if held is None:
            raise ConfigError("This peer is not banned.", "`hivegrpo coordinator status` lists who is.")
        if held.proved:
            raise ConfigError(
                f"This peer is banned by proof: {held.reason}.",
                "Such a ban stays. Whoever runs it can join with another identity, if the run lets it in.",
            )
        self._happen([ev.BanLifted(self._clock(), peer, "lifted by the operator")])
        return {"peer": peer}

    def _invite(self, order: orders.MakeInvite) -> Answer:
        now = self._clock()
        name, expires = secrets.token_hex(ID_BYTES), int(now + 3600.0 * order.hours)
        token = make_token(self._identity, self._chain.run_id, name, expires, order.uses)
        self._happen([ev.InviteIssued(now, name, float(expires), order.uses, order.note)])
        return {"token": token, "invite": name, "expires": expires, "uses": order.uses, "note": order.note}

    def _revoke(self, name: str) -> Answer:
        if name.startswith(PREFIX):
            try:
                name = open_token(name, self._chain.run_id, self._identity.peer_id).id.hex()
            except WireError as error:
                raise ConfigError(f"This token cannot be revoked: {error}.", "Name an invite by its id.") from None
        invite = self._state().invites.get(name)
        if invite is None:
            raise ConfigError(
                f"No invite has the id {name[:32]!r}.", "`hivegrpo coordinator status` lists them with their ids."
            )
        if not invite.revoked:
            self._happen([ev.InviteRevoked(self._clock(), name)])
        return {"invite": name, "joined": list(invite.peers)}

    def _invites(self) -> list[Answer]:
        now = self._clock()
        return [
            {
                "invite": name,
                "standing": invite.standing(now),
                "expires": invite.expires,
                "uses": invite.uses,
                "note": invite.note,
                "joined": list(invite.peers),
            }
            for name, invite in self._state().invites.items()
        ]

    def _require_going_on(self, what: str) -> None:
        match self._state().phase:
            case Phase.GENESIS:
                raise ConfigError(f"There is no version to {what} yet.", "Wait until version 0 is agreed.")
            case Phase.FINISHED:
                raise ConfigError(
                    f"The run is finished, so there is nothing to {what}.",
                    "`hivegrpo export --revision N` gives an older version; begin a new run from it to train on.",
                )
            case _:
                return

    def _require_held(self, version: int, what: str) -> None:
        """ConfigError unless the coordinator can serve the state of that version, or peers make it from the seed."""
        entries = self._chain.entries
        if version < len(entries) and self._is_held(entries[version].manifest.message):
            return
        held = [entry.manifest.message.version for entry in entries if self._is_held(entry.manifest.message)]
        known = "its state is not kept here" if version < len(entries) else f"the newest is {self._chain.height}"
        raise ConfigError(
            f"Version {version} cannot be {what}: {known}.",
            f"Kept here are {', '.join(map(str, held[-SHOWN_VERSIONS:]))}: choose one of these.",
        )

    def _is_held(self, manifest: pb.VersionManifest) -> bool:
        of_seed = self._chain.entries[0].manifest.message.state.root
        return manifest.state.root == of_seed or self._blobs.has(BlobRef(manifest.state.root, manifest.state.size))


def _require_peer_id(peer: str) -> None:
    try:
        public_key_of(peer)
    except WireError as error:
        raise ConfigError(
            f"{peer[:60]!r} is no peer id: {error}.", "`hivegrpo coordinator status` lists them."
        ) from None
