"""The commands of `hivegrpo coordinator` that operate a run: parse, then import what the command needs."""

from pathlib import Path
from typing import Annotated

import typer

coordinator_app = typer.Typer(help="Launch a run: admit peers, time the rounds, sign the versions. And operate it.")

Home = Annotated[Path | None, typer.Option(help="The coordinator's home; the one that runs here if left out.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Peer = Annotated[str, typer.Argument(help="Peer id.")]


@coordinator_app.command()
def status(home: Home = None, as_json: Json = False) -> None:
    """How the run stands: phase, newest version, peers, invites, bans."""
    _order({"command": "status"}, home, as_json)


@coordinator_app.command()
def pause(
    reason: Annotated[str, typer.Option(help="Told to the peers.")] = "", home: Home = None, as_json: Json = False
) -> None:
    """Grant no more leases. The round in flight ends with what it has."""
    _order({"command": "pause", "reason": reason}, home, as_json)


@coordinator_app.command()
def resume(home: Home = None, as_json: Json = False) -> None:
    """Grant leases again."""
    _order({"command": "resume"}, home, as_json)


@coordinator_app.command("promote-reference")
def promote_reference(
    version: Annotated[
        int | None, typer.Argument(help="A version whose state is kept; the next one if left out.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Move the KL reference, from the next version on."""
    _order({"command": "promote-reference", "version": version}, home, as_json)


@coordinator_app.command()
def rollback(
    version: Annotated[int, typer.Argument(help="A version whose state is kept.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Sign a new version whose state is that of an older one. History stays."""
    _order({"command": "rollback", "version": version}, home, as_json)


@coordinator_app.command()
def ban(
    peer: Peer,
    reason: Annotated[str, typer.Option(help="Told to the peer.")],
    hours: Annotated[float | None, typer.Option(help="Until it ends by itself; never if left out.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Keep a peer out."""
    _order({"command": "ban", "peer": peer, "reason": reason, "hours": hours}, home, as_json)


@coordinator_app.command()
def unban(peer: Peer, home: Home = None, as_json: Json = False) -> None:
    """Let a peer in again; bans by proof stay."""
    _order({"command": "unban", "peer": peer}, home, as_json)


@coordinator_app.command()
def invite(
    hours: Annotated[float, typer.Option(help="How long it can be used.")] = 72.0,
    uses: Annotated[int, typer.Option(help="Peers that may join with it; 0 for any number.")] = 1,
    note: Annotated[str, typer.Option(help="For whom it is; only you see it.")] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a token to join with; it is shown this once."""
    _order({"command": "invite", "hours": hours, "uses": uses, "note": note}, home, as_json)


@coordinator_app.command()
def revoke(
    invite: Annotated[str, typer.Argument(help="The invite's id, or its token.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let nobody join with a token any more; who did stays."""
    _order({"command": "revoke", "invite": invite}, home, as_json)


@coordinator_app.command()
def verify(
    run: Annotated[Path | None, typer.Argument(help="A run's folder; the latest run here if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Verify the whole chain offline, and recompute what the bytes here allow: exit code 76 if something is wrong."""
    from hivegrpo.cli.verify_chain import verify_chain

    verify_chain(run, as_json=as_json)


def _order(order: dict[str, object], home: Path | None, as_json: bool) -> None:
    from hivegrpo.cli.operate import give_order

    give_order(order, home, as_json=as_json)
