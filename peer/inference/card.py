"""The model card of an export: README.md with the front matter that the hub reads.

Everything in it comes from the run's configuration and chain, which strangers wrote: values are shown as code, on one
line, and go into the front matter through a YAML writer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hivegrpo.peer.inference.cost import CLAIMED, describe_cost
from hivegrpo.peer.inference.evaluated import Row
from hivegrpo.peer.inference.provenance import Provenance
from hivegrpo.peer.inference.usage import loading_code
from hivegrpo.peer.learn.sources import HUB_NAME
from hivegrpo.protocol.config import ModelSection, Rows

MOST_CHARACTERS = 1000
"""Of one value."""
TAGS = ("grpo", "hivegrpo", "reinforcement-learning")


@dataclass(frozen=True, slots=True)
class Form:
    """How the weights were written."""

    adapter: bool
    dtype: str
    rounding: float | None = None
    """As in `merge.Merged`."""
    prompts_reproduced: bool = True
    """Whether the tokenizer's chat template was seen to give the training's prompts."""
    license: str | None = None
    evaluation: Sequence[Sequence[Row]] = field(default=())
    """Tables of `evaluated.Results`."""


def model_card(origin: Provenance, form: Form) -> str:
    """The whole file."""
    parts = [
        f"---\n{_front_matter(origin, form)}---",
        f"# {origin.config.run.name}",
        _sentence(origin, form),
        _table([("", ""), *_identity(origin)]),
        "## Use",
        _use(origin, form),
        *(_training(origin) if origin.version else ()),
        *_evaluation(origin, form),
        "## Verify",
        _verify(origin, form),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(origin: Provenance, form: Form) -> str:
    from huggingface_hub import ModelCardData

    model, rows = origin.config.model, origin.config.dataset
    base = model.name if model.name is not None and HUB_NAME.fullmatch(model.name) else None
    relation: dict[str, Any] = {"base_model_relation": "adapter" if form.adapter else "finetune"} if base else {}
    data = ModelCardData(
        base_model=base,
        datasets=rows.name if _is_on_hub(rows) else None,
        library_name="peft" if form.adapter else "transformers",
        license=form.license,
        pipeline_tag="text-generation",
        tags=list(TAGS),
        **relation,
    )
    return f"{data.to_yaml()}\n"


def _sentence(origin: Provenance, form: Form) -> str:
    what = "The LoRA adapter" if form.adapter else "The weights"
    if origin.version is None:
        return f"{what} of the base model of a run of hivegrpo, as it was before training."
    how = "by volunteers' machines, with hivegrpo" if origin.run_id else "on one machine, with `hivegrpo solo`"
    return f"{what} of a policy trained by GRPO {how}."


def _identity(origin: Provenance) -> Iterable[tuple[str, str]]:
    config = origin.config
    yield "base", _code(_model(config.model))
    yield "run", _code(config.run.name)
    if origin.run_id is not None:
        yield "run id", _code(origin.run_id)
        yield "coordinator", _code(origin.coordinator)
    if origin.version is not None:
        yield "policy version", _code(f"{origin.version} of {config.run.versions}")
        yield "state root", _code(origin.state_root)
    if origin.contributors:
        sizes = [len(peers) for peers in origin.contributors]
        yield "contributors", f"{len(frozenset().union(*origin.contributors))}, {_range(sizes)} in each version"
    yield "dataset", _code(_rows(config.dataset))


def _use(origin: Provenance, form: Form) -> str:
    model = origin.config.model
    parts = [FIRST_THE_BASE] if form.adapter and model.name is None else []
    parts.append(f"```python\n{loading_code(model, adapter=form.adapter, prompt=origin.example)}\n```")
    parts += [] if form.prompts_reproduced else [NOT_REPRODUCED]
    parts.append("The adapter is in float32, as it was trained." if form.adapter else _rounding(form))
    return "\n\n".join(parts)


def _rounding(form: Form) -> str:
    if form.dtype == "float32":
        return "The weights are in float32: nothing of what was trained is rounded away."
    text = (
        f"The weights are in {form.dtype}, which keeps 8 significant bits: each is rounded by at most 2^-9 (0.2 %) of "
        "its size."
    )
    if form.rounding is None:
        return text
    return (
        f"{text} In the layers that were trained, this comes to {form.rounding:.2%} of what training has changed "
        "(Frobenius norms). The adapter (`--adapter`) and `--dtype float32` have no such loss."
    )


def _training(origin: Provenance) -> list[str]:
    config = origin.config
    trained = config.lora.model_dump() if config.model.trainable == "lora" else {"trainable": "all parameters"}
    weights = config.rewards.weights or (1.0,) * len(config.rewards.functions)
    rewards = dict(zip(config.rewards.functions, weights, strict=True))
    sections = [
        ("rewards and weights", rewards),
        ("GRPO", config.grpo.model_dump(exclude_none=True)),
        ("trained", trained),
        ("AdamW", config.optimizer.model_dump()),
    ]
    if origin.run_id is not None:
        sections.append(("averaging", {"codec": config.averaging.codec, "rule": config.averaging.rule}))
    settings = [(name, _code(_assignments(values))) for name, values in sections]
    cost = describe_cost(origin.cost)
    return [
        "## Training",
        _table([("setting", "value"), *settings]),
        f"All settings are in `hivegrpo.json`, and the sampler's in `generation_config.json`.\n\n{cost} "
        f"{CLAIMED if origin.run_id else ''}".rstrip(),
    ]


def _evaluation(origin: Provenance, form: Form) -> list[str]:
    parts = []
    if origin.accuracies and origin.config.evaluation is not None:
        rows = origin.config.evaluation
        digest = f" (SHA-256 {_code(origin.held_out)})" if origin.held_out is not None else ""
        measured = list(dict.fromkeys((origin.accuracies[0], origin.accuracies[-1])))
        reward = _code(origin.config.rewards.functions[0])
        told = ", as peers reported it" if origin.run_id is not None else ""
        parts.append(
            f"Greedy accuracy during training{told}, by the reward {reward}, on the first {rows.limit} held-out rows "
            f"of {_code(_rows(rows))}{digest}:"
        )
        values = [(f"version {version}", f"{accuracy:.1%}") for version, accuracy in measured]
        parts.append(_table([("policy", "solved"), *values]))
    if form.evaluation:
        parts.append("Measured with `hivegrpo evaluate`:")
        parts += [_measured(table) for table in form.evaluation]
    return ["## Evaluation", *parts] if parts else []


def _measured(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[_code(row[name]) if name in row else "" for name in names] for row in rows]
    return _table([[_code(name) for name in names], *lines])


def _verify(origin: Provenance, form: Form) -> str:
    if origin.run_id is None:
        return "One machine trained this alone: there is no chain that others signed, and nothing to check it against."
    again = f"hivegrpo export ADDRESS --revision {origin.revision} --to again"
    commands = [
        f"    hivegrpo watch ADDRESS --run {origin.run_id} --once",
        f"    {again}{' --adapter' if form.adapter else ''}",
    ]
    address = (
        "The run's signed chain tells how every version was made. With the run's address (it ends in "
        f"`/p2p/{origin.coordinator}`), or a folder of it, anyone can check that these are its weights:"
    )
    return "\n\n".join([address, "\n".join(commands), WHAT_IS_VERIFIED])


def _model(model: ModelSection) -> str:
    base = model.name or "the model that came with the run"
    return f"{base} at revision {model.revision}" if model.revision is not None else base


def _rows(rows: Rows) -> str:
    if rows.path is not None:
        return f"{rows.path.name}, which came with the run"
    if rows.task is not None:
        return f"{rows.name}, size {rows.size}, seed {rows.seed}"
    details = [("config", rows.config), ("split", rows.split), ("revision", rows.revision)]
    return ", ".join([str(rows.name), *(f"{name} {value}" for name, value in details if value is not None)])


def _is_on_hub(rows: Rows) -> bool:
    return rows.name is not None and rows.task is None and HUB_NAME.fullmatch(rows.name) is not None


def _assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _code(value: object) -> str:
    """Any value as code in one line of a table, which cannot end there."""
    text = " ".join(str(value).split()).replace("`", "'")
    # Of two backslashes before a bar the first escapes the second, and the bar ends the cell: set them apart.
    text = text.replace("\\|", "\\ |").replace("|", "\\|")
    return f"`{text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + ' ...'}`"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


FIRST_THE_BASE = (
    "The adapter needs the base that came with the run, in a folder `base`:\n\n"
    "    hivegrpo export ADDRESS --revision base --to base"
)
NOT_REPRODUCED = (
    "This tokenizer treats a text otherwise after its first special token, so the chat template does not give exactly "
    "the training's prompts: encode plain text with `tokenizer(text)` instead."
)
WHAT_IS_VERIFIED = (
    "The first (of `hivegrpo[watch]`) verifies signatures and links. The second makes the version again from its state "
    "or its updates, and refuses one with another state root than the signed one. An adapter's values are those of the "
    "state, bit for bit; merged weights may differ in their last bits between machines. Whoever has a home of the run "
    "can check more: `hivegrpo coordinator verify` replays steps and reductions, `hivegrpo check` verifies the run's "
    "invariants."
)
