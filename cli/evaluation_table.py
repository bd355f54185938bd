"""The results of an evaluation as lines for people."""

from collections.abc import Iterator, Sequence
from typing import Any

Result = dict[str, Any]


def table(results: Result) -> Iterator[str]:
    """A row for each model, a column for each metric, in percent with intervals; then what else there is to say."""
    models = [model["revision"] for model in results["models"]]
    yield from (f"{model['revision']}: {model['title']}" for model in results["models"])
    for benchmark in results["benchmarks"]:
        yield ""
        yield f"{benchmark['name']}, {benchmark['problems']} problems"
        metrics = list(dict.fromkeys(score["metric"] for score in benchmark["scores"]))
        rows = [["", *metrics]]
        rows += [
            [model, *(_figure(_find(benchmark["scores"], model, metric)) for metric in metrics)] for model in models
        ]
        rows += [
            [f"{model} - {models[0]}", *(_points(_find(benchmark["differences"], model, metric)) for metric in metrics)]
            for model in models[1:]
        ]
        clean = benchmark["scores"][0]["clean"]
        if clean is not None:
            rows += [
                [f"{model} ({clean['problems']} clean)"]
                + [_figure(_find(benchmark["scores"], model, metric)["clean"]) for metric in metrics]
                for model in models
            ]
        yield from _aligned(rows)
        yield from _remarks(benchmark)


def _remarks(benchmark: Result) -> Iterator[str]:
    """What of the completions was cut, unscored or did not fit, and what occurs in the training rows."""
    for each in benchmark["completions"]:
        for name, part in ((name, each[name]) for name in ("greedy", "sampled") if name in each):
            if part["clipped"]:
                yield f"{each['revision']}, {name}: {part['share_clipped']:.1%} of {part['count']} completions are cut."
            if part["unscored"]:
                yield f"{each['revision']}, {name}: {part['unscored']} completions have no score, and count as wrong."
    unfit = benchmark["completions"][0]["unfit"]
    if unfit:
        yield f"{len(unfit)} prompts do not fit into the model with max_completion_length, and count as wrong."
    found = benchmark["contamination"]
    if not found["checked"]:
        yield f"Not compared with the training rows: {found['why']}"
        return
    yield (
        f"{found['count']} ({found['share']:.1%}) occur in the {found['training_rows']} training rows: "
        f"{len(found['exact'])} whole, {len(found['overlapping'])} by 13 words in a row"
        + (f" ({found['short']} are shorter)." if found["short"] else ".")
    )


def _find(scores: Sequence[Result], revision: str, metric: str) -> Result:
    return next(score for score in scores if (score["revision"], score["metric"]) == (revision, metric))


def _figure(score: Result) -> str:
    return f"{score['value']:.1%} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _points(score: Result) -> str:
    return f"{100 * score['value']:+.1f} [{100 * score['low']:+.1f}, {100 * score['high']:+.1f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield "  " + "   ".join(cells).rstrip()
