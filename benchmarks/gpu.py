"""What a peer computes on a GPU: canonical bits, gradients that a CPU takes too, and its speed at real models' shapes.

Bits: the known-answer test of admission with one thread and with all, digests of the canonical step over millions of
values, and whether a GPU would give the same bits for the same operations. Passes: gradients of one rollout on the CPU
and on the device, with the losses' settings in turn. Speed: Qwen2.5's shapes with random weights in bfloat16 and an
adapter on all linear layers; a learner samples, in ever larger batches, and differentiates, in ever larger
micro-batches, until memory or the time of a shape is over. Exits with 1 if the CPU does not reproduce the known
answers, or a gradient of the device fails or differs from the CPU's; else with 0, whatever the other figures are.
"""

import argparse
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_bits import measure_bits, scalars, show_bits
from gpu_passes import GENERATIONS, SHAPES, Shape, measure_passes, random_base
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hivegrpo.peer.learn import logprobs
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.peer.learn.genesis import genesis_parameters
from hivegrpo.peer.learn.learner import LearnedContribution, Learner
from hivegrpo.peer.learn.policy import Policy, choose_device
from hivegrpo.peer.learn.step import PolicyState, adamw_step
from hivegrpo.peer.rewards import registry
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.protocol.config import LoraSection, PeerConfig, RunConfig

BATCHES = (8, 32, 128, 512)
MICRO_BATCHES = (2048, 4096, 8192, 16_384, 32_768)
CHECKPOINTED = (4096, 32_768)
GRADIENT_SEQUENCES = 128
"""Of the rollout that gradients are taken of; a micro-batch of the largest size is about all of it."""
CHUNKS = (22, 24, 26, 28)
"""Powers of two: logits that log-probabilities hold at a time."""
HEAD_TOKENS = 4096
WARM_UP_TOKENS = 4
COMPARED = (32, 32)
"""Sequences, and tokens of each, on which sampler and training pass are compared."""
TOLERANCE = 1e-4
"""Of a gradient's relative difference between devices, both in float32."""
GIB = 1 << 30
CODEC = "mxint8"

T = TypeVar("T")


@dataclass(frozen=True)
class Rate:
    """One measurement, or that it did not fit."""

    what: str
    size: int
    """Sequences side by side of a rollout, tokens of a micro-batch, 2^size logits of a chunk."""
    tokens: int = 0
    """Drawn by a rollout; prompts included, of a gradient."""
    seconds: float = 0.0
    """0 if it went out of memory."""
    peak_gib: float = 0.0
    """Most that tensors took, the model included; of the device."""
    reserved_gib: float = 0.0
    """Most that torch's allocator took, what it keeps from the warm-up included."""

    @property
    def cell(self) -> str:
        """For the table."""
        rate = f"{self.tokens / self.seconds:,.0f}/s {self.peak_gib:.1f}" if self.seconds else "memory"
        return f"{self.size}: {rate}"


@dataclass
class Figures:
    """Of one shape."""

    values: int = 0
    """Trained."""
    encoded_bytes: int = 0
    own_head: bool = False
    """Whether the policy makes logits itself, chunk by chunk."""
    base_gib: float = 0.0
    build_seconds: float = 0.0
    encode_seconds: float = 0.0
    step_seconds: float = 0.0
    sampler_difference: dict[str, float] = field(default_factory=dict)
    """Between the log-probabilities of sampler and training pass, in nats."""
    rates: list[Rate] = field(default_factory=list)
    stopped: bool = False
    """Whether its time was over before the last measurement."""


def spread(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that is another for nearly every completion, so that none is left out of the gradient."""
    return [sum(ids) / len(ids) / max(1, max(ids)) for ids in completion_ids]


def out_of_memory(error: RuntimeError) -> bool:
    """cuBLAS has an error of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


class Meter:
    """Times work on a device, and what memory it takes there."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._cuda = device == "cuda"

    def time(self, what: str, size: int, tokens: int, work: Callable[[], object]) -> Rate:
        """Once, and with what memory the allocator has from before."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = self._seconds(work)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return Rate(what, size)
        if not self._cuda:
            return Rate(what, size, tokens, seconds)
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return Rate(what, size, tokens, seconds, peak / GIB, reserved / GIB)

    def let_go(self) -> None:
        """Of memory that is held for nothing."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    def allocated_gib(self) -> float:
        """By tensors, now."""
        return torch.cuda.memory_allocated() / GIB if self._cuda else 0.0

    def _seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self._cuda:
            torch.cuda.synchronize()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Of work on the CPU."""
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


class Bench:
    """One shape: its policy, learners on it, and what they come to."""

    def __init__(self, shape: Shape, meter: Meter, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        self.shape, self.meter = shape, meter
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self.figures = Figures()
        self.over = threading.Event()
        self._timer = threading.Timer(seconds, self.over.set)
        self._timer.daemon = True
        registry.BUILT_IN["spread"] = Reward("spread", 1, spread)
        words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(shape.vocabulary + 1)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # The end token has no logit: completions have all their tokens.
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{shape.vocabulary}")

    def measure(self) -> Figures:
        """All of it, as far as time goes."""
        self._timer.start()
        try:
            self._measure_plain()
            self._measure_checkpointed()
        except Cancelled:
            self.figures.stopped = True
        finally:
            self._timer.cancel()
        return self.figures

    def _measure_plain(self) -> None:
        self.figures.build_seconds, policy = timed(self._policy)
        self.figures.values, self.figures.own_head = policy.size, policy.head is not None
        self.figures.base_gib = self.meter.allocated_gib()
        self._rollouts(policy)
        self._canonical(self._gradients(policy, "gradient", MICRO_BATCHES))
        self._chunks(policy)
        self._variants(policy)

    def _measure_checkpointed(self) -> None:
        self._gradients(self._policy(gradient_checkpointing=True), "checkpointed", CHECKPOINTED)

    def _policy(self, *, gradient_checkpointing: bool = False) -> Policy:
        self.meter.let_go()  # of the policy before, whose modules hold each other
        base = random_base(self.shape, self.meter.device, torch.bfloat16)
        policy = Policy(base, LoraSection(), gradient_checkpointing=gradient_checkpointing)
        policy.load_vector(genesis_parameters(policy.layout, 0))
        return policy

    def _learner(self, policy: Policy, completion_tokens: int, *, equal: bool = False, **grpo: Any) -> Learner:
        """On prompts between three quarters and all of `prompt_tokens`, unless they are to be `equal`."""
        config = RunConfig.model_validate(
            {
                "run": {"name": "gpu", "versions": 1},
                "model": {"path": ".", "dtype": "bfloat16"},
                "dataset": {"path": "rows.jsonl"},
                "rewards": {"functions": ["spread"]},
                "grpo": {
                    "num_generations": GENERATIONS,
                    "num_iterations": 2,  # so that rollouts are kept
                    "max_prompt_length": self.prompt_tokens,
                    "max_completion_length": completion_tokens,
                    **grpo,
                },
            }
        )
        numbers = torch.Generator().manual_seed(0)
        shortest = self.prompt_tokens if equal else self.prompt_tokens * 3 // 4
        rows = []
        for _ in range(max(BATCHES) // GENERATIONS):
            length = int(torch.randint(shortest, self.prompt_tokens + 1, (), generator=numbers))
            ids = torch.randint(self.shape.vocabulary, (length,), generator=numbers).tolist()
            rows.append({"prompt": " ".join(f"t{number}" for number in ids)})
        encoder = PromptEncoder(self._tokenizer, config.dataset)
        return Learner(config, PeerConfig(sampling_tokens=1 << 30), policy, encoder, Prompts(tuple(rows)), None)

    def _sample(self, learner: Learner, sequences: int) -> None:
        prompts = sequences // GENERATIONS
        learner.sample(1, 0, prompts, prompts, self.over)

    def _contribute(self, learner: Learner, sequences: int) -> LearnedContribution:
        """What `_sample` has left, differentiated."""
        prompts = sequences // GENERATIONS
        return learner.contribute(1, 0, prompts, prompts, self.over)

    def _rollout(self, what: str, policy: Policy, sequences: int, *, equal: bool = False) -> Rate:
        """After a short one of the same batch."""
        self.meter.let_go()
        short = self._learner(policy, WARM_UP_TOKENS, equal=equal)
        rate = self.meter.time(what, sequences, 0, partial(self._sample, short, sequences))
        if rate.seconds:
            learner, tokens = self._learner(policy, self.completion_tokens, equal=equal), self.completion_tokens
            rate = self.meter.time(what, sequences, sequences * tokens, partial(self._sample, learner, sequences))
        return self._note(rate)

    def _rollouts(self, policy: Policy) -> None:
        for sequences in BATCHES:
            if not self._rollout("rollout", policy, sequences).seconds:
                return

    def _gradients(self, policy: Policy, what: str, micro_batches: Sequence[int]) -> Tensor:
        """Of one rollout, each of two passes the second; the gradient of the first."""
        learner = self._learner(policy, self.completion_tokens)
        learner.peer = learner.peer.model_copy(update={"micro_batch_tokens": MICRO_BATCHES[0]})
        self._sample(learner, GRADIENT_SEQUENCES)
        first = self._contribute(learner, GRADIENT_SEQUENCES)
        for micro_batch in micro_batches:
            learner.peer = learner.peer.model_copy(update={"micro_batch_tokens": micro_batch})
            self.meter.let_go()
            again = partial(learner.contribute_again, 1, 0, self.over)
            rate = self.meter.time(what, micro_batch, first.num_tokens, again)
            if rate.seconds:
                rate = self.meter.time(what, micro_batch, first.num_tokens, again)
            if not self._note(rate).seconds:
                break
        return first.vector

    def _canonical(self, vector: Tensor) -> None:
        """What the CPU does with a gradient."""
        self.figures.encode_seconds, encoded = timed(partial(EncodedVector.encode, get_codec(CODEC), vector))
        self.figures.encoded_bytes = sum(map(len, encoded.chunks))
        state = PolicyState.initial(vector)
        step = partial(adamw_step, state, vector, scalars(1), state.empty_like())
        self.figures.step_seconds, _ = timed(step)

    def _chunks(self, policy: Policy) -> None:
        """The head's log-probabilities and their backward pass, by how many logits exist at a time."""
        if policy.head is None:
            return
        weight = policy.head.weight
        hidden = torch.randn(1, HEAD_TOKENS, self.shape.width, dtype=weight.dtype, device=weight.device)
        token_ids = torch.randint(self.shape.vocabulary, (1, HEAD_TOKENS), device=weight.device)
        hidden.requires_grad_()

        def work() -> None:
            logps, _ = logprobs.hidden_logps(hidden, weight, None, token_ids, 1.0)
            logps.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped

        before = logprobs.CHUNK_VALUES
        try:
            for power in CHUNKS:
                logprobs.CHUNK_VALUES = 1 << power
                self.meter.let_go()
                self.meter.time("head", power, HEAD_TOKENS, work)
                rates = [self.meter.time("head", power, HEAD_TOKENS, work) for _ in range(3)]
                self._note(sorted(rates, key=lambda rate: rate.seconds)[1])
        finally:
            logprobs.CHUNK_VALUES = before

    def _variants(self, policy: Policy) -> None:
        """What padding and the adapter cost the sampler, and how far it is from the training pass."""
        self._rollout("equal prompts", policy, GRADIENT_SEQUENCES, equal=True)
        with policy.reference():
            self._rollout("no adapter", policy, GRADIENT_SEQUENCES)
        sequences, tokens = COMPARED
        learner = self._learner(policy, tokens, importance_sampling_correction=True)
        self._sample(learner, sequences)
        metrics = self._contribute(learner, sequences).metrics
        name = "sampling/sampling_logp_difference/"
        self.figures.sampler_difference = {kind: metrics[name + kind] for kind in ("mean", "max")}

    def _note(self, rate: Rate) -> Rate:
        self.figures.rates.append(rate)
        print(f"  {rate.what:15}{rate.cell}", file=sys.stderr, flush=True)
        return rate


def show_figures(name: str, figures: Figures) -> None:
    """One shape's part of the table."""
    size = f"{figures.values:,} values trained, {figures.encoded_bytes / 1e6:.1f} MB in {CODEC}"
    on_cpu = f"encoded in {figures.encode_seconds:.2f} s, stepped in {figures.step_seconds:.2f} s"
    print(f"\n{name}: {size}, {on_cpu}; model {figures.base_gib:.1f} GiB, built in {figures.build_seconds:.1f} s")
    print(f"  own head: {figures.own_head}; sampler and training pass, nats: {figures.sampler_difference}")
    for what in dict.fromkeys(rate.what for rate in figures.rates):
        print(f"  {what:15}" + "  ".join(rate.cell for rate in figures.rates if rate.what == what))
    if figures.stopped:
        print("  its time was over before the rest")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=["0.5B", "1.5B", "7B"], help="none is bits alone"
    )
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of the longest prompts")
    parser.add_argument("--completion", type=int, default=128, metavar="N", help="tokens of each completion")
    parser.add_argument("--seconds", type=float, default=90.0, metavar="S", help="for one shape")
    parser.add_argument("--values", type=int, default=4_000_000, metavar="N", help="of the canonical step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    device = choose_device(options.device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    outcome: dict[str, Any] = {"device": name, "bits": measure_bits(device, options.values)}
    outcome |= {"passes": measure_passes(device), "shapes": {}}
    for shape in options.shapes:
        print(f"{shape}: tokens a second, GiB", file=sys.stderr, flush=True)
        bench = Bench(SHAPES[shape], Meter(device), options.prompt, options.completion, options.seconds)
        outcome["shapes"][shape] = bench.measure()
    if options.json is not None:
        options.json.write_text(json.dumps(outcome, indent=2, default=asdict) + "\n")
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    show_bits(outcome["bits"])
    passes = outcome["passes"]
    wrong = {each: result for each, result in passes.items() if isinstance(result, str) or not result <= TOLERANCE}
    right = f"{len(passes) - len(wrong)} of {len(passes)} within {TOLERANCE}"
    print(f"gradients, device against CPU: {right}; others: {wrong}")
    for shape, figures in outcome["shapes"].items():
        show_figures(shape, figures)
    failed = any(
        part["differing"] for part in outcome["bits"].values() if isinstance(part, dict) and "differing" in part
    )
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
