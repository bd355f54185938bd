"""What a reducer tells of the contributions to its span: how far each points where the result does."""

from collections.abc import Mapping, Sequence

import torch

from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.protocol import hivegrpo_pb2 as pb


def span_dots(
    codec_name: str, values: Sequence[int], seal: pb.Seal, chunks: Mapping[str, Sequence[bytes]], result: bytes
) -> list[float]:
    """<x_i, y> of each sealed contribution x_i with the reduced span y, in the seal's order, and at last <y, y>.

    `values` are the numbers of values in the span's chunks, `chunks` the encoded ones by peer, `result` the span's
    encoded bytes. In float64, over the decoded values. Evidence for people: nothing that is hashed depends on it.
    """
    codec = get_codec(codec_name)
    dots = [0.0] * (len(seal.contributors) + 1)
    start = 0
    for index, count in enumerate(values):
        size = codec.encoded_size(count)
        reduced = codec.decode(result[start : start + size], count).double()
        start += size
        for place, sealed in enumerate(seal.contributors):
            dots[place] += float(torch.dot(codec.decode(chunks[sealed.peer][index], count).double(), reduced))
        dots[-1] += float(torch.dot(reduced, reduced))
    return dots
