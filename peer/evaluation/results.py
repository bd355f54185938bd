"""What an evaluation came to: figures with their intervals, how much was cut or not scored, and all of it again
without the problems that occur in the training rows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from hivegrpo.peer.evaluation.contamination import Contamination
from hivegrpo.peer.evaluation.estimators import majority_at_k, pass_at_k
from hivegrpo.peer.evaluation.exam import GREEDY, SAMPLED, Exam
from hivegrpo.peer.evaluation.intervals import LEVEL, Estimate, mean_interval, paired_interval, wilson
from hivegrpo.peer.evaluation.ledger import Outcome
from hivegrpo.peer.evaluation.models import Measured
from hivegrpo.protocol.errors import ConfigError

FORMAT = 1
Values = Mapping[int, float]
"""Of a metric: one in [0, 1] a problem, by its number, in ascending order."""


@dataclass(slots=True)
class Answers:
    """What one model made of one benchmark."""

    outcomes: dict[str, dict[tuple[int, int], Outcome]] = field(default_factory=dict)
    """By the name of the part; by problem and sample. There may be more than the benchmark asks for."""
    unfit: list[int] = field(default_factory=list)
    """Problems whose prompt does not fit: not solved, whatever is asked of them."""


def summarize(
    models: Sequence[Measured], exams: Sequence[Exam], answers: Sequence[Sequence[Answers]]
) -> dict[str, Any]:
    """The content of results.json. answers: by model and benchmark.

    ConfigError if a reward gave not a single score: then a figure of 0 would say nothing of the model.
    """
    return {
        "format": FORMAT,
        "hivegrpo": version("hivegrpo"),
        "level": LEVEL,
        "models": [asdict(model) for model in models],
        "benchmarks": [
            _benchmark(exam, {model.revision: row[place] for model, row in zip(models, answers, strict=True)})
            for place, exam in enumerate(exams)
        ],
    }


def values_of(exam: Exam, answers: Answers) -> dict[str, Values]:
    """Each metric's value for each problem: greedy, pass@k and maj@k."""
    problems, metrics = range(len(exam.problems.rows)), dict[str, Values]()
    unfit = set(answers.unfit)
    if GREEDY in answers.outcomes:
        outcomes = answers.outcomes[GREEDY]
        metrics["greedy"] = {
            problem: 0.0 if problem in unfit else float(outcomes[problem, 0].solved) for problem in problems
        }
    if SAMPLED in answers.outcomes:
        n, outcomes = exam.section.n, answers.outcomes[SAMPLED]
        samples = {
            problem: [] if problem in unfit else [outcomes[problem, sample] for sample in range(n)]
            for problem in problems
        }
        for k in exam.section.sizes:
            metrics[f"pass@{k}"] = {problem: _pass(own, k) for problem, own in samples.items()}
        for k in exam.section.sizes:
            if k > 1:
                metrics[f"maj@{k}"] = {problem: _majority(own, k) for problem, own in samples.items()}
    return metrics


def _pass(samples: Sequence[Outcome], k: int) -> float:
    return pass_at_k(len(samples), sum(sample.solved for sample in samples), k) if samples else 0.0


def _majority(samples: Sequence[Outcome], k: int) -> float:
    answers, solved = [sample.answer for sample in samples], [sample.solved for sample in samples]
    return majority_at_k(answers, solved, k) if samples else 0.0


def _benchmark(exam: Exam, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """answers: by revision."""
    values = {revision: values_of(exam, own) for revision, own in answers.items()}
    found = exam.contamination
    left_out = found.found if isinstance(found, Contamination) else frozenset[int]()
    first, *others = values
    return {
        "name": exam.section.title,
        "source": exam.section.source or "the run's [evaluation] rows",
        "problems": len(exam.problems.rows),
        "digest": exam.problems.digest,
        "conditions": {part.name: {"n": part.copies, **asdict(part.conditions)} for part in exam.parts},
        "scores": [
            {"revision": revision, "metric": metric, **_score(metric, own, left_out)}
            for revision, metrics in values.items()
            for metric, own in metrics.items()
        ],
        "differences": [
            {
                "revision": revision,
                "against": first,
                "metric": metric,
                **asdict(paired_interval(list(own.values()), list(values[first][metric].values()))),
            }
            for revision in others
            for metric, own in values[revision].items()
        ],
        "completions": [_completions(exam, revision, own) for revision, own in answers.items()],
        "contamination": _contamination(found, len(exam.problems.rows)),
        "per_problem": {revision: _per_problem(exam, own, values[revision]) for revision, own in answers.items()},
    }


def _score(metric: str, values: Values, left_out: Collection[int]) -> dict[str, Any]:
    clean = {problem: value for problem, value in values.items() if problem not in left_out}
    return {
        **asdict(_estimate(metric, values)),
        "interval": "wilson" if metric == "greedy" else "agresti-coull",
        "clean": {"problems": len(clean), **asdict(_estimate(metric, clean))} if clean and left_out else None,
    }


def _estimate(metric: str, values: Values) -> Estimate:
    if metric == "greedy":
        return wilson(int(sum(values.values())), len(values))
    return mean_interval(list(values.values()))


def _completions(exam: Exam, revision: str, answers: Answers) -> dict[str, Any]:
    """How many there are of each part, and how many of these were cut, or got no score."""
    parts: dict[str, Any] = {}
    for part in exam.parts:
        outcomes = _asked(exam, answers, part.name, part.copies)
        scored = sum(outcome.scored for outcome in outcomes)
        if outcomes and not scored:
            raise ConfigError(
                f'The reward function "{exam.reward.name}" gave no score to any of the {len(outcomes)} completions of '
                f"{exam.section.title}.",
                "Check that the benchmark's answers are what it compares with, or name another: --reward NAME.",
            )
        clipped = sum(not outcome.terminated for outcome in outcomes)
        parts[part.name] = {
            "count": len(outcomes),
            "clipped": clipped,
            "share_clipped": clipped / len(outcomes) if outcomes else 0.0,
            "unscored": len(outcomes) - scored,
        }
    return {"revision": revision, "unfit": answers.unfit, **parts}


def _asked(exam: Exam, answers: Answers, part: str, copies: int) -> list[Outcome]:
    fit = sorted({*range(len(exam.problems.rows))} - {*answers.unfit})
    return [answers.outcomes[part][problem, sample] for problem in fit for sample in range(copies)]


def _contamination(found: Contamination | str, problems: int) -> dict[str, Any]:
    if isinstance(found, str):
        return {"checked": False, "why": found}
    return {"checked": True, "count": len(found.found), "share": len(found.found) / problems, **asdict(found)}


def _per_problem(exam: Exam, answers: Answers, values: Mapping[str, Values]) -> list[dict[str, Any]]:
    """Of each problem: whether it was solved greedily, and how many of its samples are."""
    rows, unfit = list[dict[str, Any]](), {*answers.unfit}
    sampled = answers.outcomes.get(SAMPLED, {})
    for problem in range(len(exam.problems.rows)):
        row: dict[str, Any] = {"problem": problem}
        if "greedy" in values:
            row["greedy"] = int(values["greedy"][problem])
        if exam.section.n and problem not in unfit:
            own = [sampled[problem, sample] for sample in range(exam.section.n)]
            row["solved"] = sum(outcome.solved for outcome in own)
        rows.append(row)
    return rows
