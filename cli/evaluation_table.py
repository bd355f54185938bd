"""The results of an evaluation as lines for people."""

from collections.abc import Iterator, Sequence
from typing import Any

from hivegrpo.protocol.text import visible_line

Result = dict[str, Any]


def table(results: Result) -> Iterator[str]:
    """A row for each metric, a column for each model, in percent with intervals, and for each difference, in points;
    then what else there is to say. Names may come from strangers."""
    return map(visible_line, _lines(results))


def _lines(results: Result) -> Iterator[str]:
    models = [model["revision"] for model in results["models"]]
    yield from (f"{model['revision']}: {model['title']}" for model in results["models"])
    for benchmark in results["benchmarks"]:
        yield ""
        yield f"{benchmark['name']}, {benchmark['problems']} problems"
        rows = [["", *models, *(f"{model} - {models[0]}" for model in models[1:])]]
        for metric in dict.fromkeys(score["metric"] for score in benchmark["scores"]):
            scores = [score for score in benchmark["scores"] if score["metric"] == metric]
            differences = [each for each in benchmark["differences"] if each["metric"] == metric]
            rows.append([metric, *map(_figure, scores), *map(_points, differences)])
            clean = [score["clean"] for score in scores if score["clean"] is not None]
            if clean:
                rows.append(
                    [f"{metric}, {clean[0]['problems']} clean", *map(_figure, clean), *("" for _ in differences)]
                )
        yield from _aligned(rows)
        yield from _remarks(benchmark)


def _remarks(benchmark: Result) -> Iterator[str]:
    """What of the completions was cut, unscored or did not fit, and what occurs in the training rows."""
    for each in benchmark["completions"]:
        for name, part in ((name, each[name]) for name in ("greedy", "sampled") if name in each):
            if part["clipped"]:
                share = f"{part['clipped']} of {part['count']} completions ({part['share_clipped']:.1%})"
                yield f"{each['revision']}, {name}: {share} are cut."
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


def _figure(score: Result) -> str:
    return f"{score['value']:.1%} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _points(difference: Result) -> str:
    value, low, high = (round(100 * difference[name], 1) + 0.0 for name in ("value", "low", "high"))  # -0.0 is 0.0
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield "  " + "   ".join(cells).rstrip()
