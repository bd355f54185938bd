"""A measurement that somebody made of a model, from what `hivegrpo evaluate` wrote, as tables of its card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivegrpo.protocol.errors import ConfigError

MAX_BYTES = 64 << 20
"""Of a file: it has a line for each problem."""
MOST_LINES = 50
"""Of one table: a card is read by people."""

Row = dict[str, str]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Estimate(_Part):
    """A mean over problems in [0, 1], with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


class _Score(_Estimate):
    revision: str
    metric: str
    clean: _Estimate | None = None
    """Without the problems that occur in the training rows, if there are any."""


class _Benchmark(_Part):
    name: str
    problems: int
    scores: list[_Score]


class _Model(_Part):
    revision: str
    title: str
    identity: dict[str, str]
    """As of `provenance.identity_of`."""


class Results(_Part):
    """The content of a results.json, as far as a card shows it."""

    format: Literal[1]
    level: float = Field(gt=0.0, lt=1.0)
    models: list[_Model]
    benchmarks: list[_Benchmark]

    def tables(self, identity: Mapping[str, str]) -> list[list[Row]]:
        """A table for each benchmark, a row a figure; ConfigError unless the model of this identity was measured."""
        if all(model.identity != identity for model in self.models):
            measured = ", ".join(model.title for model in self.models) or "nothing"
            raise ConfigError(
                f"The evaluation is not of the model that is exported: it measured {measured}.",
                "Evaluate the version that you export, or leave out --evaluation.",
            )
        titles = {model.revision: model.title for model in self.models}
        return [self._table(benchmark, titles) for benchmark in self.benchmarks if benchmark.scores]

    def _table(self, benchmark: _Benchmark, titles: Mapping[str, str]) -> list[Row]:
        head = f"{benchmark.name}, {benchmark.problems} problems"
        rows = [
            {
                head: titles.get(score.revision, score.revision),
                "figure": score.metric,
                f"mean [{self.level:.0%} interval]": str(score),
            }
            | ({"without what training has seen": str(score.clean)} if score.clean is not None else {})
            for score in benchmark.scores
        ]
        return rows[:MOST_LINES]


def read_evaluation(path: Path) -> Results:
    """What a results.json of `hivegrpo evaluate` says; ConfigError if it is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes.", HINT)
        return Results.model_validate_json(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.", HINT) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ConfigError(f"{path} is not what it should be: {where}{first['msg']}.", HINT) from None


HINT = "Give the results.json in the folder that `hivegrpo evaluate` names."
