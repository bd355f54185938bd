"""Orders to a coordinator that runs on this machine, over the socket in its home."""

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hivegrpo.cli.coordinator_home import ROLE
from hivegrpo.cli.output import describe_accuracy
from hivegrpo.coordinator.control import ANSWER_SECONDS, MAX_ANSWER, SOCKET_FILE, short_path
from hivegrpo.protocol.errors import BusyError, ConfigError, HiveError, MismatchError, UnreachableError
from hivegrpo.protocol.homes import state_folder

CONNECT_SECONDS = 2.0

Answer = dict[str, Any]


def give_order(order: Answer, home: Path | None, *, as_json: bool) -> None:
    """Print what the coordinator in `home` answers; without one, the only coordinator that runs here.

    UnreachableError if none runs, ConfigError if several do or the order is refused.
    """
    answer = send_order(order, home)
    if as_json:
        print(json.dumps(answer, separators=(",", ":")))
        return
    for line in _DESCRIPTIONS[order["command"]](answer):
        print(line)


def send_order(order: Answer, home: Path | None) -> Answer:
    """The answer to one order; the error that the coordinator refuses it with is raised here."""
    with _connect(home) as connection:
        connection.settimeout(ANSWER_SECONDS + CONNECT_SECONDS)
        try:
            connection.sendall(json.dumps(order).encode() + b"\n")
            line = connection.makefile("rb").readline(MAX_ANSWER)
            reply = json.loads(line)
        except (OSError, ValueError) as error:
            raise UnreachableError(f"The coordinator did not answer: {error}.", NOT_RUNNING_HINT) from None
    if reply["ok"]:
        answer: Answer = reply["answer"]
        return answer
    raise _ERRORS.get(reply["exit_code"], HiveError)(reply["error"], reply["hint"])


def _connect(home: Path | None) -> socket.socket:
    homes = [home] if home is not None else sorted((state_folder() / "runs").glob(f"*/{ROLE}"))
    running = [(path, connection) for path in homes if (connection := _dial(path)) is not None]
    if len(running) == 1:
        return running[0][1]
    for _, connection in running:
        connection.close()
    if running:
        listed = ", ".join(str(path) for path, _ in running)
        raise ConfigError(f"{len(running)} coordinators run here: {listed}.", "Name one of these with --home.")
    where = f"in {home}" if home is not None else "on this machine"
    raise UnreachableError(f"No coordinator runs {where}.", NOT_RUNNING_HINT)


def _dial(home: Path) -> socket.socket | None:
    if not (home / SOCKET_FILE).is_socket():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_SECONDS)
    with short_path(home) as path, suppress(OSError):
        connection.connect(str(path))
        return connection
    connection.close()
    return None


def _status(answer: Answer) -> list[str]:
    phase = "paused" if answer["paused"] else answer["phase"]
    lines = [
        f"run {answer['run_id'][:16]} ({answer['name']}): {phase}, version {answer['version']} of {answer['versions']}"
    ]
    metrics = answer["metrics"]
    figures = [f"reward {metrics['reward']:.3f}"] if "reward" in metrics else []
    figures += [f"{describe_accuracy(metrics)} (version {answer['version'] - 1})"] if "eval/accuracy" in metrics else []
    if figures:
        lines.append(", ".join(figures))
    if answer["trouble"]:
        lines.append(f"trouble: {answer['trouble']}")
    for peer in answer["peers"]:
        speed = f", {peer['tokens_per_second']:.0f} tokens/s" if peer["tokens_per_second"] else ""
        lines.append(f"peer {peer['peer']} {peer['state']}, in {peer['contributed']} versions{speed}")
    lines += [f"banned {peer}: {reason}" for peer, reason in answer["banned"].items()]
    for invite in answer["invites"]:
        uses = invite["uses"] or "any"
        note = f", {invite['note']}" if invite["note"] else ""
        joined = f"{len(invite['joined'])} of {uses} joined"
        lines.append(
            f"invite {invite['invite']} {invite['standing']}, {joined}, until {_when(invite['expires'])}{note}"
        )
    return lines


def _invite(answer: Answer) -> list[str]:
    whom = {0: "any number of peers", 1: "one peer"}.get(answer["uses"], f"{answer['uses']} peers")
    return [
        f"Invite {answer['invite']}, for {whom}, until {_when(answer['expires'])}. Join with:",
        f"--invite {answer['token']}",
    ]


def _banned(answer: Answer) -> list[str]:
    until = "until it is unbanned" if answer["until"] is None else f"until {_when(answer['until'])}"
    return [f"{answer['peer']} is banned {until}: {answer['reason']}"]


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at))


_DESCRIPTIONS: dict[str, Callable[[Answer], list[str]]] = {
    "status": _status,
    "pause": lambda _: ["Paused: the round in flight ends with what it has, and no lease follows."],
    "resume": lambda _: ["Leases are granted again."],
    "promote-reference": lambda a: [
        f"From version {a['version']} on, the KL reference is version {a['reference_version']}."
    ],
    "rollback": lambda a: [f"Version {a['version']} has the state of version {a['restores']}, {a['state_root'][:16]}."],
    "ban": _banned,
    "unban": lambda a: [f"{a['peer']} may join again."],
    "invite": _invite,
    "revoke": lambda a: [f"Nobody joins with invite {a['invite']} any more; {len(a['joined'])} did, and stay."],
}
_ERRORS: dict[int, type[HiveError]] = {
    kind.exit_code: kind for kind in (ConfigError, UnreachableError, BusyError, MismatchError)
}
NOT_RUNNING_HINT = "Start it with `hivegrpo coordinator run`, or name its home with --home."
