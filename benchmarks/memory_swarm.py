"""A whole run in one process: the product's own coordinator, peers and exchange, on the in-memory network."""

import asyncio
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from hivegrpo.coordinator.events import Event, VersionCommitted
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.coordinator.state import State
from hivegrpo.peer.daemon import work_in_run
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.numerics import check_numerics
from hivegrpo.peer.rewards.registry import reward_versions
from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, parse, run_id_of, sign_payload
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.memory import MemoryNetwork

Metrics = dict[str, float]


def train(config: RunConfig, learners: list[Learner], base: Path, seconds: float) -> list[Metrics]:
    """Metrics of each version from 1 on, as the coordinator signs them, of a swarm in which each learner is a peer's.

    base: folder of the model that all learners begin with. TimeoutError if it takes longer than so many seconds.
    """
    manifests = (
        parse(pb.VersionManifest, event.payload)
        for event in history(config, learners, base, seconds)
        if isinstance(event, VersionCommitted)
    )
    return [dict(manifest.metrics) for manifest in manifests if manifest.version > 0]


def history(config: RunConfig, learners: list[Learner], base: Path, seconds: float) -> list[Event]:
    """All that the coordinator of such a run decides."""
    with tempfile.TemporaryDirectory(prefix="hivegrpo-swarm-") as folder:
        return asyncio.run(_train(Path(folder), config, learners, base, seconds))


async def _train(folder: Path, config: RunConfig, learners: list[Learner], base: Path, seconds: float) -> list[Event]:
    chief, network = Identity.generate(), MemoryNetwork()
    events: list[Event] = []
    run = _signed_run(chief, config, learners[0])

    def on_event(event: Event, _: State) -> None:
        events.append(event)

    with closing(EventLog(folder / LOG_FILE, run_id_of(run.payload))) as log:
        coordinator = Coordinator(
            identity=chief,
            transport=network.join(chief),
            log=log,
            run=run,
            config=config,
            home=folder / "coordinator",
            blobs=BlobStore(folder / "blobs"),
            on_event=on_event,
            exit_when_finished=True,
        )
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as everyone:
            everyone.create_task(coordinator.run(asyncio.Event()))
            for rank, learner in enumerate(learners):
                everyone.create_task(_take_part(PeerHome(folder / str(rank)), network, run, config, learner, base))
    return events


async def _take_part(
    home: PeerHome, network: MemoryNetwork, run: pb.Signed, config: RunConfig, learner: Learner, base: Path
) -> None:
    identity = Identity.generate()
    transport, address = network.join(identity), network.address(run.signer)
    await transport.connect([address])
    sharing = Sharing(transport, identity, run_id_of(run.payload), run.signer, BlobStore(home.blobs))
    await sharing.start()
    with ThreadPoolExecutor(max_workers=1) as worker:
        await work_in_run(
            address,
            identity=identity,
            transport=transport,
            chainfile=ChainFile.create(home.root, run, run.signer),
            config=config,
            home=home,
            sharing=sharing,
            learner=learner,
            worker=worker,
            stop=asyncio.Event(),
            show=lambda _: None,
            base=base,
        )
    await transport.close()


def _signed_run(chief: Identity, config: RunConfig, learner: Learner) -> pb.Signed:
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=chief.peer_id,
        config=config.canonical_json(),
        nonce=os.urandom(16),
        digests={"known_answer": bytes.fromhex(check_numerics())},
        rows=len(learner.prompts),
        layout=[pb.Tensor(name=name, shape=shape) for name, shape in learner.layout],
        rewards=reward_versions(learner.pool.rewards),
    )
    payload = manifest.SerializeToString(deterministic=True)
    return sign_payload(chief, run_id_of(payload), "RunManifest", payload)
