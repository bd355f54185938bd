"""TRL's GRPOTrainer as an oracle: all of it but the generation, which gives back completions that are made here.

From there on it is TRL's own code that scores, compares, masks, corrects and differentiates. A trainer is made for each
configuration, with every flag that matters named, because TRL's defaults move.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils import vector_to_parameters
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hivegrpo.peer.learn.rollout import Group
from hivegrpo.protocol.config import GrpoSection, LoraSection

VOCABULARY = 40
END, PAD = VOCABULARY - 1, VOCABULARY - 2

FUNCTIONS = ("first", "second", "third")
"""Names of the reward functions."""


@dataclass(frozen=True)
class Answer:
    """What TRL makes of a batch."""

    loss: float
    gradient: Tensor
    """(size,), in the order of the trained parameters."""
    metrics: dict[str, float]
    """The last that it noted, of the last micro-batch."""


class Oracle:
    """TRL in one configuration."""

    def __init__(
        self,
        folder: Path,
        grpo: GrpoSection,
        weights: Sequence[float],
        *,
        lora: LoraSection | None = None,
        accumulation: int = 1,
    ) -> None:
        """folder: the base model; weights: of FUNCTIONS; accumulation: micro-batches, of one group each if above 1."""
        from trl import GRPOConfig, GRPOTrainer  # here: this import takes seconds

        self.accumulation = accumulation
        self._scores: list[list[float | None]] = []
        self.trainer: Any = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            [self._function(number, name) for number, name in enumerate(FUNCTIONS)],
            args=GRPOConfig(
                output_dir=str(folder / "trl"),
                gradient_accumulation_steps=accumulation,
                reward_weights=list(weights),
                **flags(grpo),
            ),
            train_dataset=Dataset.from_list([{"prompt": "t1"}]),
            processing_class=make_tokenizer(),
            peft_config=_adapter(lora) if lora is not None else None,
        )
        # As with vLLM, but without it: what TRL would ask it for is replaced in `prepare`.
        self.trainer.use_vllm = grpo.importance_sampling_correction
        self.trainer.current_gradient_accumulation_steps = accumulation
        self.trainer.model.train()
        self._parameters = [value for value in self.trainer.model.parameters() if value.requires_grad]

    def load(self, vector: Tensor) -> None:
        """Take over a policy's parameters."""
        vector_to_parameters(vector, self._parameters)

    def prepare(self, groups: Sequence[Group]) -> dict[str, Any]:
        """TRL's batch of these groups, which the parameters that are loaded have sampled."""
        completions = [completion for group in groups for completion in group.completions]
        ids = [completion.token_ids for completion in completions]
        logps = [completion.logps.tolist() for completion in completions] if self.trainer.use_vllm else None
        prompts = [" ".join(f"t{token}" for token in group.prompt_ids) for group in groups for _ in group.completions]
        self._scores = [[score for group in groups for score in group.scores[k]] for k in range(len(FUNCTIONS))]
        self.trainer._generate_single_turn = lambda *_, **__: (ids, logps)
        batch: dict[str, Any] = self.trainer._generate_and_score_completions([{"prompt": text} for text in prompts])
        return batch

    def differentiate(self, batch: dict[str, Any]) -> Answer:
        """Loss and gradient of a batch at the parameters that are loaded."""
        from trl.trainer.utils import split_tensor_dict

        self.trainer.model.zero_grad()
        loss = 0.0
        for part in split_tensor_dict(batch, self.accumulation):
            part_loss = self.trainer._compute_loss(self.trainer.model, part)
            part_loss.backward()
            loss += part_loss.item()
        gradient = torch.cat([value.grad.flatten() for value in self._parameters])
        return Answer(loss, gradient, self.metrics)

    @property
    def metrics(self) -> dict[str, float]:
        """The last that TRL noted under each name."""
        return {name: values[-1] for name, values in self.trainer._metrics["train"].items()}

    def _function(self, number: int, name: str) -> Callable[..., list[float | None]]:
        def function(**_: Any) -> list[float | None]:
            return self._scores[number]

        function.__name__ = name
        return function


def flags(grpo: GrpoSection) -> dict[str, Any]:
    """The settings of a GRPOConfig that mean what the section says."""
    return {
        "loss_type": grpo.loss_type,
        "importance_sampling_level": grpo.importance_sampling_level,
        "epsilon": grpo.epsilon,
        "epsilon_high": grpo.epsilon_high,
        "delta": grpo.delta,
        "beta": grpo.beta,
        "use_bias_correction_kl": grpo.use_bias_correction_kl,
        "mask_truncated_completions": grpo.mask_truncated_completions,
        "top_entropy_quantile": grpo.top_entropy_quantile,
        "num_iterations": grpo.num_iterations,
        "scale_rewards": grpo.scale_rewards,
        "num_generations": grpo.num_generations,
        "max_completion_length": grpo.max_completion_length,
        "temperature": grpo.temperature,
        "vllm_importance_sampling_correction": grpo.importance_sampling_correction,
        "vllm_importance_sampling_mode": grpo.importance_sampling_mode,
        "vllm_importance_sampling_clip_min": grpo.importance_sampling_clip_min,
        "vllm_importance_sampling_clip_max": grpo.importance_sampling_clip_max,
        "off_policy_mask_threshold": grpo.off_policy_mask_threshold,
        "per_device_train_batch_size": grpo.num_generations,
        "multi_objective_aggregation": "sum_then_normalize",
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "router_aux_loss_coef": None,
        "cast_lm_head_to_fp32": False,
        "disable_dropout": True,
        "pad_to_multiple_of": None,
        "use_vllm": False,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "activation_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Token 7 is written t7."""
    inner = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCABULARY)}, unk_token="t0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"t{END}", pad_token=f"t{PAD}")


def _adapter(lora: LoraSection) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
