"""Sweeps: what is asked for, what is measured, what is reported; and the command, killed half-way and over peers."""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
import typer
from support.processes import ADDITION, addition_config, machine
from support.programs import gone
from support.trained_run import write_base

from hivegrpo.cli.sweep import running, swarm
from hivegrpo.cli.sweep.figures import Result, marginal_means, point_means
from hivegrpo.cli.sweep.folder import SWARM, Outcome, Task, open_sweep, run_folder
from hivegrpo.cli.sweep.grid import Axis, span
from hivegrpo.cli.sweep.launch import launch, read_plan
from hivegrpo.cli.sweep.plan import Budget, Plan
from hivegrpo.cli.sweep.report import make_report, table
from hivegrpo.cli.sweep.running import Runner
from hivegrpo.cli.sweep.tally import METRICS_FILE as TALLY_FILE
from hivegrpo.cli.sweep.toml import write_run_toml
from hivegrpo.cli.sweep.worker import Work, end_with
from hivegrpo.cli.threads import is_peer
from hivegrpo.cli.training import METRICS_FILE, Training
from hivegrpo.peer.learn import probe as probing
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.probe import COPIES, kl_to_base, probe
from hivegrpo.peer.rewards import registry
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import BusyError, ConfigError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.history import read_history
from hivegrpo.protocol.homes import locked_home

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FLAGS = {"versions": None, "seconds": None, "tokens": None, "seeds": None, "peers": None}
PROMPTS = ("1+1=", "2+2=", "3+3=", "4+4=", "5+5=")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with a few rows in its folder."""
    folder = tmp_path_factory.mktemp("sweep") / "base"
    write_base(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"answer": "", "prompt": text}) + "\n" for text in PROMPTS))
    return folder


def tiny(base: Path, **sections: dict[str, Any]) -> RunConfig:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "versions": 4, "seed": 3},
        "model": {"path": str(base), "trainable": "full"},
        "dataset": {"path": str(base / "rows.jsonl")},
        "rewards": {"functions": ["low_tokens"]},
        "grpo": {"num_generations": 4, "prompts_per_round": 2, "max_completion_length": 6, "max_prompt_length": 16},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
    }
    return RunConfig.model_validate(
        {name: tables.get(name, {}) | sections.get(name, {}) for name in {*tables, *sections}}
    )


def low_tokens(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token < 129 for token in ids) / len(ids) for ids in completion_ids]


def every_other(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(place % 2) for place, _ in enumerate(completion_ids)]


@pytest.fixture(autouse=True)
def _rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (low_tokens, every_other):
        monkeypatch.setitem(registry.BUILT_IN, function.__name__, Reward(function.__name__, 1, function))


def plan_of(config: RunConfig, *grid: str, seeds: int = 1, peers: int = 0, **budget: float) -> Plan:
    amounts = {unit: budget.get(unit) for unit in ("versions", "seconds", "tokens")}
    return Plan.make(config, [Axis.parse(text) for text in grid], seeds, Budget.of(amounts, config), peers)


# What is asked for.


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("grpo.beta=0,0.04,1e-3", (0, 0.04, 1e-3)),
        ("grpo.beta = 0, 0.0, 0.04, 0", (0, 0.04)),
        ("model.dtype=float32,bfloat16", ("float32", "bfloat16")),
        ('lora.target_modules="all-linear",["q_proj","v_proj"]', ("all-linear", ["q_proj", "v_proj"])),
        ("averaging.overlap=true,false", (True, False)),
        ("rewards.options.repetition_penalty.ngram_size=1,2", (1, 2)),
    ],
)
def test_values_are_those_of_toml_and_each_counts_once(text: str, values: tuple[Any, ...]) -> None:
    assert Axis.parse(text).values == values


def test_the_last_axis_varies_fastest() -> None:
    points = span([Axis.parse("grpo.beta=0,1"), Axis.parse("grpo.top_k=1,2")])
    assert [tuple(point.values()) for point in points] == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (["beta=0,1"], 'did you mean "grpo.beta"'),
        (["grpo.bta=0,1"], 'did you mean "beta"'),
        (["gpro.beta=0,1"], 'did you mean "grpo"'),
        (["grpo.beta"], "names no values"),
        (["grpo.beta="], "no values"),
        (["grpo.beta=0,-1"], r"The point grpo.beta=-1: \[grpo\] beta"),
        (["grpo.num_iterations=1,4", "grpo.max_staleness=2"], "The point grpo.num_iterations=4, grpo.max_staleness=2"),
        (["grpo.beta=0", "grpo.beta=1"], "twice"),
        (["dataset.path=gone.jsonl"], "The point dataset.path=.*there is no .*gone.jsonl"),
        (["run.seed=1,2"], "--seeds"),
        (["averaging.codec=mxint8,fp32"], "--peers"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(base: Path, grid: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){says}"):
        plan_of(tiny(base), *grid)


def test_what_needs_one_machine_is_refused_over_peers(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"The point grpo.scale_rewards=batch: .*whole batch"):
        plan_of(tiny(base), "grpo.scale_rewards=group,batch", peers=2)
    with pytest.raises(ConfigError, match="cannot be stopped after 5 seconds"):
        plan_of(tiny(base), "grpo.beta=0,1", peers=2, seconds=5)
    with pytest.raises(ConfigError, match="in versions and in tokens"):
        plan_of(tiny(base), "grpo.beta=0,1", versions=2, tokens=100)


def test_points_have_the_settings_the_seeds_and_the_budget(base: Path) -> None:
    plan = plan_of(tiny(base), "grpo.epsilon=0.1,0.3", seeds=2, versions=7)
    assert [(trial.config.grpo.epsilon, trial.config.run.seed) for trial in plan.trials] == [
        (0.1, 3), (0.3, 3), (0.1, 4), (0.3, 4)
    ]  # fmt: skip
    # What the base leaves out still follows from what is set.
    assert [trial.config.grpo.epsilon_high for trial in plan.trials] == [0.1, 0.3, 0.1, 0.3]
    assert {trial.config.run.versions for trial in plan.trials} == {7}
    assert len({trial.name for trial in plan.trials}) == 4
    assert str(plan).startswith("2 points x 2 seeds x 7 versions = 28 versions in 4 runs")


def test_points_with_the_same_config_are_one(base: Path) -> None:
    """Values that TOML writes differently, and that mean the same."""
    plan = plan_of(tiny(base, grpo={"loss_type": "grpo"}), "lora.alpha=32,32.0,16", "grpo.loss_type=grpo,dapo")
    assert len(plan.points) == 4
    same = plan_of(tiny(base), "rewards.weights=[1],[1.0],[2]")
    assert (len(same.points), same.merged) == (2, 1)
    assert "1 more have the config of another" in str(same)


def test_a_sweep_toml_says_the_same_as_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = addition_config(tmp_path / "task")
    file = tmp_path / "sweep.toml"
    file.write_text(
        'config = "task/run.toml"\nversions = 5\nseeds = 2\n[grid]\n"grpo.beta" = [0, 0.1]\ngrpo.top_k = [0]\n'
    )
    grid = ["grpo.beta=0,0.1", "grpo.top_k=0"]
    plan = read_plan(None, config, grid, {**FLAGS, "versions": 5, "seeds": 2})
    assert read_plan(file, None, [], FLAGS) == plan
    assert read_plan(file, None, ["grpo.beta=0.3"], {**FLAGS, "tokens": 9}).trials[0].config.grpo.beta == 0.3
    file.write_text(file.read_text().replace("seeds", "sedes"))
    with pytest.raises(ConfigError, match='did you mean "seeds"'):
        read_plan(file, None, [], FLAGS)
    with pytest.raises(ConfigError, match="nothing to sweep"):
        read_plan(None, config, [], FLAGS)
    assert read_plan(None, None, grid, FLAGS).name == "addition"
    assert "demo's task" in capsys.readouterr().err


def test_a_config_survives_being_written_as_toml(base: Path, tmp_path: Path) -> None:
    config = tiny(
        base,
        dataset={"path": str(base / "rows.jsonl"), "prompt_template": 'A "quoted"\n\t{prompt} – ü\x7f'},
        rewards={"functions": ["repetition_penalty"], "options": {"repetition_penalty": {"ngram_size": 1}}},
        grpo={"importance_sampling_clip_max": 0, "temperature": 1e-07},
        lora={"target_modules": ["q_proj", "v_proj"]},
    )
    write_run_toml(tmp_path / "run.toml", config)
    assert RunConfig.load(tmp_path / "run.toml") == config


def test_a_folder_is_for_one_sweep_and_one_process(base: Path, tmp_path: Path) -> None:
    folder, plan = tmp_path / "sweep", plan_of(tiny(base), "grpo.beta=0,1")
    with open_sweep(folder, plan):
        assert Task.read(run_folder(folder, plan.trials[1])) == Task(plan.trials[1].config, plan.budget, 0)
        with pytest.raises(BusyError, match="Another process works on the sweep"), open_sweep(folder, plan):
            pass
    with open_sweep(folder, plan):
        pass
    other = plan_of(tiny(base), "grpo.beta=0,2")
    with pytest.raises(ConfigError, match=r"another sweep: axes is .*\[0, 1\].*\[0, 2\]"), open_sweep(folder, other):
        pass
    changed = plan_of(tiny(base, lora={"r": 3}), "grpo.beta=0,1")
    with pytest.raises(ConfigError, match="base config differs"), open_sweep(folder, changed):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    with pytest.raises(ConfigError, match="not empty"), open_sweep(tmp_path / "mine", plan):
        pass
    assert len({plan.folder, other.folder, changed.folder}) == 3


@pytest.mark.parametrize("text", [None, "", "[" * 100_000], ids=["another config", "nothing", "nested"])
def test_a_run_has_the_settings_of_the_plan_or_none(base: Path, tmp_path: Path, text: str | None) -> None:
    plan = plan_of(tiny(base), "grpo.beta=0,1")
    with open_sweep(tmp_path, plan):
        path = run_folder(tmp_path, plan.trials[0]) / "trial.json"
    with open_sweep(tmp_path, plan):
        pass
    content = json.loads(path.read_text())
    content["config"]["rewards"]["functions"] = ["exact_match"]
    path.write_text(json.dumps(content) if text is None else text)
    with pytest.raises(ConfigError, match=r"trial\.json is not what this sweep wrote"), open_sweep(tmp_path, plan):
        pass


def test_a_run_takes_a_share_of_the_cores() -> None:
    assert is_peer([sys.executable, "-m", "hivegrpo.cli.sweep.worker", "/home/ann/sweep/runs/a", "1"])


# What is measured.


@pytest.fixture
def opened() -> Iterator[list[Learner]]:
    learners: list[Learner] = []
    yield learners
    for learner in learners:
        learner.close()


def open_learner(config: RunConfig, base: Path, opened: list[Learner]) -> Learner:
    prompts = Prompts(tuple({"answer": "", "prompt": text} for text in PROMPTS))
    opened.append(Learner.open(config, PeerConfig(threads=1), base, prompts))
    return opened[-1]


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_kl_is_that_of_the_policy_to_the_base(
    base: Path, opened: list[Learner], trainable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate from 2,560 tokens, against the exact divergence at contexts that the policy samples.

    At temperature 1, whatever the run samples with.
    """
    monkeypatch.setattr(probing, "COPIES", 128)
    config = tiny(
        base, model={"trainable": trainable}, lora={"r": 4}, grpo={"max_completion_length": 4, "temperature": 3.0}
    )
    learner = open_learner(config, base, opened)
    start = version_zero(learner.layout, config, base)
    learner.load(0, start)
    ids = [learner.encoder.encode(text) for text in PROMPTS]
    assert kl_to_base(learner, ids) == pytest.approx(0.0, abs=1e-9)
    noise = torch.randn(len(start), generator=torch.Generator().manual_seed(1))
    learner.load(1, start + noise * (0.02 if trainable == "full" else 0.1))
    exact, count = 0.0, 0
    contexts = [torch.tensor([row] * 128) for row in ids]
    torch.manual_seed(0)
    with torch.no_grad():
        for context in contexts:
            for _ in range(4):
                p = learner.policy.model(context).logits[:, -1].double().log_softmax(-1)
                with learner.policy.reference():
                    b = learner.policy.model(context).logits[:, -1].double().log_softmax(-1)
                exact, count = exact + float((p.exp() * (p - b)).sum()), count + len(context)
                context = torch.cat([context, torch.multinomial(p.exp(), 1)], dim=1)
    assert exact / count > 0.01
    assert kl_to_base(learner, ids) == pytest.approx(exact / count, rel=0.15)


def test_the_probe_looks_at_groups_as_they_are_sampled(base: Path, opened: list[Learner]) -> None:
    """Alternating rewards: the unbiased deviation of 4 zeros and 4 ones, whatever num_generations is."""
    figures = []
    for temperature in (0.1, 10.0):
        config = tiny(base, rewards={"functions": ["every_other"]}, grpo={"temperature": temperature})
        learner = open_learner(config, base, opened)
        learner.load(0, version_zero(learner.layout, config, base))
        figures.append(probe(learner))
    for found in figures:
        assert found["reward"] == 0.5
        assert found["reward_std"] == pytest.approx(stdev([0.0, 1.0] * (COPIES // 2)))
        assert found["frac_reward_zero_std"] == 0.0
    assert figures[0]["entropy"] < figures[1]["entropy"]
    # At one temperature, whatever the run's is: nothing has been trained.
    assert [found["kl"] for found in figures] == [pytest.approx(0.0, abs=1e-9)] * 2


def trial_folder(sweep: Path, plan: Plan) -> Path:
    with open_sweep(sweep, plan):
        return run_folder(sweep, plan.trials[0])


def work(folder: Path) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    Work(folder, Task.read(folder), PeerConfig(threads=1)).train(told.append)
    return told


def test_measuring_changes_nothing_of_the_training(base: Path, tmp_path: Path) -> None:
    """Not even where the reference has moved away from the base, to which the measurement sets it."""
    plan = plan_of(tiny(base, grpo={"ref_model_sync_steps": 1, "beta": 0.5}), "grpo.top_k=0")
    folder = trial_folder(tmp_path / "sweep", plan)
    told = work(folder)
    assert [record["version"] for record in told] == [1, 2, 3, 4]
    assert [record["version"] for record in read_history(folder / "measurements.jsonl")] == [0, 1, 2, 3, 4]
    training = Training.open(plan.trials[0].config, PeerConfig(threads=1), tmp_path / "plain")
    while not training.finished:
        [record] = training.advance(threading.Event())
    training.close()
    assert told[-1]["state_root"] == record["state_root"]
    assert Outcome.read(folder).state == "finished"
    assert work(folder) == []


@pytest.mark.parametrize(("budget", "versions"), [({"tokens": 100}, 2), ({"seconds": 1e-9}, 1)])
def test_a_run_ends_once_its_budget_is_spent(
    base: Path, tmp_path: Path, budget: dict[str, float], versions: int
) -> None:
    """8 completions of at most 6 tokens to prompts of 4: at most 80 tokens a version, and more than 40."""
    folder = trial_folder(tmp_path, plan_of(tiny(base), "grpo.beta=0", **budget))
    assert len(work(folder)) == versions
    assert [record["version"] for record in read_history(folder / METRICS_FILE)] == [*range(1, versions + 1), versions]
    assert work(folder) == []


def test_the_names_of_a_run_s_files_are_the_training_s() -> None:
    assert TALLY_FILE == METRICS_FILE


# What is reported.


def write_result(sweep: Path, plan: Plan, number: int, reward: float, kl: float, state: str = "finished") -> None:
    """Two versions; what differs between the runs is the second's reward, and the KL."""
    folder = run_folder(sweep, plan.trials[number])
    lines: list[dict[str, Any]] = [
        {
            "kind": "version",
            "version": version,
            "state_root": f"{version:02}",
            "metrics": {"reward": of, "num_tokens": 100.0, "reward_std": 0.5, "seconds/rollout": 2.0, "entropy": 1.0}
            | ({"eval/accuracy": 0.25} if version == 1 else {}),
        }
        for version, of in ((1, 0.0), (2, reward))
    ]
    lines.append({"kind": "finished", "version": 2, "metrics": {"eval/accuracy": 0.75}})
    write_whole(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
    measured = [(0, {"kl": 0.0, "reward_std": 0.1}), (2, {"kl": kl, "reward_std": 0.3})]
    records = [{"kind": "measured", "version": version, "figures": figures} for version, figures in measured]
    write_whole(folder / "measurements.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    if state != "unfinished":
        Outcome(state, "It diverged." if state == "failed" else None).write(folder)


def test_the_report_has_means_over_seeds_and_over_points(base: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny(base), "grpo.beta=0,1", "grpo.temperature=0.5,1.0", seeds=2, versions=2)
    with open_sweep(tmp_path, plan):
        # By point, in the order of the grid; first with one seed, then with the other.
        for number, (reward, kl) in enumerate([(0.2, 4), (0.4, 6), (0.6, 1), (0.8, 3), (0.4, 6), (0.4, 6), (0.6, 1)]):
            write_result(tmp_path, plan, number, reward, kl)
        write_result(tmp_path, plan, 7, 0.9, 100, state="failed")
    results = [Result.read(tmp_path, trial) for trial in plan.trials]
    report = json.loads(json.dumps(make_report(plan, results)))
    first = report["points"][0]
    assert first["settings"] == {"grpo.beta": 0, "grpo.temperature": 0.5}
    assert first["count"] == 2
    assert first["mean"]["reward"] == pytest.approx(
        (0.1 + 0.2) / 2
    )  # of versions 1 and 2: 0.1; with the other seed 0.2
    assert first["spread"]["reward"] == pytest.approx(stdev([0.1, 0.2]))
    assert first["mean"]["kl"] == 5
    assert first["mean"]["reward_std"] == pytest.approx((0.1 + 0.3) / 2)
    assert (first["mean"]["accuracy_before"], first["mean"]["accuracy_after"]) == (0.25, 0.75)
    assert (first["mean"]["seconds"], first["mean"]["tokens"], first["mean"]["versions"]) == (4.0, 200, 2)
    assert first["runs"][0]["state_root"] == "02"
    assert first["runs"][0]["curves"]["reward"] == [[0, 0.0], [1, 0.2]]
    assert first["runs"][0]["curves"]["measured/kl"] == [[0, 0.0], [2, 4]]
    assert "k3" in report["figures"]["kl"]
    # A point whose second run failed has one; its first counts, and it is told.
    assert (report["points"][3]["count"], report["points"][3]["mean"]["kl"]) == (1, 3)
    assert report["points"][3]["runs"][1]["error"] == "It diverged."
    kl = {key: {row["value"]: row["mean"]["kl"] for row in rows} for key, rows in report["marginals"].items()}
    assert kl == {"grpo.beta": {0: 5.5, 1: 2}, "grpo.temperature": {0.5: 3, 1.0: 4.5}}
    lines = table(plan, results)
    assert lines[1].startswith("grpo.beta=0, grpo.temperature=0.5  0.150 ±0.071  5.0000 ±1.4142")
    assert lines[-1].endswith("grpo.beta=1, grpo.temperature=1.0, seed 4: It diverged.")


def test_an_error_in_the_report_is_one_line_that_a_terminal_shows(base: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny(base), "grpo.beta=0,1")
    with open_sweep(tmp_path, plan):
        write_result(tmp_path, plan, 0, 0.2, 4)
        Outcome("failed", "No\x1b[2J\nbeta=1  1.000").write(run_folder(tmp_path, plan.trials[1]))
    lines = table(plan, [Result.read(tmp_path, trial) for trial in plan.trials])
    assert lines[-1].endswith(": No?[2J beta=1  1.000")


def test_values_are_compared_over_the_same_other_values(base: Path, tmp_path: Path) -> None:
    """A point that is missing takes its counterparts with it, or the others would be compared with less."""
    plan = plan_of(tiny(base), "grpo.beta=0,1", "grpo.temperature=0.5,1.0", versions=2)
    with open_sweep(tmp_path, plan):
        for number, state in enumerate(["finished", "finished", "finished", "unfinished"]):
            write_result(tmp_path, plan, number, 0.5, float(number), state)
    results = [Result.read(tmp_path, trial) for trial in plan.trials]
    marginals = marginal_means(plan, point_means(plan, results))
    assert [(value, mean.count, mean.figures["kl"]) for value, mean in marginals["grpo.beta"]] == [(0, 1, 0), (1, 1, 2)]
    assert table(plan, results)[-1] == "Not finished, at version 2: grpo.beta=1, grpo.temperature=1.0, seed 3."


# The command.

STAND_IN = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
if "nope" in folder.name and not (folder / "mended").exists():
    print(json.dumps({"kind": "failed", "error": "There is no column nope."}), flush=True)
    sys.exit(78)
line = json.dumps({"kind": "version", "version": 1, "versions": 1, "state_root": "ab", "metrics": {"reward": 0.5}})
(folder / "metrics.jsonl").write_text(line + chr(10))
(folder / "outcome.json").write_text(json.dumps({"state": "finished"}))
"""


PATIENT = """
import json, os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print(json.dumps({"kind": "started", "pid": os.getpid()}), flush=True)
signal.sigwait([signal.SIGINT])
print(json.dumps({"kind": "version"}), flush=True)
"""


def stand_in(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the process that trains."""
    monkeypatch.setattr(running, "worker_command", lambda folder, threads: [sys.executable, "-c", code, str(folder)])


def test_a_run_that_fails_is_told_and_the_others_go_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hivegrpo.cli.signals.signal.signal", lambda number, handler: None)
    monkeypatch.setattr("hivegrpo.cli.output.structlog.configure", lambda **settings: None)
    stand_in(STAND_IN, monkeypatch)
    config, sweep = addition_config(tmp_path / "task"), tmp_path / "sweep"

    def start(*, retry_failed: bool) -> tuple[int, list[str], str]:
        """Exit code, first words on stderr of what happened, and the table."""
        code, grid = 0, ["dataset.prompt_column=nope,prompt"]
        try:
            launch(None, config, grid, FLAGS, parallel=1, to=sweep, retry_failed=retry_failed, as_json=False)
        except typer.Exit as ended:
            code = ended.exit_code
        out, err = capsys.readouterr()
        return code, [line.split(":")[0] for line in err.splitlines()[2:-1] if "version" not in line], out

    code, told, out = start(retry_failed=False)
    assert (code, told) == (1, ["Failed, 1 of 2", "Finished 2 of 2"])
    assert "Failed at version 0: dataset.prompt_column=nope, seed 1: There is no column nope." in out
    report = json.loads((sweep / "report.json").read_text())
    assert [point["runs"][0]["state"] for point in report["points"]] == ["failed", "finished"]
    assert report["points"][0]["runs"][0]["error"] == "There is no column nope."
    assert (sweep / "report.png").read_bytes().startswith(b"\x89PNG")
    # It is left alone until it is to be tried again.
    assert start(retry_failed=False) == (1, ["2 of 2 runs have ended before."], out)
    [failed] = sweep.glob("runs/*nope*")
    (failed / "mended").touch()
    code, told, out = start(retry_failed=True)
    assert (code, told) == (0, ["1 of 2 runs have ended before.", "Finished 2 of 2"])
    assert "no column" not in out


def test_a_run_that_is_asked_to_stop_is_not_a_failed_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the one SIGINT that lets it finish its version, and is waited for."""
    folder = trial_folder(tmp_path, plan_of(tiny(base), "grpo.beta=0"))
    stand_in(PATIENT, monkeypatch)

    async def scenario() -> list[dict[str, Any]]:
        stop, told = asyncio.Event(), []

        def take(record: dict[str, Any]) -> None:
            told.append(record)
            stop.set()

        async with asyncio.timeout(60):
            await Runner(1, stop).run(folder, take)
        return told

    started, version = asyncio.run(scenario())
    assert version == {"kind": "version"}
    assert gone([started["pid"]])
    assert Outcome.read(folder).state == "unfinished"


def test_a_run_waits_for_what_a_killed_sweep_has_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trial_folder(tmp_path, plan_of(tiny(base), "grpo.beta=0"))
    stand_in(STAND_IN, monkeypatch)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            with locked_home(folder):
                run = asyncio.create_task(Runner(1, asyncio.Event()).run(folder, lambda record: None))
                await asyncio.sleep(3 * running.POLL_SECONDS)
                assert not (folder / "run.log").exists()
            await run

    asyncio.run(scenario())
    assert Outcome.read(folder).state == "finished"


def test_a_run_whose_sweep_is_gone_gives_its_version_up(base: Path, tmp_path: Path) -> None:
    folder = trial_folder(tmp_path, plan_of(tiny(base), "grpo.beta=0"))
    left, kept = (Work(folder, Task.read(folder), PeerConfig()) for _ in range(2))

    async def scenario() -> None:
        waiting = asyncio.create_task(end_with(os.getppid(), kept))
        async with asyncio.timeout(60):
            await end_with(-1, left)
        waiting.cancel()

    asyncio.run(scenario())
    assert (left.cancelled.is_set(), kept.cancelled.is_set()) == (True, False)


@pytest.mark.slow
def test_kl_falls_with_beta_and_reward_std_rises_with_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's task and starter, four points; `benchmarks/sweep.py` has six, and more versions."""
    monkeypatch.setattr("hivegrpo.cli.sweep.worker.MEASUREMENTS", 1)
    config = RunConfig.load(addition_config(tmp_path, model={"path": str(ADDITION / "starter"), "trainable": "full"}))
    plan = plan_of(config, "grpo.beta=0,2", "grpo.temperature=0.5,1.5", versions=5)
    with open_sweep(tmp_path / "sweep", plan):
        for trial in plan.trials:
            work(run_folder(tmp_path / "sweep", trial))
    results = [Result.read(tmp_path / "sweep", trial) for trial in plan.trials]
    means = marginal_means(plan, point_means(plan, results))
    kl = [mean.figures["kl"] for _, mean in means["grpo.beta"]]
    spread = [mean.figures["reward_std"] for _, mean in means["grpo.temperature"]]
    assert kl[0] > 1.5 * kl[1] > 0
    assert spread[1] > spread[0] + 0.05


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_repeats_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second of two runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("HIVEGRPO_PEER_THREADS", "1")
    from sweep import sweep_twice, versions_of

    config = addition_config(
        tmp_path / "task",
        model={"path": str(base), "trainable": "full"},
        rewards={"functions": ["repetition_penalty"]},
        **{"rewards.options.repetition_penalty": {"ngram_size": 1}},
    )
    arguments = ["--config", str(config), "--versions", "20", "--grid", "grpo.beta=0.0,2.0"]
    halves = sweep_twice(arguments, tmp_path / "sweep", ended=1, versions=2)
    assert halves.repeated() == []
    assert sorted(halves.made.values())[1] == 20
    assert 2 <= sorted(halves.made.values())[0] < 20
    assert len(versions_of(halves.second)) == 40 - sum(halves.made.values())
    report = json.loads((tmp_path / "sweep" / "report.json").read_text())
    assert report == {name: value for name, value in halves.second[-1].items() if name != "kind"}
    assert [run["state"] for point in report["points"] for run in point["runs"]] == ["finished", "finished"]


COORDINATING = """
import json, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print(json.dumps({"kind": "started", "address": "/ip4/127.0.0.1/tcp/1/p2p/x"}), flush=True)
print(json.dumps({"kind": "version", "version": 1, "versions": 4, "state_root": "ab", "metrics": {}}), flush=True)
signal.sigwait([signal.SIGINT])
"""


def test_a_swarm_that_is_stopped_leaves_its_homes_to_go_on_in(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trial_folder(tmp_path, plan_of(tiny(base), "averaging.codec=fp32", peers=2))
    ordinary = swarm.coordinator_command(folder / SWARM)
    assert "--new" not in ordinary  # which would begin another run
    assert ordinary[ordinary.index("--home") + 1] == str(folder / SWARM / "coordinator")
    monkeypatch.setattr(swarm, "coordinator_command", lambda _: [sys.executable, "-c", COORDINATING])
    monkeypatch.setattr(swarm, "peer_command", lambda address, home, threads: [sys.executable, "-c", PATIENT])

    async def scenario() -> list[int]:
        stop, told = asyncio.Event(), []

        def take(record: dict[str, Any]) -> None:
            told.append(record["version"])
            stop.set()

        async with asyncio.timeout(60):
            await Runner(2, stop).run(folder, take)
        return told

    assert asyncio.run(scenario()) == [1]
    assert Outcome.read(folder).state == "unfinished"
    assert RunConfig.load(folder / SWARM / "run.toml") == Task.read(folder).config


@pytest.mark.slow
def test_settings_of_the_exchange_are_swept_over_peers(base: Path, tmp_path: Path) -> None:
    config = addition_config(
        tmp_path / "task",
        model={"path": str(base), "trainable": "full"},
        rewards={"functions": ["repetition_penalty"]},
        **{"rewards.options.repetition_penalty": {"ngram_size": 1}},
    )
    command = ["sweep", "--config", str(config), "--grid", "averaging.codec=mxfp4", "--peers", "2", "--versions", "4"]

    async def scenario() -> list[dict[str, Any]]:
        async with machine(tmp_path) as host:
            process = await host.hivegrpo(*command, "--json")
            assert await process.ended(170) == 0, process.tail()
            return process.records

    *told, report = asyncio.run(scenario())
    versions = [record for record in told if record["kind"] == "version"]
    assert [record["version"] for record in versions] == [1, 2, 3, 4]
    [[run]] = [point["runs"] for point in report["points"]]
    assert [version for version, _ in run["curves"]["reward"]] == [0, 1, 2, 3]
    assert run["state_root"] == versions[-1]["state_root"]
    assert run["figures"]["exchanged_mb"] > 0
    assert run["figures"]["kl"] > 0
