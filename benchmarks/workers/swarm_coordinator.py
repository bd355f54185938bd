"""The coordinator of a run without a model: `hivegrpo.coordinator.service` over libp2p, as it is.

Arguments: home folder, number of peers, number of values, number of versions; optionally the address to listen on, and
tables of run.toml that go over those given here, as JSON.
"""

import asyncio
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import uvloop
from lines import say
from sockets import keep_sockets_together

from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import DIGEST_BYTES, PROTOCOL, run_id_of, sign_payload
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.p2p import P2PTransport


async def main(home: Path, peers: int, values: int, versions: int, host: str, tables: dict[str, Any]) -> None:
    """Say the address; serve until the run is finished or the driver has gone."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    identity = Identity.generate()
    config = run_config(peers, versions, tables)
    run = sign_run(identity, config, values)
    transport = await P2PTransport.create(identity, host)
    try:
        with closing(EventLog(home / LOG_FILE, run_id_of(run.payload))) as log:
            coordinator = Coordinator(
                identity=identity,
                transport=transport,
                log=log,
                run=run,
                config=config,
                home=home,
                blobs=BlobStore(home / "blobs"),
                exit_when_finished=True,
            )
            serving = asyncio.create_task(coordinator.run(stop))
            say("serving", address=transport.addresses()[0])
            await serving
            say("served", bytes=coordinator.snapshot()["served_bytes"])
    finally:
        await transport.close()


def run_config(peers: int, versions: int, tables: dict[str, Any]) -> RunConfig:
    """One prompt a peer and version; no audits, which come by lot; the rest as it is by default."""
    return RunConfig.model_validate(
        {
            "run": {"name": "benchmark", "versions": versions, "start_peers": peers},
            "model": {"path": "none"},
            "dataset": {"path": "none.jsonl"},
            "rewards": {"functions": ["exact_match"]},
            "grpo": {"prompts_per_round": peers},
            "averaging": {"audit_rate": 0.0},
            "distribution": {"anchor_every": versions, "keep_versions": versions},
            "admission": {"mode": "open"},
            **tables,
        }
    )


def sign_run(identity: Identity, config: RunConfig, values: int) -> pb.Signed:
    """A run that trains one pair of tensors with `values` values together."""
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=identity.peer_id,
        config=config.canonical_json(),
        nonce=bytes(16),
        digests={"known_answer": bytes(DIGEST_BYTES)},  # nobody is tested, and peers show what the run names
        rows=1000,
        layout=[
            pb.Tensor(name="layer.lora_A.weight", shape=[values - values // 2, 1]),
            pb.Tensor(name="layer.lora_B.weight", shape=[1, values // 2]),
        ],
    )
    payload = manifest.SerializeToString(deterministic=True)
    return sign_payload(identity, run_id_of(payload), "RunManifest", payload)


if __name__ == "__main__":
    keep_sockets_together()
    home, peers, values, versions, *more = sys.argv[1:]
    host, tables = more or ("127.0.0.1", "{}")
    uvloop.run(main(Path(home), int(peers), int(values), int(versions), host, json.loads(tables)))
