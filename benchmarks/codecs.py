"""What the codecs lose and how fast they are, beside bitsandbytes' blockwise 8-bit quantization.

Relative errors are |decoded - x| / |x| of a whole vector; speeds are millions of values a second, in one thread, the
best of several passes over the vector in chunks of 16,384 values, as the swarm has them. bitsandbytes, where it is
installed, gets the same chunks and its default blocks of 256; its scales are fp32, and it is a comparison only: no two
builds of it need give the same bits.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.registry import CODECS
from hivegrpo.protocol.chunks import CHUNK_VALUES

BLOCK = 256
"""Values that share a scale in bitsandbytes."""


@dataclass(frozen=True)
class Way:
    """One encoding: of chunks and back; sizes are in bytes."""

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any, int], Tensor]
    size: Callable[[Any], int]


def ours(codec: Codec) -> Way:
    return Way(codec.encode, codec.decode, len)


def blockwise() -> Way:
    """bitsandbytes' dynamic 8-bit data type."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    def size(encoded: Any) -> int:
        elements, state = encoded
        return int(elements.nbytes + state.absmax.nbytes)

    return Way(
        lambda chunk: quantize_blockwise(chunk, blocksize=BLOCK),
        lambda encoded, _: dequantize_blockwise(*encoded),
        size,
    )


def vectors(values: int) -> dict[str, Tensor]:
    """What is encoded: Gaussian values, and heavy-tailed ones (Student's t with 3 degrees of freedom), also tiny."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(values, generator=generator)
    # chi-squared with 3 degrees of freedom, by its definition
    spread = torch.randn(3, values, generator=generator).square().sum(0).div(3).sqrt()
    heavy = torch.randn(values, generator=generator) / spread
    return {"Gaussian": gaussian, "t(3)": heavy, "t(3), rms 1e-20": heavy * 1e-20}


def decoded(way: Way, chunks: Sequence[Tensor]) -> Tensor:
    return torch.cat([way.decode(way.encode(chunk), chunk.numel()) for chunk in chunks])


def relative_error(way: Way, vector: Tensor) -> float:
    exact = vector.double()
    return float((decoded(way, vector.split(CHUNK_VALUES)).double() - exact).norm() / exact.norm())


def seconds(work: Callable[[], object], passes: int) -> float:
    """The best of several."""
    best = float("inf")
    for _ in range(passes):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def measure(way: Way, data: dict[str, Tensor], passes: int) -> dict[str, Any]:
    """Errors by vector, bits a value, and values a second both ways."""
    chunks = data["Gaussian"].split(CHUNK_VALUES)
    encoded = [way.encode(chunk) for chunk in chunks]
    values = sum(chunk.numel() for chunk in chunks)
    encoding = seconds(lambda: [way.encode(chunk) for chunk in chunks], passes)
    decoding = seconds(lambda: [way.decode(item, CHUNK_VALUES) for item in encoded], passes)
    return {
        "bits": 8 * sum(map(way.size, encoded)) / values,
        "errors": {name: relative_error(way, vector) for name, vector in data.items()},
        "encoded_per_second": values / encoding,
        "decoded_per_second": values / decoding,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=64, help="of 16,384 values each")
    parser.add_argument("--passes", type=int, default=7, help="of which the best counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = vectors(options.chunks * CHUNK_VALUES)
    ways = {name: ours(codec) for name, codec in CODECS.items()}
    if find_spec("bitsandbytes") is not None:
        ways["bitsandbytes"] = blockwise()
    figures = {name: measure(way, data, options.passes) for name, way in ways.items()}
    print(f"{'':14}{'bits':>7}" + "".join(f"{name:>17}" for name in data) + f"{'M/s encoded':>14}{'M/s decoded':>14}")
    for name, figure in figures.items():
        errors = "".join(f"{100 * error:15.3f} %" for error in figure["errors"].values())
        speeds = "".join(f"{figure[key] / 1e6:14.0f}" for key in ("encoded_per_second", "decoded_per_second"))
        print(f"{name:14}{figure['bits']:7.3f}{errors}{speeds}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
