"""Where hivemind puts its control sockets, so that none stays behind."""

import tempfile

from hivemind.p2p import P2P


def keep_sockets_together() -> None:
    """In the driver's folder, which goes when the driver does; hivemind has them in /tmp, and forgets some."""
    P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/"
