import math
import struct
from dataclasses import astuple, fields

import pytest

from hivegrpo.protocol.errors import FrameError
from hivegrpo.protocol.scalars import StepScalars, fp32_bits, fp32_from_bits

SCALARS = StepScalars.for_step(2, learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)


def test_scalars_are_adamws_each_rounded_once() -> None:
    # Step 2: 1 - 0.9^2 = 0.19, 1 - 0.95^2 = 0.0975, decay 1 - 1e-3 * 0.1.
    expected = (1e-3, 0.9, 0.1, 0.95, 0.05, 1 / 0.19, 1 / math.sqrt(0.0975), 1e-8, 0.9999)
    assert astuple(SCALARS) == tuple(struct.unpack("<f", struct.pack("<f", value))[0] for value in expected)


def test_bit_patterns_give_the_scalars_back() -> None:
    assert StepScalars.from_bits(SCALARS.to_bits()) == SCALARS
    assert fp32_bits(1.0) == 0x3F800000
    assert fp32_from_bits(0x00000001) == 2.0**-149


@pytest.mark.parametrize("place", range(len(fields(StepScalars))))
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000], ids=["inf", "-inf", "nan"])
def test_scalars_that_are_not_finite_are_refused(place: int, bits: int) -> None:
    pattern = SCALARS.to_bits()
    pattern[place] = bits
    with pytest.raises(FrameError):
        StepScalars.from_bits(pattern)


def test_a_wrong_number_of_scalars_is_refused() -> None:
    for pattern in (SCALARS.to_bits()[:-1], [*SCALARS.to_bits(), 0]):
        with pytest.raises(FrameError, match="scalars"):
            StepScalars.from_bits(pattern)
