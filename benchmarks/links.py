"""A wide-area network on this machine: one network namespace a node, a capped link each, and a switch that delays.

    node's namespace            the hub's namespace
    eth0  tbf: uplink   <veth>  linkN  tbf: downlink
                                links are joined by workers/switch.py, which holds every packet back for a while

Nothing outside these namespaces is touched. Their names carry this process's number; what a killed run has left behind
is removed by the next one. Needs root (CAP_NET_ADMIN), and `ip` and `tc` of iproute2.
"""

import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PREFIX = "hgwan"
QUEUE_MS = 100
"""How much a link's queue holds before it drops, as home routers have it."""

BURST_BYTES = 16 << 10
"""What tbf lets through at once; larger segments are split."""

COMMAND_SECONDS = 10.0


class LinkError(Exception):
    """Namespaces, links or their limits cannot be made here."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a node has of the network; 0 Mbit/s is no limit."""

    up_mbit: float
    down_mbit: float


class Links:
    """The namespaces of one benchmark: node i is 10.77.0.(i + 1), and all are gone when the `with` block has ended."""

    def __init__(self, links: list[Link], congestion_control: str = "cubic") -> None:
        """`congestion_control`: TCP's, on all links."""
        self._links = links
        self._congestion_control = congestion_control
        self._name = f"{PREFIX}{os.getpid()}-"

    @property
    def hub(self) -> list[str]:
        """Prefix of a command that is to run in the hub's namespace."""
        return ["ip", "netns", "exec", self._name + "hub"]

    def within(self, node: int) -> list[str]:
        """Prefix of a command that is to run in a node's namespace."""
        return ["ip", "netns", "exec", f"{self._name}{node}"]

    def host(self, node: int) -> str:
        """A node's address."""
        return f"10.77.0.{node + 1}"

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
            raise LinkError("network namespaces need root, and ip and tc of iproute2")
        _sweep()
        try:
            _do("ip", "netns", "add", self._name + "hub")
            for node, link in enumerate(self._links):
                self._make(node, link)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self, node: int, link: Link) -> None:
        name, hub, port = f"{self._name}{node}", self._name + "hub", f"link{node}"
        _do("ip", "netns", "add", name)
        _do("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", hub)
        _do("ip", "-n", name, "link", "set", "eth0", "address", f"02:00:00:00:00:{node:02x}")
        _do("ip", "-n", name, "addr", "add", f"{self.host(node)}/24", "dev", "eth0")
        for namespace, device in ((name, "lo"), (name, "eth0"), (hub, port)):
            _do("ip", "-n", namespace, "link", "set", device, "up")
        network = ["10.77.0.0/24", "dev", "eth0", "src", self.host(node)]
        _do("ip", "-n", name, "route", "replace", *network, "congctl", self._congestion_control)
        for namespace, device, mbit in ((name, "eth0", link.up_mbit), (hub, port, link.down_mbit)):
            if mbit:
                limit = ["rate", f"{mbit}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms"]
                _do("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limit)

    def _remove(self) -> None:
        for path in sorted(Path("/run/netns").glob(self._name + "*")):
            with suppress(LinkError):
                _do("ip", "netns", "del", path.name)


def _sweep() -> None:
    """Remove the namespaces of benchmarks that were killed."""
    for path in Path("/run/netns").glob(PREFIX + "*-*"):
        number = path.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdigit() and not Path("/proc", number).exists():
            with suppress(LinkError):
                _do("ip", "netns", "del", path.name)


def _do(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise LinkError(f"{' '.join(command)}: {done.stderr.strip()}")
