"""How many files a process may have open."""

import resource
import sys

import pytest

from hivegrpo.protocol.limits import open_files

ALL = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "files"),
    [
        (256, 4096, 1000, 1000),
        (256, 512, 1000, 512),
        (256, ALL, 1000, 1000),
        (2000, 4096, 1000, 2000),
        (ALL, ALL, 1000, sys.maxsize),
    ],
)
def test_the_limit_is_raised_as_far_as_is_needed_and_let(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, files: int
) -> None:
    set_to = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: set_to[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    assert open_files(wanted) == files
    assert set_to[-1] == (soft if files == sys.maxsize else files, hard)
    assert len(set_to) == (1 if soft in (files, ALL) else 2)


def test_a_system_that_lets_nothing_be_raised_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, limits: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, ALL))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert open_files(1000) == 256
