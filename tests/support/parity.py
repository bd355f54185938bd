"""Configurations of TRL and ours side by side: the cases, and the scenes in which both compute the same thing."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from hivegrpo.peer.learn.batches import make_batch
from hivegrpo.peer.learn.gradient import completion_logps, rollout_gradient
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Group, compare, make_rollout
from hivegrpo.peer.learn.sampler import Completion
from hivegrpo.protocol.config import GrpoSection, LoraSection
from support.trl_oracle import END, FUNCTIONS, PAD, VOCABULARY, Answer, Oracle

GENERATIONS = 4
LONGEST = 10
"""No completion is longer, tokens."""
WEIGHTS = (1.0, 0.5, -2.0)
"""Of the reward functions."""
BUDGET = 60
"""Tokens of our micro-batches: several of them."""
LORA = LoraSection(r=4, alpha=8)

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A configuration, and what is done with it."""

    settings: Settings = field(default_factory=dict)
    lora: bool = False
    groups: int = 3
    accumulation: int = 1
    """TRL's micro-batches of a step."""
    contributions: int = 1
    """Ours, averaged by weight."""
    steps: bool = False
    """Process supervision: TRL is given our advantages of tokens."""
    unscored: bool = False
    """Some scores are None, all three of one completion. It has no advantage, and no part in our metrics."""

    @property
    def same_metrics(self) -> bool:
        """Whether ours are TRL's: of one batch, and not where TRL counts sequences that we need not differentiate."""
        grpo = self.grpo()
        of_sequences = grpo.importance_sampling_correction and grpo.importance_sampling_mode.startswith("sequence")
        skipped = self.unscored or (grpo.mask_truncated_completions and of_sequences)
        return self.accumulation == 1 and not skipped

    def grpo(self, **changes: Any) -> GrpoSection:
        shape = {"num_generations": GENERATIONS, "max_completion_length": LONGEST + 2, "temperature": 0.9}
        return GrpoSection.model_validate({**shape, **self.settings, **changes})


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
AGAIN = {"num_iterations": 2}
"""The second update of a rollout: ratios are not 1."""
CORRECTED = {"importance_sampling_correction": True, "importance_sampling_clip_max": 1.2}
KL = {"beta": 0.3}


def cases() -> dict[str, Case]:
    """By what is special about them."""
    found: dict[str, Case] = {}

    def add(name: str, settings: Settings, **rest: Any) -> None:
        assert name not in found
        found[name] = Case(settings, **rest)

    for loss_type in LOSS_TYPES:
        # As loose as 0.2 next to ratios of tokens, the clip would never touch their geometric mean over a sequence.
        cispo = loss_type == "cispo"
        token = {"loss_type": loss_type, "epsilon_high": 1.1 if cispo else 0.28}
        sequence = {
            "loss_type": loss_type,
            "importance_sampling_level": "sequence",
            "epsilon": 0.03,
            "epsilon_high": 1.01 if cispo else 0.04,
        }
        add(f"{loss_type}-first-update", token)
        add(f"{loss_type}-token", token | AGAIN)
        add(f"{loss_type}-sequence", sequence | AGAIN)
        add(f"{loss_type}-token-kl", token | AGAIN | KL)
        add(f"{loss_type}-sequence-kl", sequence | AGAIN | KL)
        add(f"{loss_type}-kl-uncorrected", token | AGAIN | KL | {"use_bias_correction_kl": False})
        add(f"{loss_type}-masked", token | AGAIN | {"mask_truncated_completions": True})
        add(f"{loss_type}-steps", token | AGAIN | KL, steps=True)
        add(f"{loss_type}-unscored", token | AGAIN, unscored=True)
        add(f"{loss_type}-lora", token | AGAIN | KL, lora=True)
        add(f"{loss_type}-4-batches-4-peers", token | AGAIN | KL, groups=4, accumulation=4, contributions=4)
        # With bnpo, each of TRL's batches is divided by its own tokens, as each of our peers' contributions is.
        if loss_type != "bnpo":
            masked = token | AGAIN | {"mask_truncated_completions": True}
            add(f"{loss_type}-4-batches-1-peer", masked, groups=4, accumulation=4)
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        corrected = CORRECTED | {"importance_sampling_mode": mode}
        add(f"{mode}", corrected | AGAIN)
        add(f"{mode}-first-update", corrected | {"importance_sampling_clip_min": 0.85})
        add(f"{mode}-bounds", corrected | AGAIN | KL | {"importance_sampling_clip_min": 0.85})
        only_low = {"importance_sampling_clip_min": 0.85, "importance_sampling_clip_max": None}
        add(f"{mode}-low", corrected | AGAIN | only_low, lora=True)
    for quantile in (0.2, 0.5, 0.8):
        add(f"entropy-{quantile}", AGAIN | {"top_entropy_quantile": quantile})
    everything = AGAIN | KL | CORRECTED | {"top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.02}
    add("entropy-4-batches", AGAIN | {"top_entropy_quantile": 0.4}, groups=4, accumulation=4, contributions=4)
    add("delta", AGAIN | {"delta": 1.25})
    add("delta-sequence", AGAIN | {"delta": 1.05, "importance_sampling_level": "sequence", "epsilon": 0.03})
    add("off-policy", AGAIN | {"off_policy_mask_threshold": 0.02})
    add("off-policy-steps", AGAIN | {"off_policy_mask_threshold": 0.02}, steps=True)
    add("off-policy-corrected", AGAIN | CORRECTED | {"off_policy_mask_threshold": 0.02})
    add("none", AGAIN | {"scale_rewards": "none"})
    add("batch", AGAIN | {"scale_rewards": "batch"})
    add("temperature-0.5", AGAIN | {"temperature": 0.5})
    add("everything", everything | {"delta": 1.25, "mask_truncated_completions": True, "loss_type": "grpo"})
    add("everything-lora", everything | {"loss_type": "dr_grpo"}, lora=True)
    add("everything-cispo", everything | {"loss_type": "cispo", "epsilon_high": 1.1})
    return found


def save_base(folder: Path) -> None:
    """A random Qwen2 in float32, whose tokens have probabilities different enough for a temperature to matter."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_groups(count: int, unscored: bool) -> list[Group]:
    """Random tokens, prompts and completions of many lengths, the second of each group cut; random scores."""
    generator = torch.Generator().manual_seed(3)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    groups = []
    for _ in range(count):
        completions = []
        for place in range(GENERATIONS):
            cut = place == 1
            ids = torch.randint(PAD, (LONGEST if cut else number(0, LONGEST),), generator=generator).tolist()
            ids = ids if cut else [*ids, END]
            completions.append(Completion(ids, torch.zeros(len(ids)), torch.zeros(len(ids)), terminated=not cut))
        scores: list[list[Any]] = torch.randn(len(FUNCTIONS), GENERATIONS, generator=generator).tolist()
        if unscored:
            scores[number(0, len(FUNCTIONS))][number(0, GENERATIONS)] = None
        prompt_ids = torch.randint(PAD, (number(2, 7),), generator=generator).tolist()
        groups.append(Group({}, prompt_ids, completions, [""] * GENERATIONS, scores))
    if unscored:
        for row in groups[0].scores:
            row[2] = None
    return groups


def in_steps(group: Group) -> Group:
    """The group with the first function's scores given half at a token in the middle, half at the end."""
    first = [
        [(index, score / 2) for index in sorted({len(completion.token_ids) // 2, len(completion.token_ids) - 1})]
        for completion, score in zip(group.completions, group.scores[0], strict=True)
    ]
    return replace(group, scores=[first, *group.scores[1:]])


@dataclass(frozen=True)
class Scene:
    """Inputs that both get."""

    case: Case
    base: Path
    policy: Policy
    """Ours."""
    groups: list[Group]
    vectors: tuple[Tensor, Tensor]
    """Parameters that sampled, and those that are differentiated."""

    def ours(self, **changes: Any) -> Answer:
        """What we make of it, in contributions that are averaged, with settings changed."""
        case, grpo = self.case, self.case.grpo(**changes)
        advantages = self.advantages(grpo)
        share = case.groups // case.contributions
        gradients = []
        for start in range(0, case.groups, share):
            part = slice(start * GENERATIONS, (start + share) * GENERATIONS)
            rollout = make_rollout(self.groups[start : start + share], advantages[part], 0, grpo)
            if grpo.num_iterations > 1 and grpo.importance_sampling_correction:
                self.policy.load_vector(self.vectors[0])
                rollout = replace(rollout, old_logps=rollout_gradient(self.policy, rollout, grpo, BUDGET).logps)
            self.policy.load_vector(self.vectors[1])
            gradients.append(rollout_gradient(self.policy, rollout, grpo, BUDGET))
        shares = [gradient.weight / sum(other.weight for other in gradients) for gradient in gradients]
        vectors = torch.stack([gradient.vector * share for gradient, share in zip(gradients, shares, strict=True)])
        losses = [gradient.metrics["loss"] * share for gradient, share in zip(gradients, shares, strict=True)]
        return Answer(sum(losses), vectors.sum(dim=0), gradients[-1].metrics)

    def theirs(self) -> Answer:
        """What TRL makes of it."""
        grpo = self.case.grpo()
        lora = LORA if self.case.lora else None
        oracle = Oracle(self.base, grpo, WEIGHTS, lora=lora, accumulation=self.case.accumulation)
        oracle.load(self.vectors[0])
        batch = oracle.prepare(self.groups)
        if self.case.steps:
            batch["advantages"] = self.advantages(grpo).float()
        oracle.load(self.vectors[1])
        return oracle.differentiate(batch)

    def advantages(self, grpo: GrpoSection) -> Tensor:
        groups = [in_steps(group) for group in self.groups] if self.case.steps else self.groups
        return compare(groups, WEIGHTS, grpo).values


class Stage:
    """Sets scenes on one base model."""

    def __init__(self, base: Path) -> None:
        """base: a folder, as `save_base` leaves it."""
        self.base = base
        self._policies = {
            lora: Policy(AutoModelForCausalLM.from_pretrained(base), LORA if lora else None) for lora in (False, True)
        }
        self._starts = {False: self._policies[False].flatten(), True: torch.zeros(self._policies[True].size)}

    def set(self, case: Case) -> Scene:
        """Completions of the policy itself, or of one that is off by noise if that is to be corrected."""
        grpo, policy = case.grpo(), self._policies[case.lora]
        generator = torch.Generator().manual_seed(5)

        def noise(size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        sampled = self._starts[case.lora] + (0.2 if case.lora else 0.02) * noise(policy.size)
        moved = sampled + 0.03 * noise(policy.size) if grpo.num_iterations > 1 else sampled
        groups = make_groups(case.groups, case.unscored)
        policy.load_vector(sampled)
        members = range(case.groups * GENERATIONS)
        rollout = make_rollout(groups, torch.zeros(len(members), 1), 0, grpo)
        with torch.no_grad():
            rows = iter(completion_logps(policy, make_batch(rollout, members, policy.device), grpo.temperature)[0])
        for group in groups:
            for number, completion in enumerate(group.completions):
                logps = next(rows)[: len(completion.token_ids)].clone()
                if grpo.importance_sampling_correction:
                    logps += 0.2 * noise(len(logps))
                group.completions[number] = replace(completion, logps=logps)
        return Scene(case, self.base, policy, groups, (sampled, moved))
