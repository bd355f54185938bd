"""The task of the learning benchmarks: emit the prompt's first token, again and again.

A Qwen2 with random weights, eight prompts of four tokens, a group of eight completions each; the reward is the share
of a completion's tokens that are the prompt's first. Both sides begin with the same weights and train all of them.
"""

import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.utils import logging

from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.rewards import registry
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.protocol.config import PeerConfig, RunConfig

VOCABULARY = 32
PROMPTS = 8
PROMPT_TOKENS = 4
GENERATIONS = 8
LEARNING_RATE = 3e-3
PAD, END = 0, 1
NEVER = VOCABULARY
"""The end token where none is wanted: the model has no logit for it."""
WORDS = {"<pad>": PAD, "<end>": END, **{f"t{token}": token for token in range(2, VOCABULARY)}, "<never>": NEVER}


@dataclass(frozen=True)
class Shape:
    """Size of the model, and of what it writes."""

    layers: int
    width: int
    completion_tokens: int
    ends: bool = False
    """Whether a token can end a completion; else each has all its tokens."""

    def __str__(self) -> str:
        tokens = f"{'at most ' if self.ends else ''}{self.completion_tokens} tokens"
        return f"{self.layers} layers, {self.width} wide, completions of {tokens}"


SMALL = Shape(layers=2, width=64, completion_tokens=8)
LARGE = Shape(layers=4, width=256, completion_tokens=64)
LARGE_ENDING = Shape(layers=4, width=256, completion_tokens=64, ends=True)


def first_token(*, completion_ids: list[list[int]], answer: list[Any], **_: Any) -> list[float]:
    """Share of the tokens that are the prompt's first one."""
    return [ids.count(int(token)) / len(ids) for ids, token in zip(completion_ids, answer, strict=True)]


class Task(AbstractContextManager["Task"]):
    """One seed's weights and prompts, in a folder that goes away with the context."""

    def __init__(self, seed: int, shape: Shape) -> None:
        logging.disable_progress_bar()
        self.seed, self.shape = seed, shape
        self._folder = tempfile.TemporaryDirectory(prefix="hivegrpo-task-")
        self.folder = Path(self._folder.name)
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=shape.width,
                intermediate_size=2 * shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=128,
                tie_word_embeddings=False,
                eos_token_id=END if shape.ends else None,
                pad_token_id=PAD,
            )
        )
        model.save_pretrained(self.folder)
        generator = torch.Generator().manual_seed(seed)
        self.prompts: list[list[int]] = torch.randint(
            2, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=generator
        ).tolist()
        self.rows = [{"prompt": " ".join(f"t{t}" for t in ids), "answer": str(ids[0])} for ids in self.prompts]

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def model(self) -> Qwen2ForCausalLM:
        """The weights that both sides begin with."""
        return Qwen2ForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One word a token. Each side needs its own: it keeps what was asked of it last, padding for example.

        Not by AutoTokenizer, which gives every Qwen2 folder Qwen2's own pre-tokenizer.
        """
        words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        end = "<end>" if self.shape.ends else "<never>"
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token="<pad>", padding_side="left")

    def config(self, versions: int, start_peers: int = 1) -> RunConfig:
        """The run, as run.toml would have it."""
        return RunConfig.model_validate(
            {
                "run": {"name": "first token", "versions": versions, "seed": self.seed, "start_peers": start_peers},
                "model": {"path": str(self.folder), "trainable": "full"},
                "dataset": {"path": "rows.jsonl"},
                "rewards": {"functions": ["first_token"]},
                "grpo": {
                    "num_generations": GENERATIONS,
                    "prompts_per_round": PROMPTS,
                    "max_prompt_length": PROMPT_TOKENS,
                    "max_completion_length": self.shape.completion_tokens,
                    "loss_type": "dapo",
                    "beta": 0.0,
                },
                "optimizer": {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"},
                "admission": {"mode": "open"},
            }
        )

    def learner(self, config: RunConfig) -> Learner:
        """A peer's learning side, with a model of its own, as a peer has it that was told nothing else."""
        registry.BUILT_IN["first_token"] = Reward("first_token", 1, first_token)
        policy = Policy.load(self.folder, config.model, config.lora, "cpu")
        encoder = PromptEncoder(self.tokenizer(), config.dataset)
        return Learner(config, PeerConfig(), policy, encoder, Prompts(tuple(self.rows)), None)

    def trl_trainer(
        self, steps: int, curve: list[float], output: Path, callbacks: list[TrainerCallback] | None = None
    ) -> Any:
        """TRL's trainer on the same weights, prompts and settings; it appends each step's mean reward to `curve`.

        It clips the gradient's norm at 1, as it does by default.
        """
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        logging.set_verbosity_error()

        def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
            rewards = first_token(completion_ids=completion_ids, answer=answer)
            curve.append(sum(rewards) / len(rewards))
            return rewards

        settings = GRPOConfig(
            output_dir=str(output),
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=self.shape.completion_tokens,
            shuffle_dataset=False,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            loss_type="dapo",
            scale_rewards="group",
            beta=0.0,
            epsilon=0.2,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            num_iterations=1,
            weight_decay=0.0,
            max_steps=steps,
            seed=self.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=10 * steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=self.model(),
            reward_funcs=reward,
            args=settings,
            # One epoch: its trainer makes its data loader anew for each, which is no part of a step.
            train_dataset=Dataset.from_list(self.rows * steps),
            processing_class=self.tokenizer(),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
