"""Training on one machine alone: the versions of `Solo`, their home, and the command `hivegrpo solo`."""

import asyncio
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import machine
from support.trained_run import write_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from hivegrpo.cli.launch_solo import launch
from hivegrpo.cli.output import Record
from hivegrpo.cli.threads import is_peer
from hivegrpo.cli.training import METRICS_FILE, STATE_FILE, Training, home_of
from hivegrpo.peer.inference.origin import read_origin
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.solo import Solo, SoloStep
from hivegrpo.peer.rewards import registry
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.history import read_history

DULL = "dull"
"""The answer of rows whose completions all get the same reward."""
ROWS = [{"answer": "", "prompt": prompt} for prompt in ("1+1=", "2+2=", "3+3=", "4+4=", "5+5=")]
OPEN: list[Learner] = []


def low_tokens(*, completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
    """Something that a random policy does more or less of: the share of tokens from the lower half."""
    shares = [sum(token < 129 for token in ids) / len(ids) for ids in completion_ids]
    return [0.25 if gold == DULL else share for gold, share in zip(answer, shares, strict=True)]


@pytest.fixture(autouse=True)
def reward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.BUILT_IN, "low_tokens", Reward("low_tokens", 1, low_tokens))
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solo") / "base"
    write_base(folder)
    return folder


Tables = dict[str, dict[str, Any]]


def tables(base: Path, rows: Path | None = None, **sections: dict[str, Any]) -> Tables:
    """A small run; sections override theirs key by key."""
    values: Tables = {
        "run": {"name": "alone", "versions": 6, "seed": 3},
        "model": {"path": str(base), "trainable": "full"},
        "dataset": {"path": str(rows or base / "rows.jsonl")},
        "rewards": {"functions": ["low_tokens"]},
        "grpo": {"num_generations": 4, "prompts_per_round": 2, "max_completion_length": 6, "max_prompt_length": 16},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1},
    }
    for name, table in sections.items():
        values[name] = values.get(name, {}) | table
    return values


def begin(base: Path, rows: Sequence[dict[str, Any]] = ROWS, **sections: dict[str, Any]) -> Solo:
    config = RunConfig.model_validate(tables(base, **sections))
    prompts = Prompts(tuple(rows))
    learner = Learner.open(config, PeerConfig(threads=1), base, prompts, prompts if config.evaluation else None)
    OPEN.append(learner)
    return Solo(config, learner, version_zero(learner.layout, config, base))


def steps(solo: Solo, count: int) -> list[SoloStep]:
    return [solo.step() for _ in range(count)]


def bits(solo: Solo) -> bytes:
    return solo.state.buffer.numpy().tobytes()


def untimed(step: SoloStep) -> dict[str, float]:
    timed = ("seconds/", "num_device_seconds")
    return {name: value for name, value in step.metrics.items() if not name.startswith(timed)}


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_steps_make_the_versions_of_a_run(base: Path, trainable: str) -> None:
    solo = begin(base, model={"trainable": trainable}, lora={"r": 2})
    before = solo.state.parameters.clone()
    first, second = steps(solo, 2)
    assert (first.version, second.version, solo.position) == (1, 2, 4)
    assert first.note == ""
    assert {"reward", "loss", "entropy", "seconds/rollout", "seconds/gradient", "seconds/step"} <= first.metrics.keys()
    assert (first.metrics["learning_rate"], second.metrics["learning_rate"]) == (0.0, 1e-3)  # one step of warm-up
    assert not torch.equal(solo.state.parameters, before)
    assert torch.equal(solo.learner.policy.flatten(), solo.state.parameters)
    assert not solo.finished
    steps(solo, 4)
    assert solo.finished


def test_learning_raises_the_reward(base: Path) -> None:
    """Of 128 completions before and after 30 steps: a share's standard error is 0.02."""
    solo = begin(
        base,
        run={"versions": 30},
        optimizer={"learning_rate": 3e-3, "lr_scheduler_type": "constant", "warmup_steps": 0},
        grpo={"num_generations": 16, "prompts_per_round": 8, "max_completion_length": 4},
    )
    made = steps(solo, 30)
    assert made[-1].metrics["reward"] > made[0].metrics["reward"] + 0.2


@pytest.mark.parametrize("at", [1, 3])
def test_a_restored_run_goes_on_to_the_same_bits(base: Path, tmp_path: Path, at: int) -> None:
    """At 1 before, at 3 after the reference has moved from the base, which counts for much in the loss."""
    grpo = {"beta": 0.5, "ref_model_sync_steps": 2}
    whole = begin(base, grpo=grpo)
    told = steps(whole, 6)
    first = begin(base, grpo=grpo)
    steps(first, at)
    first.save(tmp_path / "state")
    second = begin(base, grpo=grpo).restore(tmp_path / "state")
    assert (second.version, second.position) == (at, 2 * at)
    assert [untimed(step) for step in steps(second, 6 - at)] == [untimed(step) for step in told[at:]]
    assert bits(second) == bits(whole)


def test_what_is_no_state_of_the_policy_is_refused(base: Path, tmp_path: Path) -> None:
    solo = begin(base)
    solo.save(tmp_path / "state")
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-4])
    with pytest.raises(ConfigError, match="not a state"):
        solo.restore(tmp_path / "state")


def test_a_rollout_makes_num_iterations_versions(base: Path, tmp_path: Path) -> None:
    solo = begin(base, grpo={"num_iterations": 3})
    made = steps(solo, 6)
    assert [step.version for step in made] == [1, 2, 3, 4, 5, 6]
    assert ["seconds/rollout" in step.metrics for step in made] == [True, False, False] * 2
    assert solo.position == 4
    other = begin(base, grpo={"num_iterations": 3})
    steps(other, 2)
    other.save(tmp_path / "state")
    # The rollout is gone: the next version, and the one after it, come of new ones.
    again = steps(begin(base, grpo={"num_iterations": 3}).restore(tmp_path / "state"), 2)
    assert ["seconds/rollout" in step.metrics for step in again] == [True, True]


def test_dynamic_sampling_takes_further_prompts_in_the_place_of_dull_ones(base: Path) -> None:
    rows = [row | {"answer": DULL} if number % 2 else row for number, row in enumerate(ROWS * 2)]
    solo = begin(base, rows, grpo={"dynamic_sampling_factor": 3.0})
    made = steps(solo, 3)
    assert [step.version for step in made] == [1, 2, 3]
    assert sum(step.metrics["groups/dropped"] for step in made) > 0
    assert {step.metrics["num_prompts"] - step.metrics["groups/dropped"] for step in made} == {2}
    assert solo.position == sum(step.metrics["num_prompts"] for step in made)


@pytest.mark.parametrize("setting", [{"scale_rewards": "batch"}, {"top_entropy_quantile": 0.5}], ids=str)
def test_what_looks_at_a_whole_batch_is_allowed_alone(base: Path, setting: dict[str, Any]) -> None:
    optimizer = {"warmup_steps": 0}
    plain, solo = begin(base, optimizer=optimizer), begin(base, grpo=setting, optimizer=optimizer)
    with pytest.raises(ConfigError, match="hivegrpo solo"):
        solo.config.require_swarm()
    steps(plain, 2)
    assert [step.version for step in steps(solo, 2)] == [1, 2]
    assert solo.state.parameters.isfinite().all()
    assert bits(solo) != bits(plain)


def test_no_version_is_made_of_nothing(base: Path) -> None:
    """Six epochs, each with a prompt that is too long: as many in vain as there are prompts, but not in a row."""
    rows = [{"answer": "", "prompt": "1" * 20}, *ROWS]
    solo = begin(base, rows, run={"versions": 40}, grpo={"prompts_per_round": 1})
    made = steps(solo, 36)
    assert solo.version == 30
    nothing = [step for step in made if step.note]
    assert len(nothing) == 6
    assert "longer than max_prompt_length" in nothing[0].note
    assert "learning_rate" not in nothing[0].metrics


def test_an_epoch_that_teaches_nothing_ends_the_run(base: Path) -> None:
    solo = begin(base, [row | {"answer": DULL} for row in ROWS], grpo={"dynamic_sampling_factor": 1.5})
    assert solo.step().note == "within each of 3 groups all rewards are equal (0.25)"
    with pytest.raises(ConfigError, match=r"All 5 prompts .* all rewards are equal \(0.25\).* num_generations"):
        solo.step()
    assert solo.version == 0


def test_the_newest_version_is_evaluated_every_so_often(base: Path) -> None:
    solo = begin(base, evaluation={"path": "rows.jsonl", "every": 3})
    made = steps(solo, 6)
    assert ["eval/accuracy" in step.metrics for step in made] == [True, False, False] * 2
    assert 0.0 <= made[3].metrics["eval/accuracy"] <= 1.0
    assert solo.evaluate().keys() == {"eval/accuracy", "eval/problems"}


def test_a_step_is_given_up_on_request_and_leaves_nothing(base: Path) -> None:
    solo, cancelled = begin(base), threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        solo.step(cancelled)
    assert (solo.version, solo.position) == (0, 0)
    other = begin(base)
    assert untimed(solo.step()) == untimed(other.step())


# Its home.


@pytest.fixture
def config(base: Path, tmp_path: Path) -> RunConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return RunConfig.model_validate(tables(base, rows, evaluation={"path": str(rows), "every": 4}))


def train(config: RunConfig, home: Path, count: int) -> tuple[bytes, list[dict[str, Any]]]:
    """At most so many steps in a home; its state and its metrics."""
    training = Training.open(config, PeerConfig(threads=1), home)
    try:
        while not training.finished and count > 0:
            training.advance(threading.Event())
            count -= 1
        if training.finished:
            training.conclude(threading.Event())
    finally:
        training.close()
    return (home / STATE_FILE).read_bytes(), list(read_history(home / METRICS_FILE))


def test_what_is_told_of_a_training_follows_from_its_metrics(config: RunConfig, tmp_path: Path) -> None:
    _, metrics = train(config, tmp_path / "home", 6)
    training = Training.open(config, PeerConfig(threads=1), tmp_path / "home")
    try:
        origin = training.provenance
    finally:
        training.close()
    values = [record["metrics"]["eval/accuracy"] for record in metrics if "eval/accuracy" in record["metrics"]]
    assert origin.accuracies == tuple(zip((0, 4, 6), values, strict=True))  # each of the policy that was measured
    assert (origin.version, origin.cost.versions, origin.cost.untimed) == (6, 6, 0)
    assert origin.cost.device_seconds == sum(record["metrics"].get("num_device_seconds", 0.0) for record in metrics)
    assert origin.config.dataset.path == Path("rows.jsonl"), "no folder of this machine"


def roots(metrics: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(record["version"], record["state_root"]) for record in metrics if record["kind"] == "version"]


def test_a_home_goes_on_where_it_was(config: RunConfig, tmp_path: Path) -> None:
    state, metrics = train(config, tmp_path / "whole", 6)
    assert [record["version"] for record in metrics] == [1, 2, 3, 4, 5, 6, 6]
    assert ["eval/accuracy" in record["metrics"] for record in metrics] == [True, *[False] * 3, True, False, True]
    for count in (2, 1, 9):
        last = train(config, tmp_path / "parts", count)
    assert last[0] == state
    assert roots(last[1]) == roots(metrics)
    assert train(config, tmp_path / "parts", 1) == last


def test_a_crash_before_the_state_is_saved_leaves_no_version_told_twice(config: RunConfig, tmp_path: Path) -> None:
    home = tmp_path / "home"
    saved, _ = train(config, home, 2)
    _, whole = train(config, home, 1)
    (home / STATE_FILE).write_bytes(saved)
    _, metrics = train(config, home, 1)
    assert roots(metrics) == roots(whole)


def test_a_home_keeps_to_what_it_began_with(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "home", 1)
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"r": 3})})
    assert home_of(other) != home_of(config)
    with pytest.raises(ConfigError, match="another config"):
        train(other, tmp_path / "home", 1)
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ConfigError, match="another dataset, evaluation"):
        train(config, tmp_path / "home", 1)


def test_a_misfit_is_found_before_the_model_is_loaded(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needy(*, completions: list[str], solution: list[str], **_: Any) -> list[float]:
        return [0.0 for _ in completions]

    monkeypatch.setitem(registry.BUILT_IN, "low_tokens", Reward("low_tokens", 1, needy))
    monkeypatch.setattr(Learner, "open", None)
    with pytest.raises(ConfigError, match="needs the column solution"):
        train(config, tmp_path / "home", 1)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_an_export_answers_like_the_policy(config: RunConfig, tmp_path: Path, trainable: str) -> None:
    config = config.model_copy(update={"model": config.model.model_copy(update={"trainable": trainable})})
    training = Training.open(config, PeerConfig(threads=1), tmp_path / "home")
    try:
        for _ in range(2):
            training.advance(threading.Event())
        tokens = torch.tensor([[50, 60, 70]])
        with torch.no_grad():
            expected = training._solo.learner.policy.model(tokens).logits
        training.export(tmp_path / "model")
    finally:
        training.close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        difference = (loaded(tokens).logits - expected).abs().max() / expected.abs().max()
    # Merging adds B A to W once, in fp32, instead of adding the outputs: the rounding differs.
    assert difference < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("1+1=")["input_ids"]
    assert "state root" in (tmp_path / "model" / "README.md").read_text()


def test_who_trains_alone_takes_a_share_of_the_cores() -> None:
    assert is_peer(["/usr/bin/python3", "/home/ann/.venv/bin/hivegrpo", "solo", "--config", "run.toml"])
    assert not is_peer(["/usr/bin/python3", "/home/ann/.venv/bin/hivegrpo", "chat", "solo"])


def test_a_folder_that_is_not_free_is_refused_before_anything_is_trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hivegrpo.cli.signals.signal.signal", lambda number, handler: None)
    monkeypatch.setattr("hivegrpo.cli.output.structlog.configure", lambda **settings: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "run.toml").write_text(as_toml(tables(base)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        launch(tmp_path / "run.toml", {}, home=tmp_path / "home", to=tmp_path / "model", as_json=False, verbose=False)
    assert not (tmp_path / "home").exists()


def as_toml(values: Tables) -> str:
    return "\n".join(
        line
        for name, table in values.items()
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
    )


@pytest.mark.slow
def test_the_command_stops_on_request_and_goes_on(base: Path, tmp_path: Path) -> None:
    """Interrupted once, it ends with the model that an uninterrupted run ends with."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = tables(base, tmp_path / "rows.jsonl", run={"versions": 40})
    values["rewards"] = {"functions": ["repetition_penalty"]}
    values["rewards.options.repetition_penalty"] = {"ngram_size": 1}
    (tmp_path / "run.toml").write_text(as_toml(values))
    command = ("solo", "--config", str(tmp_path / "run.toml"), "--to", str(tmp_path / "model"), "--threads", "1")

    async def scenario() -> list[Record]:
        async with machine(tmp_path) as host:
            first = await host.hivegrpo(*command, "--json")
            await first.wait_for(lambda record: record["kind"] == "version")
            first.send(signal.SIGINT)
            assert await first.ended() == 0, first.tail()
            assert first.records[-1]["kind"] == "stopped"
            assert 0 < first.records[-1]["version"] < 40
            assert not (tmp_path / "model").exists()
            second = await host.hivegrpo(*command, "--json")
            assert await second.ended() == 0, second.tail()
            assert second.records[0]["version"] == first.records[-1]["version"]
            assert second.records[-1] == {"kind": "written", "to": str(tmp_path / "model")}
            cost = second.records[-2]["cost"]
            assert (cost["versions"], cost["untimed"], cost["bytes_exchanged"]) == (40, 0, 0)
            assert cost["device_seconds"] > 0.0
            return [record for record in first.records + second.records if record["kind"] == "version"]

    told = roots(asyncio.run(scenario()))
    [home] = (tmp_path / "state" / "solo").iterdir()
    assert home.name.startswith("alone-")
    assert told == roots(list(read_history(home / METRICS_FILE)))
    _, whole = train(RunConfig.load(tmp_path / "run.toml"), tmp_path / "whole", 40)
    assert told == roots(whole)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 64
    origin = read_origin(tmp_path / "model")
    assert (origin["version"], origin["state_root"], origin["run_id"]) == (40, told[-1][1], None)
    assert "with `hivegrpo solo`" in (tmp_path / "model" / "README.md").read_text()
