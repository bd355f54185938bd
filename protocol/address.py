"""What people paste: run ids, and addresses like /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW..."""

import ipaddress
import re

from hivegrpo.protocol.errors import ConfigError, SignatureError
from hivegrpo.protocol.identity import public_key_of

EXAMPLE = "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"

_HOST_NAME = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def parse_address(text: str) -> tuple[str, str]:
    """Split a node's address into its peer id and the multiaddr to dial; ConfigError with an example if it is none.

    Accepted is /ip4, /ip6, /dns, /dns4 or /dns6, then /tcp/PORT, then /p2p/PEER with an Ed25519 peer id.
    """
    match text.strip().split("/"):
        case ["", kind, host, "tcp", port, "p2p", peer_id]:
            pass
        case _:
            raise _wrong(text, "it is not of the form /ip4/HOST/tcp/PORT/p2p/PEER")
    if not _is_host(kind, host):
        raise _wrong(text, f"{host!r} is no /{kind} host")
    if not (_PORT.fullmatch(port) and int(port) < 1 << 16):
        raise _wrong(text, f"{port!r} is not a port")
    try:
        public_key_of(peer_id)
    except SignatureError as error:
        raise _wrong(text, error.message) from None
    return peer_id, f"/{kind}/{host}/tcp/{port}"


def check_run_id(text: str | None) -> None:
    """ConfigError unless it is a whole run id, or none."""
    if text is not None and not re.fullmatch("[0-9a-f]{64}", text):
        raise ConfigError(f"{text[:80]!r} is not a run id.", "It has 64 hexadecimal digits; `hivegrpo watch` shows it.")


def _is_host(kind: str, host: str) -> bool:
    match kind:
        case "ip4" | "ip6":
            try:
                address = ipaddress.ip_address(host)
            except ValueError:
                return False
            return kind == f"ip{address.version}" and "%" not in host
        case "dns" | "dns4" | "dns6":
            return _HOST_NAME.fullmatch(host) is not None
        case _:
            return False


def _wrong(text: str, reason: str) -> ConfigError:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return ConfigError(
        f"{shown!r} is not a node's address: {reason}.",
        f"Paste the whole address that the coordinator printed; it looks like {EXAMPLE}",
    )
