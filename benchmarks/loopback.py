"""What goes over the loopback interface."""

from pathlib import Path

STATISTICS = Path("/sys/class/net/lo/statistics")


def loopback_bytes() -> int:
    """Bytes sent so far, every header included; each is received there, too, and counted here once."""
    return int((STATISTICS / "tx_bytes").read_text())
