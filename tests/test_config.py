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
        (MINIMAL + '[admission]\npeers = ["12D3KooW"]', r'\[admission\]: mode "allow_list" needs peers'),
        (MINIMAL + "[distribution]\nkeep_versions = 5", r"reach back to an anchor"),
        (MINIMAL.replace("versions = 3", ""), r"\[run\] versions: Field required"),
        (MINIMAL.replace('path = "starter"', 'name = "org/model"'), r"\[model\]: a hub name needs a revision"),
        (MINIMAL.replace('path = "starter"', ""), r"\[model\]: give exactly one of path and name"),
        (MINIMAL.replace("train.jsonl", "train.csv"), r"train\.csv must be a \.jsonl or \.parquet file"),
        (MINIMAL.replace('"exact_match"]', '"a", "a"]'), r"\[rewards\]: a reward function is named twice"),
        (MINIMAL.replace('match"]', 'match"]\nweights = [1, 2]'), r"\[rewards\]: 2 weights for 1 functions"),
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
