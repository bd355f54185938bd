"""A peer's gradient, encoded once: its bytes are fixed from then on, and every attempt sends the same ones."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.vectors import encode_vector
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import chunk_count, chunk_values
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.merkle import leaf_hash, merkle_root, range_proof


@dataclass(frozen=True)
class EncodedVector:
    """The chunks of a gradient vector and their Merkle tree."""

    chunks: tuple[bytes, ...]

    @classmethod
    def encode(cls, codec: Codec, vector: torch.Tensor) -> Self:
        """Encode a flat fp32 vector, chunk by chunk."""
        return cls(tuple(encode_vector(codec, vector)))

    @cached_property
    def leaves(self) -> list[bytes]:
        """Leaf hashes of the chunks."""
        return [leaf_hash(chunk) for chunk in self.chunks]

    @cached_property
    def root(self) -> bytes:
        """What the peer commits to."""
        return merkle_root(self.leaves)

    def header(self, plan: bytes, index: int, span: range) -> pb.PushHeader:
        """What is said of the chunks `span` before they are sent: their own root, and the proof up to `root`."""
        content = merkle_root(self.leaves[span.start : span.stop])
        return pb.PushHeader(plan=plan, span=index, proof=range_proof(self.leaves, span), content=content)


class ContributionStore:
    """The encoded contributions of the last versions, on disk before they are reported; named by their root."""

    def __init__(self, folder: Path, codec: Codec, values: int, keep: int) -> None:
        self._folder = folder
        self._codec = codec
        self._values = values
        self._keep = keep
        self._latest: EncodedVector | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, version: int, encoded: EncodedVector) -> None:
        """Keep the contribution to `version`; forget those more than `keep` versions older."""
        write_whole(self._folder / f"{version:08d}-{encoded.root.hex()}", b"".join(encoded.chunks))
        self._latest = encoded
        for path in self._folder.glob("????????-*"):
            if int(path.name[:8]) < version - self._keep:
                path.unlink()

    def find(self, root: bytes) -> EncodedVector | None:
        """The contribution with this root, if it is still here and whole."""
        if self._latest is not None and self._latest.root == root:
            return self._latest
        for path in self._folder.glob(f"????????-{root.hex()}"):
            data = path.read_bytes()
            chunks, start = [], 0
            for index in range(chunk_count(self._values)):
                size = self._codec.encoded_size(chunk_values(self._values, index))
                chunks.append(data[start : start + size])
                start += size
            encoded = EncodedVector(tuple(chunks))
            if encoded.root == root:
                self._latest = encoded
                return encoded
        return None
