"""One peer of hivemind.averaging.DecentralizedAverager: joins the others' DHT, and steps whenever the driver says.

Arguments: rank, number of peers, number of values, target size of a group (0: none, which is hivemind's default),
compression, seconds of matchmaking. Or: "probe", compression, which fails if that compression does.
"""

import multiprocessing
import sys
import time

import torch
from hivemind import DHT
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import (
    CompressionBase,
    Float16Compression,
    Quantile8BitQuantization,
    Uniform8BitQuantization,
)
from lines import hear, say
from sockets import keep_sockets_together
from vectors import Mean, save_sample, vector_of

COMPRESSIONS: dict[str, type[CompressionBase]] = {
    "float16": Float16Compression,
    "uniform8": Uniform8BitQuantization,
    "quantile8": Quantile8BitQuantization,
}

STEP_SECONDS = 10.0
"""A peer that found no group by then has failed."""


def main(rank: int, peers: int, values: int, group_size: int, compression: str, seconds: float) -> None:
    """Say the address; hear the others'; then one step for each "arm" and "go"."""
    own, mean = vector_of(rank, values), Mean(peers, values)
    say("loaded")
    message = hear("join")
    if message is None:
        return
    dht = DHT(initial_peers=message["initial_peers"], start=True)
    averager = DecentralizedAverager(
        [torch.zeros(values)],
        dht,
        start=True,
        prefix="benchmark",
        target_group_size=group_size or None,
        min_matchmaking_time=seconds,
        request_timeout=seconds / 2,  # hivemind asks for less than the matchmaking time
        compression=COMPRESSIONS[compression](),
    )
    try:
        say("joined", addresses=[str(address) for address in dht.get_visible_maddrs()], peer=str(averager.peer_id))
        step_on_command(averager, rank, own, mean, peers)
    finally:
        averager.shutdown()
        dht.shutdown()


def step_on_command(averager: DecentralizedAverager, rank: int, own: torch.Tensor, mean: Mean, peers: int) -> None:
    """Until the driver has no more to say."""
    while hear("arm") is not None:
        with averager.get_tensors() as tensors:
            tensors[0].copy_(own)
        say("armed")
        if hear("go") is None:
            return
        start = time.perf_counter()
        try:
            group = averager.step(timeout=STEP_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever a step raises, it has failed
            print(f"the step failed: {error!r}", file=sys.stderr)
            group = None
        seconds = time.perf_counter() - start
        with averager.get_tensors() as tensors:
            averaged = group is not None and len(group) == peers and mean.matches(tensors[0])
            sample = save_sample(rank, tensors[0])
        say("stepped", seconds=seconds, averaged=averaged, sample=sample)


def probe(compression: str) -> None:
    """Encode and decode once."""
    codec = COMPRESSIONS[compression]()
    codec.extract(codec.compress(torch.ones(1000)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "probe":
        probe(sys.argv[2])
    else:
        keep_sockets_together()
        multiprocessing.set_start_method("fork", force=True)  # what hivemind hands to its processes cannot be pickled
        *numbers, name, matchmaking = sys.argv[1:]
        main(*map(int, numbers), name, float(matchmaking))
