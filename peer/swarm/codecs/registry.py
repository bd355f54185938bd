"""The codecs that a run can name."""

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.float32 import Float32
from hivegrpo.peer.swarm.codecs.mxfp4 import MxFp4
from hivegrpo.peer.swarm.codecs.mxfp8 import MxFp8
from hivegrpo.peer.swarm.codecs.mxint8 import MxInt8
from hivegrpo.protocol.errors import ConfigError

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float32(), MxFp4(), MxFp8(), MxInt8())}


def get_codec(name: str) -> Codec:
    """The codec of that name; ConfigError if there is none."""
    if name not in CODECS:
        raise ConfigError(f"There is no codec {name!r}.", f"Choose one of: {', '.join(sorted(CODECS))}.")
    return CODECS[name]
