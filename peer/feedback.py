"""Error feedback: what an encoding lost is added to the next gradient.

Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al., "Error feedback fixes SignSGD",
arXiv:1901.09847. With gradient g and residual e of a peer at a version,

    p = g + e,    bytes = encode(p),    e' = p - decode(bytes)

and e' takes the place of e if, and only if, the next version counts these very bytes. Whether it does is read from the
chain each time, and not remembered: after any crash, catch-up or new attempt the answer is the same.

Residuals are in the gradient's units, and are not weighed: how much a contribution counts depends on everybody's
weights, on clipping and on the rule, which nobody knows while encoding. What is lost at a share c_t comes back at the
share c_(t+1), so a sum of averages is off by the sum of (c_(t+1) - c_t) e_t, which is 0 for steady shares. Scaling by
the peer's own weights would be exact where the round's total is steady, but a light contribution after a heavy one
would then be far longer than a gradient, and rules that look for outliers would cut it.

What the reducer's encoding of the average loses is not fed back: the average is a function of committed bytes alone.
"""

import hashlib
from pathlib import Path

import structlog
import torch
from torch import Tensor

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.protocol.chain import Entry
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.files import write_whole

log = structlog.get_logger(__name__)

_DIGEST_BYTES = 32


class ErrorFeedback:
    """One peer's residuals, in a folder of their own; at most two vectors of fp32 there.

    A file is named by the version that the contribution was meant for, and by its root. It is on disk before the
    contribution is reported, whole or not at all. Not canonical: only the bytes that come out count.
    """

    def __init__(self, folder: Path, codec: Codec, peer: str) -> None:
        self._folder = folder
        self._codec = codec
        self._peer = peer

    def encode(self, head: Entry, gradient: Tensor) -> EncodedVector:
        """The contribution to the version after `head`: `gradient`, fp32, plus the residual that counts there.

        NonFiniteError as `Codec.encode`; nothing has changed then.
        """
        version = int(head.manifest.message.version)
        before = self._path(version, self._committed_root(head))
        residual = self._read(before, gradient.numel())
        wanted = gradient.clone() if residual is None else gradient + residual
        encoded = EncodedVector.encode(self._codec, wanted)
        for part, chunk in zip(torch.split(wanted, CHUNK_VALUES), encoded.chunks, strict=True):
            part -= self._codec.decode(chunk, part.numel())
        data = _capped(wanted, gradient).numpy().astype("<f4", copy=False).tobytes()
        after = self._path(version + 1, encoded.root)
        write_whole(after, hashlib.sha256(data).digest() + data)
        # That of `head` stays: if this contribution is given up, the next one at the same version needs it again.
        for path in self._folder.glob("????????-*"):
            if path not in (before, after):
                path.unlink()
        return encoded

    def _committed_root(self, head: Entry) -> bytes:
        """Of this peer's contribution to the version; empty if it has none there."""
        return next((item.root for item in head.manifest.message.contributors if item.peer == self._peer), b"")

    def _path(self, version: int, root: bytes) -> Path:
        return self._folder / f"{version:08d}-{root.hex()}"

    def _read(self, path: Path, values: int) -> Tensor | None:
        """The residual of a contribution; None if there is none, or it was damaged."""
        if not path.exists():
            return None
        content = bytearray(path.read_bytes())
        data = memoryview(content)[_DIGEST_BYTES:]
        if len(data) != 4 * values or hashlib.sha256(data).digest() != content[:_DIGEST_BYTES]:
            log.warning("a residual was damaged on disk; going on without it", path=str(path))
            return None
        return torch.frombuffer(data, dtype=torch.float32)


def _capped(residual: Tensor, gradient: Tensor) -> Tensor:
    """The residual, scaled down to the gradient's norm where it is longer; changes it in place.

    A residual is of older parameters than what it is added to. After large gradients and then small ones it would
    otherwise be most of what the peer sends, and larger than what honest peers send: rules would clip it. So what is
    sent is never longer than this gradient and the one before together.
    """
    norm, limit = (torch.linalg.vector_norm(vector, dtype=torch.float64).item() for vector in (residual, gradient))
    return residual.mul_(limit / norm) if norm > limit else residual
