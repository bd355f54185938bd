"""The problems of a benchmark: rows with a number each, which is their place in the source, and a digest of all."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hivegrpo.peer.evaluation.settings import ADDITION, SIZE, BenchmarkSection, parse_digits
from hivegrpo.peer.inference.locate import LocalRun
from hivegrpo.peer.learn.data import Prompts, canonical_rows
from hivegrpo.peer.learn.digests import rows_digest
from hivegrpo.peer.learn.sources import Row
from hivegrpo.peer.materials import read_rows
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol.errors import ConfigError, HiveError


@dataclass(frozen=True, slots=True)
class Problems:
    """Those that are measured on, from the top of the source."""

    digest: str
    """SHA-256, in hex, of all canonical rows of the source, beyond the limit too."""
    rows: tuple[Row, ...]


def load_problems(section: BenchmarkSection, run: LocalRun | None) -> Problems:
    """The problems of a benchmark; without a source, those of the run's [evaluation].

    ConfigError if there are none or they cannot be read; UnreachableError if a hub does not answer; MismatchError if
    the rows are not those that the run was launched with.
    """
    limit = section.limit
    if section.source is None:
        data, most = _held_out(run)
        limit = min(limit or most, most)
    elif section.source.startswith(ADDITION):
        digits = parse_digits(section.source)
        size = section.size or min(SIZE, addition_count(digits))
        data = b"".join(addition_rows(digits, size, section.seed or 0))
    else:
        try:
            data = canonical_rows(section.dataset, section.dataset)
        except HiveError as error:
            # They speak of a run.toml.
            raise type(error)(error.message, error.hint.replace("[dataset]", "[[benchmark]]")) from None
    return Problems(rows_digest(data).hex(), Prompts.from_jsonl(data).rows[:limit])


def addition_count(digits: int) -> int:
    """How many different problems there are."""
    return int((10**digits - 10 ** (digits - 1)) ** 2)


def addition_rows(digits: int, size: int, seed: int) -> Iterator[bytes]:
    """Canonical rows of `size` different problems "a+b=", a and b of so many digits without leading zeros.

    Drawn uniformly by Python's generator, whose integers are the same in every version. ConfigError if there are not
    so many.
    """
    low, high = 10 ** (digits - 1), 10**digits
    if size > addition_count(digits):
        raise ConfigError(f"There are {addition_count(digits)} problems {ADDITION}{digits}.", "Set a smaller size.")
    draws, drawn = random.Random(seed), set[tuple[int, int]]()  # noqa: S311 - problems, not secrets
    while len(drawn) < size:
        pair = draws.randrange(low, high), draws.randrange(low, high)
        if pair not in drawn:
            drawn.add(pair)
            yield f'{{"answer":"{sum(pair)}","prompt":"{pair[0]}+{pair[1]}="}}\n'.encode()


def _held_out(run: LocalRun | None) -> tuple[bytes, int]:
    """Canonical rows of the run's [evaluation], and how many of them it measures on."""
    hint = "Name a benchmark: --data FILE, reasoning_gym:TASK or addition:DIGITS, or several with --config."
    if run is None:
        raise ConfigError("An exported model has no held-out problems with it.", hint)
    section, manifest = run.config.evaluation, run.chain.manifest.message
    if section is None:
        raise ConfigError("The run has no [evaluation] rows.", hint)
    stores = run.stores
    if manifest.evaluation.name:
        stores = tuple(store for store in run.stores if store.has(ref_of(manifest.evaluation.blob)))
    if not stores:
        raise ConfigError("The run's [evaluation] rows are not on this machine.", hint)
    data = read_rows(manifest.evaluation, manifest.digests["evaluation"], run.config.dataset, section, stores[0])
    return data, section.limit
