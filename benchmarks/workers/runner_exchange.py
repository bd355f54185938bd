"""One peer of hivemind's AllReduceRunner in a group that is known beforehand: the data phase, without matchmaking.

Arguments: rank, number of peers, number of values.
"""

import asyncio
import sys
import time
from typing import Any

import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.compression import Float16Compression
from hivemind.p2p import P2P, PeerID
from hivemind.utils.asyncio import switch_to_uvloop
from lines import hear, say
from sockets import keep_sockets_together
from vectors import Mean, save_sample, vector_of


async def main(rank: int, peers: int, values: int) -> None:
    """Say the address; hear the group; then one all-reduce for each "arm" and "go"."""
    own, mean = vector_of(rank, values), Mean(peers, values)
    say("loaded")
    message = await hear_async("join")
    if message is None:
        return
    p2p = await P2P.create(initial_peers=message["initial_peers"])
    try:
        say("joined", addresses=[str(address) for address in await p2p.get_visible_maddrs()], peer=str(p2p.peer_id))
        await reduce_on_command(p2p, rank, own, mean)
    finally:
        await p2p.shutdown()


async def reduce_on_command(p2p: P2P, rank: int, own: torch.Tensor, mean: Mean) -> None:
    """Until the driver has no more to say."""
    number = 0
    while (message := await hear_async("arm")) is not None:
        number += 1
        group = [PeerID.from_base58(peer) for peer in message["group"]]
        tensor = own.clone()
        runner = AllReduceRunner(
            p2p=p2p,
            servicer_type=AllReduceRunner,
            prefix=str(number),
            group_id=number.to_bytes(20, "big"),
            tensors=[tensor],
            ordered_peer_ids=group,
            peer_fractions=tuple(1 / len(group) for _ in group),
            compression=Float16Compression(),
        )
        await runner.add_p2p_handlers(p2p, namespace=str(number))
        say("armed")
        if await hear_async("go") is None:
            return
        start = time.perf_counter()
        async for delta in runner:
            tensor.add_(delta)
        seconds = time.perf_counter() - start
        say("stepped", seconds=seconds, averaged=mean.matches(tensor), sample=save_sample(rank, tensor))


async def hear_async(kind: str) -> dict[str, Any] | None:
    """`hear`, while the loop goes on to serve the group."""
    return await asyncio.get_running_loop().run_in_executor(None, hear, kind)


if __name__ == "__main__":
    keep_sockets_together()
    torch.set_num_threads(1)
    switch_to_uvloop().run_until_complete(main(*map(int, sys.argv[1:])))  # as the averager's own process does
