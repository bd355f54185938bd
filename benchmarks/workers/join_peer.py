"""A peer that joins late and only synchronises: `Sharing`, `Versions` and `Synchroniser`, over libp2p.

Argument: home folder. It serves what it has until the driver has gone.
"""

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvloop
from lines import hear, say
from sockets import keep_sockets_together

from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.peer.swarm.sync import Synchroniser
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.protocol.blobstore import BlobStore, PartialBlob
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import fetch_run, serve_chain
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.p2p import P2PTransport


def tell_first_piece() -> None:
    """Say when the first piece of anything is here."""
    note = PartialBlob.note

    def noted(part: PartialBlob, index: int) -> None:
        PartialBlob.note = note  # type: ignore[method-assign]  # once
        note(part, index)
        say("piece")

    PartialBlob.note = noted  # type: ignore[method-assign]  # the product says nothing by itself


async def main(home: PeerHome) -> None:
    """Hear the address; synchronise; serve until the driver has gone."""
    say("loaded")
    message = hear("join")
    if message is None:
        return
    address, identity = message["address"], Identity.generate()
    began = time.perf_counter()
    transport = await P2PTransport.create(identity, initial_peers=[address])
    try:
        coordinator = await transport.connect([address])
        chainfile = ChainFile.create(home.root, await fetch_run(transport, coordinator), coordinator)
        chain = chainfile.chain
        sharing = Sharing(transport, identity, chain.run_id, coordinator, BlobStore(home.blobs))
        await sharing.start()
        await serve_chain(transport, chain)
        announcing = asyncio.create_task(sharing.announce())
        config = RunConfig.from_json(chain.manifest.message.config)
        versions = Versions(home.root, chainfile, sharing.store, config)
        with ThreadPoolExecutor(max_workers=1) as worker:
            await Synchroniser(versions, transport, sharing, worker).run()
        head = chain.entries[-1].manifest.message
        say(
            "synchronised",
            version=versions.version,
            verified=versions.state_root == head.state.root and versions.version == head.version,
            seconds=time.perf_counter() - began,
        )
        await asyncio.to_thread(hear, "count")
        say("counted", served=sharing.server.sent)
        await asyncio.to_thread(hear, "nothing more")
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)
    finally:
        await transport.close()


if __name__ == "__main__":
    keep_sockets_together()
    torch.set_num_threads(1)
    tell_first_piece()
    uvloop.run(main(PeerHome(Path(sys.argv[1]))))
