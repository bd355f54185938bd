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
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from hivegrpo.peer.learn import logprobs
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.peer.learn.genesis import genesis_parameters
from hivegrpo.peer.learn.gradient import rollout_gradient
from hivegrpo.peer.learn.learner import LearnedContribution, Learner
from hivegrpo.peer.learn.policy import Policy, choose_device
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import Sampling, sample
from hivegrpo.peer.learn.step import PolicyState, adamw_step, state_bytes
from hivegrpo.peer.learn.weights import ONE_AT_A_TIME
from hivegrpo.peer.numerics import differing, integer_floats, known_answers
from hivegrpo.peer.rewards import registry
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.protocol.config import GrpoSection, LoraSection, PeerConfig, RunConfig
from hivegrpo.protocol.scalars import StepScalars

GENERATIONS = 8
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
STEPS = 3
CODEC = "mxint8"

T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    tied: bool
    vocabulary: int = 151_936


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, tied=True, vocabulary=512),
    "0.5B": Shape(896, 24, 14, 2, 4864, tied=True),
    "1.5B": Shape(1536, 28, 12, 2, 8960, tied=True),
    "7B": Shape(3584, 28, 28, 4, 18_944, tied=False),
}


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


# Bits


def scalars(step: int) -> StepScalars:
    return StepScalars.for_step(step, learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.01)


def canonical_steps(parameters: Tensor, gradients: Sequence[Tensor]) -> PolicyState:
    """What every peer computes, on the CPU."""
    state = PolicyState.initial(parameters)
    for step, gradient in enumerate(gradients, start=1):
        out = state.empty_like()
        adamw_step(state, gradient, scalars(step), out=out)
        state = out
    return state


def device_steps(parameters: Tensor, gradients: Sequence[Tensor], device: str) -> list[Tensor]:
    """The same operations where nothing holds their bits, with torch's square root: parameters and both moments."""
    p = parameters.to(device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, gradient in enumerate(gradients, start=1):
        s, g = scalars(step), gradient.to(device)
        m = m * s.beta1 + g * s.one_minus_beta1
        v = v * s.beta2 + g * g * s.one_minus_beta2
        denominator = v.sqrt() * s.reciprocal_sqrt_bias2 + s.epsilon
        p = p * s.decay - m * s.reciprocal_bias1 / denominator * s.learning_rate
    return [vector.cpu() for vector in (p, m, v)]


def accepts_device(device: str) -> str:
    """What becomes of a canonical step whose tensors are all on the device."""
    state = PolicyState(torch.zeros(20, dtype=torch.uint8, device=device))
    try:
        adamw_step(state, torch.ones(1, device=device), scalars(1), out=state.empty_like())
    except (TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "taken"


def measure_bits(device: str, values: int) -> dict[str, Any]:
    """Digests, and what differs."""
    threads = torch.get_num_threads()
    parameters = integer_floats("gpu parameters", values, 107, 129)
    gradients = [integer_floats(f"gpu gradient {step}", values, 0, 140) for step in range(STEPS)]
    outcome: dict[str, Any] = {"torch": torch.__version__, "values": values, "canonical step": accepts_device(device)}
    state = canonical_steps(parameters, gradients)
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        answers = known_answers()
        state = canonical_steps(parameters, gradients)
        outcome[f"{count} threads"] = {
            "answers": answers,
            "differing": differing(answers),
            "state": sha256(state_bytes(state)).hexdigest(),
        }
    torch.set_num_threads(threads)
    canonical = {"parameters": state.parameters, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    for (name, ours), theirs in zip(canonical.items(), device_steps(parameters, gradients, device), strict=True):
        outcome[name] = {
            "cpu": sha256(ours.numpy().tobytes()).hexdigest(),
            "device": sha256(theirs.numpy().tobytes()).hexdigest(),
            "values that differ": int((ours.view(torch.int32) != theirs.view(torch.int32)).sum()),
        }
    return outcome


# Passes

SETTINGS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "kl": {"beta": 0.1},
    "gspo, corrected": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "importance_sampling_correction": True,
        "importance_sampling_mode": "token_truncate",
        "off_policy_mask_threshold": 0.5,
    },
    "cispo": {"loss_type": "cispo"},
    "high entropy": {"top_entropy_quantile": 0.5},
    "narrowed": {"top_p": 0.9, "top_k": 20},
}


def random_base(shape: Shape, device: str, dtype: torch.dtype, *, spread: float = 0.02) -> Any:
    """A model with random weights, of that standard deviation, made where it is to be."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        initializer_range=spread,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device), ONE_AT_A_TIME:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def measure_passes(device: str) -> dict[str, Any]:
    """For each setting, a rollout that the device samples, and the difference of its gradient there and on the CPU."""
    outcome: dict[str, Any] = {}
    for trained, lora in (("adapter", LoraSection()), ("all", None)):
        # So large that no two tokens have nearly the same entropy.
        bases = [random_base(SHAPES["tiny"], "cpu", torch.float32, spread=0.2) for _ in range(2)]
        there, here = (Policy(base.to(at), lora) for base, at in zip(bases, (device, "cpu"), strict=True))
        vector = there.flatten()
        vector += 0.02 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1))
        for policy in (there, here):
            policy.load_vector(vector)
        for name, settings in SETTINGS.items():
            outcome[f"{name}, {trained}"] = gradient_difference(there, here, GrpoSection(**settings))
    return outcome


def gradient_difference(there: Policy, here: Policy, grpo: GrpoSection) -> float | str:
    """|a - b| / |b| of the gradients of what is sampled by `there`; or what went wrong."""
    numbers = torch.Generator().manual_seed(2)
    prompts = [torch.randint(500, (length,), generator=numbers).tolist() for length in (5, 9, 7, 5)]
    sampling = Sampling(24, grpo.temperature, grpo.top_p, grpo.top_k)
    rows = len(prompts) * GENERATIONS
    noise = [torch.Generator(there.device).manual_seed(row) for row in range(rows)]
    try:
        completions = sample(there.model, prompts, GENERATIONS, sampling, frozenset(range(20)), noise)
        rollout = Rollout(
            version=0,
            prompt_ids=[ids for ids in prompts for _ in range(GENERATIONS)],
            completions=completions,
            advantages=torch.randn(rows, 1, generator=numbers, dtype=torch.float64),
            counted=[True] * rows,
        )
        ours, theirs = (rollout_gradient(policy, rollout, grpo, 256).vector for policy in (there, here))
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return float((ours - theirs).norm() / theirs.norm())


# Speed


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


def show_bits(bits: dict[str, Any]) -> None:
    """What differs, and from what."""
    print(f"canonical step with tensors on the device: {bits['canonical step']}")
    for name, part in bits.items():
        if name.endswith(" threads"):
            wrong = ", ".join(part["differing"]) or "none"
            print(f"  {name}: known answers that differ: {wrong}; state {part['state'][:16]}")
        elif isinstance(part, dict):
            of = f"of {bits['values']:,} differ from the CPU's"
            print(f"  {name}: {part['values that differ']:,} {of} by the same operations on the device")


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
