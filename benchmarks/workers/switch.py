"""A switch in user space that holds every frame back: the kernel's netem is not everywhere, and root can do this.

Arguments: number of links, seconds of delay. Runs in the namespace that has link0, link1, ...; a node's MAC address
ends in its number. Frames come and go with their virtio header, so that offloaded checksums and segments stay whole.
"""

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

from lines import say

ALL_PROTOCOLS = 3
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
SO_RCVBUFFORCE = 33
VIRTIO_BYTES = 10
MOST_BYTES = 1 << 17
BUFFER_BYTES = 8 << 20
AT_ONCE = 64
"""Frames that are read from one link before the others have their turn."""


def open_link(number: int) -> socket.socket:
    """Everything that comes in at one link."""
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    link.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    link.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    link.setblocking(False)
    link.bind((f"link{number}", ALL_PROTOCOLS))
    return link


def switch(links: list[socket.socket], delay: float) -> None:
    """Until the driver has gone."""
    waiting: deque[tuple[float, int, bytes]] = deque()
    by_descriptor = {link.fileno(): number for number, link in enumerate(links)}
    poll = select.epoll()
    for descriptor in (*by_descriptor, sys.stdin.fileno()):
        poll.register(descriptor, select.EPOLLIN)
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for descriptor, _ in poll.poll(patience):
            number = by_descriptor.get(descriptor)
            if number is None:
                return
            for _ in range(AT_ONCE):
                try:
                    frame = links[number].recv(MOST_BYTES)
                except BlockingIOError:
                    break
                waiting.append((time.monotonic() + delay, number, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, source, frame = waiting.popleft()
            to = frame[VIRTIO_BYTES : VIRTIO_BYTES + 6]
            to_all = to[0] & 1
            for number in range(len(links)) if to_all else (to[5],):
                if number != source and number < len(links):
                    with suppress(OSError):  # the link's queue is full: as on a real one, the frame is lost
                        links[number].send(frame)


if __name__ == "__main__":
    ports = [open_link(number) for number in range(int(sys.argv[1]))]
    say("switching")
    switch(ports, float(sys.argv[2]))
