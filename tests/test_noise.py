"""What is shown of the trouble that strangers cause."""

import pytest

from hivegrpo.protocol.transport import serving
from hivegrpo.protocol.transport.serving import Noise, is_shown


def test_one_peers_noise_does_not_hide_anothers_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Noise()
    assert [noise.count("rejected", "loud") for _ in range(3)] == [1, 2, 3]
    assert noise.count("rejected", "quiet") == 1
    monkeypatch.setattr(serving, "MAX_NOISY", 2)
    assert [noise.count("rejected", f"sybil {number}") for number in range(3)] == [1, 2, 3], "counted together"
    assert noise.count("rejected", "loud") == 4


def test_a_flood_is_shown_ever_less() -> None:
    assert [count for count in range(1, 100) if is_shown(count)] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64]
