"""run.toml and the daemons' settings: what is read, what is refused, and how that is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from hivegrpo.protocol.config import CoordinatorConfig, DaemonConfig, PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError, MismatchError

MINIMAL = """
[run]
name = "test"
versions = 3

[model]
path = "starter"

[dataset]
path = "train.jsonl"

[rewards]
functions = ["exact_match"]
"""

FULL = r'\[model\]: trainable = "full" needs dtype = "float32" and no quantize'


def generated(settings: str) -> str:
    """A run on rows of reasoning-gym."""
    return MINIMAL.replace('path = "train.jsonl"', f'name = "reasoning_gym:chain_sum"\n{settings}')


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivegrpo.protocol.config.user_config_path", lambda name: tmp_path / name)
    for name in ("HIVEGRPO_PEER_PORT", "HIVEGRPO_PEER_DEVICE", "HIVEGRPO_PEER_HOME"):
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A model, and those of its sections."""
    found = [model]
    for field in model.model_fields.values():
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        found += [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return found


@pytest.mark.parametrize("root", [RunConfig, PeerConfig, CoordinatorConfig])
def test_every_field_is_described(root: type[BaseModel]) -> None:
    for model in models(root):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_a_minimal_run_has_trl_s_defaults_and_paths_beside_the_file(tmp_path: Path) -> None:
    config = RunConfig.load(write(tmp_path, MINIMAL))
    assert config.model.path == tmp_path / "starter"
    assert config.dataset.path == tmp_path / "train.jsonl"
    assert (config.grpo.num_generations, config.grpo.beta, config.grpo.epsilon) == (8, 0.0, 0.2)
    assert (config.grpo.loss_type, config.grpo.scale_rewards) == ("dapo", "group")
    assert config.evaluation is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "[grpo]\nnum_generation = 4",
            r'\[grpo\] has no key "num_generation" \(did you mean "num_generations"',
        ),
        (MINIMAL + "[gropo]\nbeta = 0.1", r'there is no section "gropo" \(did you mean "grpo"'),
        (MINIMAL + '[lora]\nzzz = "x"', r'\[lora\] has no key "zzz" \(known are r, alpha, target_modules'),
        (
            MINIMAL + "[evaluation]\npath='t.jsonl'\nevry = 3",
            r'\[evaluation\] has no key "evry" \(did you mean "every"',
        ),
        (MINIMAL + "[grpo]\nnum_generations = 1", r"\[grpo\] num_generations: .*greater than or equal to 2"),
        (MINIMAL + "[grpo]\nbeta = nan", r"\[grpo\] beta: .*finite"),
        (MINIMAL + '[grpo]\nepsilon = "a"', r"\[grpo\] epsilon: .*number"),
        (MINIMAL + "[optimizer]\nwarmup_steps = 3", r"warmup_steps must be below \[run\] versions"),
        (MINIMAL + '[admission]\nmode = "open"\npeers = ["12D3KooW"]', r'\[admission\]: mode "open" takes no peers'),
        (MINIMAL + '[admission]\nmode = "allow_list"', r'\[admission\]: mode "allow_list" needs peers'),
        (MINIMAL + "[distribution]\nkeep_versions = 5", r"reach back to an anchor"),
        (MINIMAL.replace("versions = 3", ""), r"\[run\] versions: Field required"),
        (MINIMAL.replace("versions = 3", 'versions = 3\nkey = "12D3"'), r"\[run\] key: .*a peer id has 52 characters"),
        (MINIMAL.replace('path = "starter"', 'name = "org/model"'), r"\[model\]: a hub name needs a revision"),
        (MINIMAL.replace('path = "starter"', ""), r"\[model\]: give exactly one of path and name"),
        (MINIMAL.replace("train.jsonl", "train.txt"), r"train\.txt must be a \.jsonl, \.parquet or \.csv file"),
        (
            MINIMAL.replace('train.jsonl"', 'train.jsonl"\nsplit = "test"'),
            r"\[dataset\]: config, split and revision belong",
        ),
        (
            MINIMAL.replace('train.jsonl"', 'train.jsonl"\nname = "org/set"'),
            r"\[dataset\]: give exactly one of path and",
        ),
        (
            MINIMAL.replace('train.jsonl"', 'train.jsonl"\nsize = 5'),
            r"\[dataset\]: size and seed belong to a reasoning_gym",
        ),
        (
            MINIMAL + "[evaluation]\nname = 'org/set'\nseed = 5",
            r"\[evaluation\]: size and seed belong to a reasoning_gym",
        ),
        (generated("seed = 1"), r"\[dataset\]: reasoning_gym:chain_sum needs size and seed"),
        (generated("size = 1"), r"\[dataset\]: reasoning_gym:chain_sum needs size and seed"),
        (generated('size = 1\nseed = 0\nsplit = "test"'), r"chain_sum .* takes no config, split or revision"),
        (generated("size = 0\nseed = 0"), r"\[dataset\] size: .*greater than or equal to 1"),
        (generated("size = 65537\nseed = 0"), r"\[dataset\] size: .*less than or equal to 65536"),
        (generated("size = 1\nseed = -1"), r"\[dataset\] seed: .*greater than or equal to 0"),
        (generated("size = 1\nseed = 2147483648"), r"\[dataset\] seed: .*less than 2147483648"),
        (MINIMAL.replace('train.jsonl"', 'train.jsonl"\ncolumns = "x"'), r"\[dataset\] columns: .*tuple"),
        (MINIMAL.replace('starter"', 'starter"\ndtype = "bfloat16"\ntrainable = "full"'), FULL),
        (MINIMAL.replace('starter"', 'starter"\nquantize = "nf4"\ntrainable = "full"'), FULL),
        (MINIMAL.replace('starter"', 'starter"\nquantize = "int3"'), r"\[model\] quantize: .*'nf4'"),
        (MINIMAL.replace('"exact_match"]', '"a", "a"]'), r"\[rewards\]: a reward function is named twice"),
        (MINIMAL.replace('match"]', 'match"]\nweights = [1, 2]'), r"\[rewards\]: 2 weights for 1 functions"),
        (MINIMAL + "[rewards.options.other]\nx = 1", r"\[rewards\]: options for other, which functions does not name"),
        (MINIMAL + "[rewards.options.exact_match]\nx = [1]", r"\[rewards\] options\.exact_match\.x"),
        (MINIMAL + "[grpo]\nbeta = 0.1\nref_model_sync_steps = 0", r"\[grpo\] ref_model_sync_steps: .*equal to 1"),
        (
            MINIMAL + "[grpo]\nref_model_sync_steps = 5",
            r"\[grpo\]: ref_model_sync_steps .* with beta = 0 there is none",
        ),
        (MINIMAL + "[grpo]\ndelta = 1.1", r"\[grpo\]: delta must be above 1 [+] epsilon_high"),
        (MINIMAL + "[grpo]\nepsilon_high = 0.5\ndelta = 1.5", r"\[grpo\]: delta must be above 1 [+] epsilon_high"),
        (MINIMAL + '[grpo]\nloss_type = "cispo"\ndelta = 9.0', r"\[grpo\]: delta .* is not for cispo"),
        (MINIMAL + "[grpo]\nnum_iterations = 3\nmax_staleness = 1", r"\[grpo\]: max_staleness must be at least"),
        (
            MINIMAL + "[grpo]\nimportance_sampling_clip_min = 2.0\nimportance_sampling_clip_max = 1.5",
            r"\[grpo\]: importance_sampling_clip_min is above importance_sampling_clip_max",
        ),
        (MINIMAL + "[grpo]\ndynamic_sampling_factor = 0.5", r"\[grpo\] dynamic_sampling_factor: .*equal to 1"),
        (MINIMAL + "[grpo]\ntop_entropy_quantile = 1.5", r"\[grpo\] top_entropy_quantile: .*equal to 1"),
        (MINIMAL + '[grpo]\nloss_type = "ppo"', r"\[grpo\] loss_type: .*'bnpo', 'dr_grpo' or 'cispo'"),
        (MINIMAL + '[grpo]\nscale_rewards = "both"', r"\[grpo\] scale_rewards: .*'group', 'batch' or 'none'"),
        (MINIMAL.replace('train.jsonl"', 'train.jsonl"\nprompt_template = "Q:"'), r"\{prompt\}.*exactly once"),
        (MINIMAL + "[grpo\n", r"not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.load(write(tmp_path, text))
    assert "run.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("", {"epsilon_high": 0.2, "max_staleness": 1, "delta": None, "importance_sampling_clip_max": 3.0}),
        ("epsilon = 0.3", {"epsilon_high": 0.3}),
        ('loss_type = "cispo"', {"epsilon_high": 5.0}),
        ('loss_type = "cispo"\nepsilon_high = 2.0', {"epsilon_high": 2.0}),
        ("num_iterations = 2", {"max_staleness": 1}),
        ("num_iterations = 4", {"max_staleness": 3}),
        ("num_iterations = 4\nmax_staleness = 5", {"max_staleness": 5}),
        ("epsilon_high = 0.28\ndelta = 1.5", {"delta": 1.5}),
        ("importance_sampling_clip_max = 0", {"importance_sampling_clip_max": None}),
    ],
)
def test_defaults_follow_from_other_settings(tmp_path: Path, settings: str, expected: dict[str, Any]) -> None:
    grpo = RunConfig.load(write(tmp_path, f"{MINIMAL}[grpo]\n{settings}")).grpo
    assert grpo.model_dump(include=set(expected)) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [('scale_rewards = "batch"', 'scale_rewards = "batch"'), ("top_entropy_quantile = 0.2", "top_entropy_quantile")],
)
def test_settings_that_look_at_a_batch_are_for_one_machine(tmp_path: Path, settings: str, named: str) -> None:
    RunConfig.load(write(tmp_path, MINIMAL + '[grpo]\nscale_rewards = "none"')).require_swarm()
    config = RunConfig.load(write(tmp_path, f"{MINIMAL}[grpo]\n{settings}"))
    with pytest.raises(ConfigError, match=f"{named} looks at the whole batch") as caught:
        config.require_swarm()
    assert "Leave it out" in caught.value.hint


def test_a_generator_is_told_from_the_hub(tmp_path: Path) -> None:
    config = RunConfig.load(write(tmp_path, generated("size = 10\nseed = 0")))
    assert config.dataset.task == "chain_sum"
    hub = MINIMAL.replace('path = "train.jsonl"', 'name = "org/set"')
    assert RunConfig.load(write(tmp_path, hub)).dataset.task is None
    assert RunConfig.load(write(tmp_path, MINIMAL)).dataset.task is None


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml cannot be read"):
        RunConfig.load(tmp_path / "no.toml")


def test_equal_configs_have_equal_canonical_json(tmp_path: Path) -> None:
    one = RunConfig.load(write(tmp_path, MINIMAL + "[grpo]\nbeta = 0.0\nepsilon = 0.2"))
    other = RunConfig.load(write(tmp_path, MINIMAL))
    text = one.canonical_json()
    assert text == other.canonical_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert RunConfig.from_json(text) == one
    assert RunConfig.load(write(tmp_path, MINIMAL + "[grpo]\nbeta = 0.1")).canonical_json() != text


def test_what_is_published_tells_no_folder_of_this_machine(tmp_path: Path) -> None:
    config = RunConfig.load(write(tmp_path, MINIMAL + '[evaluation]\npath = "test.jsonl"'))
    text = config.published().canonical_json()
    assert str(tmp_path) in config.canonical_json()
    assert str(tmp_path) not in text
    assert RunConfig.from_json(text).dataset.path == Path("train.jsonl")


def test_a_run_of_another_version_is_a_mismatch(tmp_path: Path) -> None:
    values = json.loads(RunConfig.load(write(tmp_path, MINIMAL)).canonical_json())
    values["grpo"]["new_option"] = 1
    with pytest.raises(MismatchError, match="new_option"):
        RunConfig.from_json(json.dumps(values))


def test_flag_beats_environment_beats_toml_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def port(**flags: Any) -> int:
        return PeerConfig.load(**flags).port

    assert port() == 0
    (tmp_path / "hivegrpo").mkdir()
    (tmp_path / "hivegrpo" / "peer.toml").write_text("port = 1001\nthreads = 2\n")
    assert port() == 1001
    monkeypatch.setenv("HIVEGRPO_PEER_PORT", "1002")
    assert port() == 1002
    assert port(port=1003) == 1003
    assert port(port=None) == 1002
    assert PeerConfig.load(port=1003).threads == 2


@pytest.mark.parametrize("role", [PeerConfig, CoordinatorConfig])
def test_the_state_folder_s_variable_is_not_a_daemon_s_home(
    role: type[DaemonConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVEGRPO_HOME", "/somewhere")
    assert role.load().home is None


@pytest.mark.parametrize(
    ("toml", "flags", "message"),
    [
        ("prt = 1", {}, r'no key "prt" \(did you mean "port"'),
        ("port = ", {}, r"peer\.toml is not valid TOML"),
        ("", {"port": 70_000}, r"port: .*less than or equal to 65535"),
        ("", {"device": "tpu"}, r"device: .*'auto', 'cpu' or 'cuda'"),
    ],
)
def test_a_daemon_s_mistakes(tmp_path: Path, toml: str, flags: dict[str, Any], message: str) -> None:
    (tmp_path / "hivegrpo").mkdir()
    (tmp_path / "hivegrpo" / "peer.toml").write_text(toml)
    with pytest.raises(ConfigError, match=message):
        PeerConfig.load(**flags)
