"""An evaluation: models times benchmarks, sampled as far as the folder does not have it yet, and what came of it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hivegrpo.peer.evaluation.conditions import encoder_of
from hivegrpo.peer.evaluation.exam import Exam, prepare_exams
from hivegrpo.peer.evaluation.ledger import Ledger, digest_of
from hivegrpo.peer.evaluation.models import Measured, identify, training_of
from hivegrpo.peer.evaluation.results import Answers, summarize
from hivegrpo.peer.evaluation.sampling import sample_missing
from hivegrpo.peer.evaluation.settings import EvaluateConfig
from hivegrpo.peer.inference.answering import Answering, open_answering
from hivegrpo.peer.inference.load import find_run
from hivegrpo.peer.inference.locate import is_address
from hivegrpo.peer.inference.origin import is_exported
from hivegrpo.peer.inference.states import Revision, choose, parse_revision
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.homes import locked_home, state_folder

SAMPLES = "samples"
"""Folder of the ledgers."""

Show = Callable[[str, int, int], None]
"""What is at work, completions that are there, and those that are to be there in the end."""


def evaluate(
    source: str | None,
    revisions: Sequence[str],
    config: EvaluateConfig,
    settings: PeerConfig,
    to: Path | None,
    show: Show,
) -> tuple[Path, dict[str, Any]]:
    """The folder and its results (`results.summarize`): of each revision of a source, on each benchmark.

    to: where samples are kept; a folder of the model's own in the state folder if left out. Called again, it goes on
    where it stopped. ConfigError for a source, benchmark or setting that is wrong, UnreachableError if a run or a hub
    does not answer, MismatchError for content that is not what a chain names, BusyError if another evaluation writes
    to the folder, NumericsError if a model's numbers are not finite.
    """
    if not is_exported(source):
        _look_up(source, [parse_revision(revision) for revision in revisions])
    models: list[Measured] = []
    answers: list[list[Answers]] = []
    with ExitStack() as stack:
        exams: list[Exam] = []
        folder = Path()
        for revision in revisions:
            show(f"loading {revision}", 0, 0)
            with closing(open_answering(source, revision, settings.device)) as answering:
                models.append(identify(answering, source, revision))
                if not exams:
                    folder = to if to is not None else _folder_of(answering, models[0])
                    stack.enter_context(locked_home(folder, "--to"))
                    exams = prepare_exams(config, answering, training_of(answering, source), settings)
                    for exam in exams:
                        stack.enter_context(exam.pool)
                answers.append([_examine(answering, models[-1], exam, folder, settings, show) for exam in exams])
            del answering  # before the next is loaded: two may not fit
    return folder, summarize(models, exams, answers)


def _examine(
    answering: Answering, model: Measured, exam: Exam, folder: Path, settings: PeerConfig, show: Show
) -> Answers:
    """All completions of one benchmark by one model."""
    done = 0

    def count(completions: int) -> None:
        nonlocal done
        done += completions
        show(f"{exam.section.title}, {model.revision}", done, exam.completions)

    answers = Answers()
    for part in exam.parts:
        conditions = asdict(part.conditions)
        header = {"model": model.identity, "problems": exam.problems.digest, "conditions": conditions}
        with closing(Ledger.open(folder / SAMPLES, header, exam.reward.answer_of)) as ledger:
            answers.unfit = sample_missing(
                answering.model,
                encoder_of(exam.section, answering),
                exam.problems.rows,
                part.copies,
                part.conditions,
                exam.pool,
                ledger,
                settings.sampling_tokens,
                count,
            )
            answers.outcomes[part.name] = ledger.outcomes
    return answers


def _look_up(source: str | None, revisions: Sequence[Revision]) -> None:
    """Fetch a run's rows, if it has an address; of another, ConfigError for a revision that cannot be had, before
    hours go by on the one before it."""
    run = find_run(source, revisions[0], rows=True)
    if source is None or not is_address(source):
        for revision in revisions:
            if revision != "base":
                choose(run, revision)


def _folder_of(answering: Answering, model: Measured) -> Path:
    """The same for all versions of a run."""
    trained = answering.trained
    name = trained.run.chain.run_id if trained is not None else digest_of(model.identity)
    return state_folder() / "evaluations" / name[:16]
