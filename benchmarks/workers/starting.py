"""A coordinator that starts from a home, as it is, and says how long it took until its first event was on disk.

Arguments: home folder. What is imported before is not in the figure, which `hivegrpo coordinator run` needs, too.
"""

import asyncio
import sys
import time
from contextlib import closing
from pathlib import Path

from lines import say

from hivegrpo.coordinator.events import Event
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.coordinator.state import State
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import read_run
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.memory import MemoryNetwork


async def main(home: Path) -> None:
    """Start, and stop as soon as anything happens."""
    identity = Identity.load_or_create(home / "identity.key")
    stop = asyncio.Event()
    seconds: list[float] = []

    def happened(event: Event, state: State) -> None:
        seconds.append(time.perf_counter() - begun)
        stop.set()

    begun = time.perf_counter()
    run = read_run(home, identity.peer_id)
    with closing(EventLog(home / LOG_FILE, run.run_id)) as log:
        opened = time.perf_counter() - begun
        coordinator = Coordinator(
            identity=identity,
            transport=MemoryNetwork().join(identity),
            log=log,
            run=run.run,
            config=RunConfig.from_json(run.manifest.message.config),
            home=home,
            blobs=BlobStore(home / "blobs"),
            on_event=happened,
        )
        chain = time.perf_counter() - begun - opened
        await coordinator.run(stop)
    say("started", seconds=seconds[0], log=opened, chain=chain, version=coordinator.state.version)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
