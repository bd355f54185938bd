"""What to measure on (evaluate.toml): benchmarks, and how each is asked and scored."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from hivegrpo.peer.evaluation.estimators import MAX_SAMPLES
from hivegrpo.protocol.config import GENERATED, DatasetSection, Section
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.strict import explain, read_toml

ADDITION = "addition:"
"""Before a number of digits, names the built-in problems of adding two numbers of so many digits."""
FILES = (".jsonl", ".parquet", ".csv")
SIZE = 500
"""Problems that are generated where size is left out."""


class BenchmarkSection(Section):
    """One [[benchmark]] table."""

    source: str | None = Field(default=None, min_length=1)
    """File (.jsonl, .parquet, .csv), hub dataset, reasoning_gym:TASK or addition:DIGITS; the run's [evaluation] rows
    if left out."""
    name: str | None = Field(default=None, min_length=1, max_length=64, pattern=r"^[ -~]+$")
    """In tables and plots; made from source if left out."""
    config: str | None = None
    """Configuration of the hub dataset."""
    split: str | None = None
    """Split of the hub dataset; "test" if left out."""
    revision: str | None = None
    """Commit, tag or branch of the hub dataset."""
    size: int | None = Field(default=None, ge=1, le=1 << 16)
    """Problems to generate; 500 if left out."""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Seed of generated problems; 0 if left out."""
    prompt_column: str = "prompt"
    """Column that holds the prompt."""
    answer_column: str | None = "answer"
    """Column that holds what the reward compares with. "" if there is none."""
    columns: tuple[str, ...] | None = None
    """Further columns that the reward needs; all of them if left out."""
    system_prompt: str | None = None
    """System message in place of the training's."""
    prompt_template: str | None = None
    """Plain text around the prompt, with "{prompt}" once, in place of the training's form of prompts."""
    reward: str | None = Field(default=None, min_length=1)
    """Reward function; a problem is solved where it gives 1 or more. The training's first if left out."""
    options: dict[str, bool | int | float | str] | None = None
    """Keyword arguments of the reward function."""
    greedy: bool = True
    """Whether to measure the most probable completion of each problem."""
    n: int = Field(default=0, ge=0, le=MAX_SAMPLES)
    """Completions to sample of each problem."""
    k: tuple[int, ...] = ()
    """For pass@k and maj@k; 1 and n if left out."""
    temperature: float | None = Field(default=None, gt=0.0, le=100.0)
    """Of the n samples; the training's if left out, like top_p and top_k."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens with this much probability."""
    top_k: int | None = Field(default=None, ge=0)
    """Sample from this many most probable tokens; 0 is off."""
    max_completion_length: int | None = Field(default=None, ge=1)
    """Tokens; longer completions are cut, and counted. The training's if left out."""
    limit: int | None = Field(default=None, ge=1)
    """Problems to measure on, from the top; all if left out."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.n == 0 and not self.greedy:
            raise ValueError("there is nothing to measure: set n, or greedy = true")
        if self.n == 0 and (self.k or self.temperature is not None):
            raise ValueError("k and temperature are for samples: set n")
        if any(not 1 <= k <= self.n for k in self.k):
            raise ValueError(f"each k is 1 to n, which is {self.n}")
        if not self.generated and (self.size is not None or self.seed is not None):
            raise ValueError(f"size and seed belong to {GENERATED}TASK and {ADDITION}DIGITS")
        if (self.source or ADDITION).startswith(ADDITION) and (self.config or self.split or self.revision):
            raise ValueError("config, split and revision belong to a hub dataset: name it as source")
        try:
            _ = self.dataset
        except ValidationError as error:
            reasons = [item["msg"].removeprefix("Value error, ") for item in error.errors()]
            raise ValueError("; ".join(reasons)) from None
        return self

    @property
    def generated(self) -> bool:
        """Whether a generator makes the problems."""
        return self.source is not None and self.source.startswith((GENERATED, ADDITION))

    @property
    def title(self) -> str:
        """What tables call it."""
        if self.name is not None or self.source is None:
            return self.name or "held out"
        return Path(self.source).name if self.source.endswith(FILES) else self.source

    @property
    def sizes(self) -> tuple[int, ...]:
        """Each k that is measured, ascending."""
        return tuple(sorted(set(self.k or (1, self.n)))) if self.n else ()

    @property
    def dataset(self) -> DatasetSection:
        """The same in the words of a run.toml: where rows come from, their columns, and what is put around prompts."""
        place: dict[str, Any] = {"name": self.source or self.title}
        if self.source is not None and self.source.endswith(FILES):
            place = {"path": Path(self.source).expanduser()}
        elif self.source is not None and self.source.startswith(GENERATED):
            place |= {"size": self.size or SIZE, "seed": self.seed or 0}
        same = ("config", "split", "revision", "prompt_column", "answer_column", "columns")
        form = ("system_prompt", "prompt_template")
        return DatasetSection.model_validate(place | {name: getattr(self, name) for name in (*same, *form)})


class EvaluateConfig(Section):
    """Everything in evaluate.toml."""

    benchmark: tuple[BenchmarkSection, ...] = Field(min_length=1, max_length=64)
    """What to measure on, one [[benchmark]] table each."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of all sampling."""
    training: DatasetSection | None = None
    """Rows that the model was trained on, to look for benchmark problems in; those of the run if left out."""

    @model_validator(mode="after")
    def _tell_apart(self) -> Self:
        titles = [section.title for section in self.benchmark]
        doubled = sorted({title for title in titles if titles.count(title) > 1})
        if doubled:
            raise ValueError(f"two benchmarks are called {', '.join(doubled)}: give each a name")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read evaluate.toml, with local paths relative to its folder. ConfigError if anything is wrong with it."""
        tables = read_toml(path)
        for table in tables.get("benchmark", []) if isinstance(tables.get("benchmark"), list) else []:
            if isinstance(table, dict) and str(table.get("source")).endswith(FILES):
                table["source"] = _relative_to(path, table["source"])
        training = tables.get("training")
        if isinstance(training, dict) and isinstance(training.get("path"), str):
            training["path"] = _relative_to(path, training["path"])
        return cls.of(tables, str(path))

    @classmethod
    def of(cls, tables: dict[str, Any], title: str) -> Self:
        """From plain values; ConfigError, which speaks of `title`, if anything is wrong with them."""
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            raise explain(error, cls, title) from None


def required_reward(section: BenchmarkSection) -> str | None:
    """The reward function that is named, or goes with the source."""
    if section.reward is None and section.source is not None and section.generated:
        return "exact_match" if section.source.startswith(ADDITION) else section.source
    return section.reward


def parse_digits(source: str) -> int:
    """The number of digits in "addition:DIGITS"; ConfigError if it is none from 1 to 18."""
    text = source.removeprefix(ADDITION)
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 18:
        return int(text)
    raise ConfigError(f'"{source}" is no benchmark.', f"Write {ADDITION} and a number of digits, 1 to 18.")


def _relative_to(path: Path, name: str) -> str:
    return str((path.parent / Path(name).expanduser()).resolve())
