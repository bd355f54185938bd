"""The policy on a model's folder: what is trained, in which order, and in which precision the rest is held."""

import importlib.util
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import LORA, load_policy, save_model, spread
from torch import Tensor
from transformers import AutoModelForCausalLM

from hivegrpo.peer.learn.base import model_files, resolve_model
from hivegrpo.peer.learn.digests import model_digests
from hivegrpo.peer.learn.genesis import base_parameters
from hivegrpo.peer.learn.gradient import rollout_gradient
from hivegrpo.peer.learn.policy import Policy, choose_device, describe_layout
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import Completion
from hivegrpo.protocol.config import GrpoSection, LoraSection, ModelSection
from hivegrpo.protocol.errors import ConfigError, MismatchError, UnreachableError

TOKENS = torch.tensor([[49, 43, 50, 61]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return spread(load_policy(folder))


def layout_of(folder: Path, lora: LoraSection = LORA, **model: Any) -> list[tuple[str, tuple[int, ...]]]:
    return describe_layout(folder, ModelSection(path=folder, **model), lora)


def logits_of(policy: Policy) -> Tensor:
    with torch.no_grad():
        logits: Tensor = policy.model(TOKENS).logits
    return logits


def test_layout_is_known_without_loading_a_weight(folder: Path, policy: Policy) -> None:
    layout = layout_of(folder)
    assert layout == policy.layout
    assert layout[0] == ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (4, 32))
    assert layout[1] == ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", (32, 4))
    assert len(layout) == 2 * 7 * 2
    assert sum(math.prod(shape) for _, shape in layout) == policy.size


def test_layout_has_the_names_of_a_peft_adapter_file(tmp_path: Path, policy: Policy) -> None:
    assert policy.adapted is not None
    policy.adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == dict(policy.layout)


def test_the_vector_is_all_there_is_to_the_adapter(folder: Path, policy: Policy) -> None:
    other = load_policy(folder)
    assert not torch.equal(other.flatten(), policy.flatten())
    other.load_vector(policy.flatten())
    assert torch.equal(other.flatten(), policy.flatten())
    assert torch.equal(logits_of(other), logits_of(policy))


@pytest.mark.parametrize("tied", [False, True])
def test_without_an_adapter_the_vector_is_all_parameters_in_the_model_s_order(tmp_path: Path, tied: bool) -> None:
    save_model(tmp_path, tied=tied)
    policy = load_policy(tmp_path, trainable="full")
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert policy.layout == [(name, tuple(value.shape)) for name, value in base.named_parameters()]
    assert policy.layout == layout_of(tmp_path, trainable="full")
    assert ("lm_head.weight" in dict(policy.layout)) == (not tied)
    assert torch.equal(policy.flatten(), torch.cat([value.flatten() for value in base.parameters()]))
    assert torch.equal(policy.flatten(), base_parameters(policy.layout, tmp_path))

    vector = policy.flatten() + 0.1
    policy.load_vector(vector)
    assert torch.equal(policy.flatten(), vector)
    with torch.no_grad():
        for value in base.parameters():
            value += 0.1
        assert torch.equal(logits_of(policy), base(TOKENS).logits)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_reference_is_the_base(folder: Path, trainable: str) -> None:
    policy = load_policy(folder, trainable=trainable)
    policy.load_vector(policy.flatten() + 0.1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = logits_of(policy)
    with torch.no_grad(), policy.reference():
        assert torch.equal(policy.model(TOKENS).logits, base(TOKENS).logits)
    assert torch.equal(logits_of(policy), before)
    assert not torch.allclose(before, base(TOKENS).logits)


def test_there_is_no_dropout_in_any_mode(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    policy = load_policy(tmp_path, trainable="full", attn_implementation="eager")
    before = logits_of(policy)
    policy.model.train()
    assert torch.equal(logits_of(policy), before)


def test_a_bfloat16_base_has_a_float32_adapter(folder: Path, policy: Policy) -> None:
    half = load_policy(folder, dtype="bfloat16")
    assert {value.dtype for value in half.model.parameters() if not value.requires_grad} == {torch.bfloat16}
    assert {value.dtype for value in half.parameters} == {torch.float32}
    half.load_vector(policy.flatten())
    assert half.head is not None
    assert cosine(gradient_of(half), gradient_of(policy)) > 0.999  # 8 bits of mantissa


def gradient_of(policy: Policy) -> Tensor:
    """Of eight sequences that no policy has sampled."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(256, (8, 6), generator=generator).tolist()
    completions = [Completion(row, torch.full((6,), -5.0), torch.zeros(6), terminated=True) for row in ids]
    advantages = torch.randn(8, 1, generator=generator)
    rollout = Rollout(0, [TOKENS[0].tolist()] * 8, completions, advantages, [True] * 8)
    return rollout_gradient(policy, rollout, GrpoSection(loss_type="cispo", beta=0.1), 40).vector


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def test_a_base_in_4_bits_stays_as_it_is_under_a_float32_adapter(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    save_model(tmp_path, width=64)
    plain, quantized = spread(load_policy(tmp_path)), spread(load_policy(tmp_path, quantize="nf4"))
    assert quantized.layout == plain.layout == layout_of(tmp_path, quantize="nf4")
    assert {value.dtype for value in quantized.parameters} == {torch.float32}
    frozen = {name: value for name, value in quantized.model.named_parameters() if not value.requires_grad}
    packed = {name: value.clone() for name, value in frozen.items() if value.dtype == torch.uint8}
    assert len(packed) == 2 * 7  # the linear layers, two values in a byte
    gradient = gradient_of(quantized)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert all(torch.equal(frozen[name], value) for name, value in packed.items())
    # 16 levels for each weight: what is left of the direction after two layers whose weights are off by a tenth.
    assert 0.7 < cosine(gradient, gradient_of(plain)) < 0.99
    with torch.no_grad():
        for name, value in plain.model.named_parameters():
            if name in packed:
                value.copy_(dequantize_4bit(frozen[name].data, frozen[name].quant_state))
    torch.testing.assert_close(gradient, gradient_of(plain))


def test_4_bits_without_bitsandbytes_are_a_mistake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest),
    )
    with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
        load_policy(folder, quantize="nf4")


def test_a_vector_of_another_length_is_a_mismatch(policy: Policy) -> None:
    with pytest.raises(MismatchError, match=str(policy.size)):
        policy.load_vector(torch.zeros(policy.size + 1))


def test_target_modules_that_do_not_exist_are_a_mistake(folder: Path) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        layout_of(folder, LoraSection(target_modules=("no_such_module",)))


def test_a_folder_without_a_model_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model in"):
        resolve_model(ModelSection(path=tmp_path))


def test_a_model_with_code_of_its_own_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    for attempt in (lambda: resolve_model(ModelSection(path=tmp_path)), lambda: load_policy(tmp_path)):
        with pytest.raises(ConfigError, match="of type mine"):
            attempt()


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnreachableError, match="org/model at abc"):
        resolve_model(ModelSection(name="org/model", revision="abc"))


def test_digests_change_with_their_part_only(folder: Path, tmp_path: Path) -> None:
    for path in model_files(folder):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = model_digests(tmp_path)
    assert before == model_digests(folder)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "README.md").write_text("no part of the model")
    after = model_digests(tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["base", "chat_template"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_a_mistake() -> None:
    assert choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="no GPU"):
        choose_device("cuda")


def test_models_can_be_loaded_in_several_threads(tmp_path: Path) -> None:
    save_model(tmp_path, tied=True)
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: load_policy(tmp_path, trainable="full"), range(24)))
    loaded.append(load_policy(tmp_path, trainable="full"))
    assert {name for policy in loaded for name, _ in policy.layout} == {name for name, _ in loaded[0].layout}
    assert all("lm_head.weight" not in dict(policy.layout) for policy in loaded)
