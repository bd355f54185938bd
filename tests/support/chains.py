"""Signed chains without a run behind them, for whoever reads chains."""

import json
from hashlib import sha256

from google.protobuf.message import Message

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chunks import CHUNK_VALUES, split_evenly
from hivegrpo.protocol.coefficients import coefficients
from hivegrpo.protocol.envelope import digest_of, run_id_of, sign
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import StepScalars

SCALARS = StepScalars.for_step(1, learning_rate=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0).to_bits()
ROOT = sha256(b"root").digest()


class ChainMaker:
    """Signs a chain, entry by entry; or whatever a test makes of it."""

    def __init__(
        self,
        name: bytes = b"",
        peers: int = 2,
        reducers: int = 1,
        versions: int = 100,
        run_key: Identity | None = None,
    ) -> None:
        """`versions` is what the run is to have by its config; `peers` contribute to each, of which some reduce."""
        self.identity = Identity.generate()
        self.peers = sorted(Identity.generate().peer_id for _ in range(peers))
        self.spans = split_evenly(reducers, reducers)
        manifest = pb.RunManifest(
            protocol="hivegrpo/1",
            coordinator=self.identity.peer_id,
            nonce=name.ljust(16),
            config=json.dumps({"run": {"versions": versions}}),
            run_key=run_key.peer_id if run_key is not None else "",
        )
        self.run_id = run_id_of(manifest.SerializeToString(deterministic=True))
        self.run = sign(self.identity, self.run_id, manifest)
        self.head = digest_of(self.run.payload)

    def chain(self) -> Chain:
        return Chain(self.run, self.identity.peer_id)

    def sign(self, message: Message) -> pb.Signed:
        return sign(self.identity, self.run_id, message)

    def messages(self, version: int) -> tuple[pb.VersionManifest, pb.RoundPlan | None, pb.Seal | None]:
        """The next version's, without the digests that tie them together."""
        manifest = pb.VersionManifest(version=version, parent=self.head, state=pb.Blob(root=ROOT, size=20))
        if version == 0:
            return manifest, None, None
        manifest.metrics["reward"] = version / 1000
        manifest.spans.extend(pb.Blob(root=ROOT, size=4) for _ in self.spans)
        plan = pb.RoundPlan(
            version=version,
            parent=self.head,
            attempt=1,
            codec="fp32",
            rule="mean",
            values=CHUNK_VALUES * len(self.spans),
            contributors=[pb.Contributor(peer=peer, weight=1, root=ROOT) for peer in self.peers],
            reducers=[
                pb.Reducer(peer=peer, first=span.start, chunks=len(span))
                for peer, span in zip(self.peers, self.spans, strict=False)
            ],
            scalars=SCALARS,
            exchange_seconds=1.0,
            step_seconds=1.0,
            audit_seconds=1.0,
        )
        sealed = self.peers[1:] or self.peers
        shares = coefficients("mean", [1] * len(sealed), [0] * len(sealed))
        seal = pb.Seal(
            contributors=[pb.Sealed(peer=peer, coefficient=share) for peer, share in zip(sealed, shares, strict=True)]
        )
        return manifest, plan, seal

    def bind(self, manifest: pb.VersionManifest, plan: pb.RoundPlan | None, seal: pb.Seal | None) -> pb.ChainEntry:
        """Tie the messages together, sign them, and move the head."""
        entry = pb.ChainEntry()
        if plan is not None and seal is not None:
            entry.plan.CopyFrom(self.sign(plan))
            seal.plan = digest_of(entry.plan.payload)
            entry.seal.CopyFrom(self.sign(seal))
            manifest.plan, manifest.seal = seal.plan, digest_of(entry.seal.payload)
        entry.manifest.CopyFrom(self.sign(manifest))
        self.head = digest_of(entry.manifest.payload)
        return entry

    def entry(self, version: int) -> pb.ChainEntry:
        return self.bind(*self.messages(version))

    def entries(self, count: int) -> list[pb.ChainEntry]:
        return [self.entry(version) for version in range(count)]
