"""The policy on a model's folder, sampling from it, and the learner that joins the parts."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from hivegrpo.peer.learn.base import model_files, resolve_model
from hivegrpo.peer.learn.batches import make_batch
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.digests import model_digests
from hivegrpo.peer.learn.gradient import completion_logps
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.policy import Policy, choose_device, describe_layout
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import Sampling, narrow, sample, sample_within
from hivegrpo.protocol.config import LoraSection, ModelSection, PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError, MismatchError, UnreachableError

END = 256
LORA = LoraSection(r=4, alpha=8)
PROMPTS = [[49, 43, 50, 61], [55, 61], [50, 43, 50, 43, 50, 61]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 over bytes, as transformers saves it."""
    path = tmp_path_factory.mktemp("model")
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=END,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet | {"<end>": END}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(path)
    return path


def load(folder: Path, dtype: str = "float32") -> Policy:
    return Policy.load(folder, dtype=dtype, attn_implementation="sdpa", lora=LORA, device="cpu")


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    policy = load(folder)
    policy.load_vector(0.1 * torch.randn(policy.size, generator=torch.Generator().manual_seed(1)))
    return policy


def draw(policy: Policy, copies: int = 3, seed: int = 0, **changes: Any) -> Any:
    sampling = Sampling(**{"max_completion_length": 8, **changes})
    return sample(policy.model, PROMPTS, copies, sampling, frozenset({END}), torch.Generator().manual_seed(seed))


def test_layout_is_known_without_loading_a_weight(folder: Path, policy: Policy) -> None:
    layout = describe_layout(folder, LORA)
    assert layout == policy.layout
    assert layout[0] == ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (4, 32))
    assert layout[1] == ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", (32, 4))
    assert len(layout) == 2 * 7 * 2
    assert sum(math.prod(shape) for _, shape in layout) == policy.size


def test_layout_has_the_names_of_a_peft_adapter_file(tmp_path: Path, policy: Policy) -> None:
    policy.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == dict(policy.layout)


def test_the_vector_is_all_there_is_to_the_adapter(folder: Path, policy: Policy) -> None:
    other = load(folder)
    assert not torch.equal(other.flatten(), policy.flatten())
    other.load_vector(policy.flatten())
    assert torch.equal(other.flatten(), policy.flatten())
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(other.model(tokens).logits, policy.model(tokens).logits)


def test_the_reference_is_the_base(folder: Path, policy: Policy) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        with policy.reference():
            assert torch.equal(policy.model(tokens).logits, base(tokens).logits)
        assert not torch.allclose(policy.model(tokens).logits, base(tokens).logits)


def test_a_bfloat16_base_has_a_float32_adapter(folder: Path) -> None:
    policy = load(folder, "bfloat16")
    assert {value.dtype for value in policy.model.parameters() if not value.requires_grad} == {torch.bfloat16}
    assert {value.dtype for value in policy.parameters} == {torch.float32}


def test_a_vector_of_another_length_is_a_mismatch(policy: Policy) -> None:
    with pytest.raises(MismatchError, match=str(policy.size)):
        policy.load_vector(torch.zeros(policy.size + 1))


def test_target_modules_that_do_not_exist_are_a_mistake(folder: Path) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        describe_layout(folder, LoraSection(target_modules=("no_such_module",)))


def test_a_folder_without_a_model_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model in"):
        resolve_model(ModelSection(path=tmp_path))


def test_a_model_with_code_of_its_own_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    for attempt in (lambda: resolve_model(ModelSection(path=tmp_path)), lambda: load(tmp_path)):
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


def test_sampling_is_seeded(policy: Policy) -> None:
    tokens = [completion.token_ids for completion in draw(policy)]
    assert tokens == [completion.token_ids for completion in draw(policy)]
    assert tokens != [completion.token_ids for completion in draw(policy, seed=1)]
    assert len({tuple(ids) for ids in tokens}) > 1


def test_completions_stop_at_the_end_token_or_at_the_limit(policy: Policy) -> None:
    completions = sample(
        policy.model,
        PROMPTS,
        40,
        Sampling(max_completion_length=6),
        frozenset(range(0, 257, 4)),  # about every fourth token ends
        torch.Generator().manual_seed(0),
    )
    for completion in completions:
        ends = [token % 4 == 0 for token in completion.token_ids]
        assert not any(ends[:-1])
        assert completion.terminated == ends[-1]
        assert completion.terminated or len(ends) == 6
        assert completion.logps.shape == (len(ends),)
    assert {len(completion.token_ids) for completion in completions} == {1, 2, 3, 4, 5, 6}
    assert {completion.terminated for completion in completions} == {True, False}


def test_behaviour_logps_are_those_of_the_loss(policy: Policy) -> None:
    """Whatever the padding, the cache, the rows that have ended, and top_k."""
    completions = sample(
        policy.model,
        PROMPTS,
        20,
        Sampling(max_completion_length=6, temperature=0.7, top_k=50),
        frozenset(range(0, 257, 4)),
        torch.Generator().manual_seed(0),
    )
    prompt_ids = [ids for ids in PROMPTS for _ in range(20)]
    rollout = Rollout(prompt_ids, completions, [], torch.zeros(60), torch.zeros(60), {})
    batch = make_batch(rollout, range(60), policy.device)
    with torch.no_grad():
        logps, _ = completion_logps(policy, batch, 0.7)
    difference = (logps - batch.behaviour_logps)[batch.completion_mask]
    assert difference.abs().max() < 1e-5


def test_samples_have_the_frequencies_of_the_softmax(policy: Policy) -> None:
    """20,000 first tokens at temperature 0.5: each frequency within 5 standard errors of its probability."""
    count = 20_000
    completions = sample(
        policy.model,
        PROMPTS[:1],
        count,
        Sampling(max_completion_length=1, temperature=0.5),
        frozenset(),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        logits = policy.model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    expected = (logits / 0.5).softmax(-1)
    found = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=257) / count
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1 / count).all()


def test_greedy_equals_generate(folder: Path, policy: Policy) -> None:
    for prompt, completion in zip(PROMPTS, draw(policy, copies=1, temperature=0.0), strict=True):
        expected = policy.model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_batches_within_a_budget_hold_all_prompts_in_order(policy: Policy) -> None:
    sampling = Sampling(max_completion_length=4, temperature=0.0)
    arguments = (policy.model, PROMPTS, 2, sampling, frozenset({END}), torch.Generator())
    small, large = sample_within(1, *arguments), sample_within(10_000, *arguments)
    assert [completion.token_ids for completion in small] == [completion.token_ids for completion in large]


@pytest.mark.parametrize(
    ("top_p", "top_k", "expected"),
    [
        (1.0, 0, [0.0625, 0.5, 0.25, 0.1875]),
        (1.0, 2, [0.0, 0.5, 0.25, 0.0]),
        (0.75, 0, [0.0, 0.5, 0.25, 0.0]),
        (0.76, 0, [0.0, 0.5, 0.25, 0.1875]),
        (0.5, 2, [0.0, 0.5, 0.0, 0.0]),  # more than half of the 0.75 that top_k left
        (1e-9, 0, [0.0, 0.5, 0.0, 0.0]),
    ],
)
def test_narrow(top_p: float, top_k: int, expected: list[float]) -> None:
    probabilities = torch.tensor([[0.0625, 0.5, 0.25, 0.1875]], dtype=torch.float64)
    assert narrow(probabilities, top_p, top_k).tolist() == [expected]


def run_config(**grpo: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "test", "versions": 1, "seed": 5},
            "model": {"path": "model"},
            "dataset": {"path": "rows.jsonl"},
            "evaluation": {"path": "rows.jsonl", "limit": 3},
            "rewards": {"functions": ["starts_with"]},
            "lora": {"r": 4, "alpha": 8},
            "grpo": {"num_generations": 4, "max_prompt_length": 6, "max_completion_length": 5, **grpo},
        }
    )


def starts_with(*, completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """Something that a random policy gets right now and then."""
    return [float(text[:1] < gold) for text, gold in zip(completions, answer, strict=True)]


ROWS = Prompts(tuple({"answer": "a", "prompt": "1" * length} for length in (1, 2, 9, 3, 4, 5)))


@pytest.fixture
def learner(folder: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Learner:
    from hivegrpo.peer.rewards import registry

    monkeypatch.setitem(registry.BUILT_IN, "starts_with", registry.Reward("starts_with", 1, starts_with))
    learner = Learner.open(run_config(), PeerConfig(), folder, ROWS, ROWS)
    learner.load(policy.flatten())
    return learner


def test_a_lease_becomes_a_contribution(learner: Learner) -> None:
    result = learner.contribute(1, 0, 6, threading.Event())
    assert len(result.used) == 5
    assert len(result.dropped) == 1  # the prompt of 9 tokens
    assert sorted((*result.used, *result.dropped, *result.returned)) == [0, 1, 2, 3, 4, 5]
    assert result.vector.shape == (learner.policy.size,)
    assert result.vector.dtype == torch.float32
    assert result.vector.norm() > 0
    assert result.weight + 4 * (1 + 2 + 3 + 4 + 5) == result.num_tokens
    assert all(map(math.isfinite, result.metrics.values()))
    assert {"loss", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length"} <= result.metrics.keys()
    assert result.metrics["completions/mean_length"] == result.weight / 20
    assert result.seconds.keys() == {"rollout", "gradient"}


def test_the_same_lease_becomes_the_same_contribution(learner: Learner) -> None:
    one, again, other = (learner.contribute(lease, 0, 3, threading.Event()) for lease in (1, 1, 2))
    assert torch.equal(one.vector, again.vector)
    assert not torch.equal(one.vector, other.vector)


def test_on_policy_nothing_is_clipped(learner: Learner) -> None:
    metrics = learner.contribute(1, 0, 6, threading.Event()).metrics
    assert metrics["clip_ratio/region_mean"] == 0


def test_a_step_against_the_gradient_raises_the_reward(learner: Learner) -> None:
    """One token each, 3,200 of them: the standard error of a mean reward is 0.009, and the step is worth 0.07."""
    learner = Learner(
        run_config(max_completion_length=1, num_generations=64),
        *(learner.peer, learner.policy, learner.encoder, learner.prompts, None),
    )
    start = learner.policy.flatten()
    before = learner.contribute(1, 0, 60, threading.Event())
    learner.load(start - 0.3 * before.vector / before.vector.norm())
    after = learner.contribute(1, 0, 60, threading.Event())
    assert after.metrics["reward"] > before.metrics["reward"] + 0.05


def test_a_lease_with_only_long_prompts_weighs_nothing(learner: Learner) -> None:
    long = Learner(
        learner.config, learner.peer, learner.policy, learner.encoder, Prompts((ROWS.rows[2],) * 2), held_out=None
    )
    result = long.contribute(1, 0, 2, threading.Event())
    assert (result.weight, result.used, result.dropped) == (0, (), (0, 1))
    assert not result.vector.any()


def test_work_is_given_up_on_request(learner: Learner) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        learner.contribute(1, 0, 2, cancelled)
    with pytest.raises(Cancelled):
        learner.evaluate(cancelled)


def test_evaluation_counts_the_limit_s_rows(learner: Learner) -> None:
    result = learner.evaluate(threading.Event())
    assert result.problems == 3
    assert result == learner.evaluate(threading.Event())
    assert result.accuracy == result.solved / 3


def test_a_prompt_without_tokens_is_dropped_and_never_solved(learner: Learner) -> None:
    rows = Prompts(({"answer": "\U0010ffff", "prompt": ""}, {"answer": "\U0010ffff", "prompt": "1"}))
    other = Learner(learner.config, learner.peer, learner.policy, learner.encoder, rows, rows)
    assert other.contribute(1, 0, 2, threading.Event()).metrics["reward"] == 1
    result = other.evaluate(threading.Event())
    assert (result.solved, result.problems) == (1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_a_mistake() -> None:
    assert choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="no GPU"):
        choose_device("cuda")


def test_importing_the_learner_imports_neither_peft_nor_datasets() -> None:
    code = "import sys, hivegrpo.peer.learn.learner; print(*{'peft', 'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
