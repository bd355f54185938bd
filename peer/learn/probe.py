"""What a policy does on a fixed batch of prompts, so that policies which were trained differently can be compared."""

import threading
from collections.abc import Sequence
from statistics import fmean, stdev

import torch

from hivegrpo.peer.learn.batches import make_batch, plan_batches
from hivegrpo.peer.learn.cancel import check
from hivegrpo.peer.learn.collect import Collector
from hivegrpo.peer.learn.encoding import end_token_ids
from hivegrpo.peer.learn.gradient import completion_logps
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.metrics import Tally, finite
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import Sampling, sample_within
from hivegrpo.protocol.errors import ConfigError

PROMPTS = 64
COPIES = 8
"""Completions of each prompt, whatever num_generations is."""
SEED = 0
"""Of the choice of prompts and of the sampling, whatever the run's seed is: what differs is the policy."""
KL_TEMPERATURE = 1.0


def probe(learner: Learner, cancelled: threading.Event | None = None) -> dict[str, float]:
    """Figures of the policy that a learner has loaded, on held-out prompts, or on training prompts if there are none.

    Sampled as in training (temperature, top_p, top_k): `reward`, `entropy` and `completions/mean_length` as the metrics
    of that name; `reward_std`, the mean over the prompts of the unbiased standard deviation of the rewards of one
    prompt's completions, where each group counts once; `frac_reward_zero_std`. And `kl`, as `kl_to_base` has it.

    Afterwards the policy's KL reference is the base. Raises Cancelled soon after the event is set; ConfigError if no
    prompt fits max_prompt_length; NumericsError if the policy has diverged.
    """
    config = learner.config
    prompts = learner.held_out if learner.held_out is not None else learner.prompts
    grpo = config.grpo.model_copy(update={"num_generations": COPIES, "dynamic_sampling_factor": 1.0})
    fixed = config.model_copy(update={"grpo": grpo, "run": config.run.model_copy(update={"seed": SEED})})
    generator = torch.Generator(learner.policy.device).manual_seed(SEED)
    collector = Collector(fixed, learner.peer, learner.encoder, prompts, learner.pool)
    count = min(PROMPTS, len(prompts))
    sampled = collector.collect(learner.policy, range(count), count, generator, cancelled)
    if sampled.compared is None:
        raise ConfigError(
            f"None of {count} prompts to measure on fits [grpo] max_prompt_length.", "Raise it, or shorten the prompts."
        )
    groups = sampled.compared.rewards.view(-1, COPIES).tolist()
    kept = ("reward", "entropy", "completions/mean_length", "frac_reward_zero_std")
    figures = {name: value for name, value in sampled.metrics.items() if name in kept}
    spreads = [stdev(scored) for group in groups if len(scored := [r for r in group if r == r]) > 1]
    if spreads:
        figures["reward_std"] = fmean(spreads)
    figures["kl"] = kl_to_base(learner, [group.prompt_ids for group in sampled.groups.values()], cancelled)
    return finite(figures)


@torch.no_grad()
def kl_to_base(
    learner: Learner, prompt_ids: Sequence[Sequence[int]], cancelled: threading.Event | None = None
) -> float:
    """KL(policy || base) a token, in nats, at temperature 1, estimated on completions that the policy samples.

    The mean over all tokens of k3 = exp(b - p) - (b - p) - 1, where p and b are a token's log-probabilities under
    policy and base (http://joschu.net/blog/kl-approx.html): the estimator of the loss's KL term. At one temperature,
    and without top_p and top_k, whatever the run samples with; and measured whatever beta is, 0 too.
    """
    policy, grpo = learner.policy, learner.config.grpo
    policy.load_reference(None)
    completions = sample_within(
        learner.peer.sampling_tokens,
        policy.model,
        prompt_ids,
        COPIES,
        Sampling(grpo.max_completion_length, KL_TEMPERATURE),
        end_token_ids(learner.encoder.tokenizer, policy.model.generation_config),
        torch.Generator(policy.device).manual_seed(SEED),
        cancelled,
    )
    prompts = [list(ids) for ids in prompt_ids for _ in range(COPIES)]
    unweighted, rows = torch.zeros(len(completions), 1), range(len(completions))
    rollout = Rollout(learner.version, prompts, completions, unweighted, [True for _ in rows])
    lengths = [len(completion.token_ids) for completion in completions]
    tally = Tally()
    for members in plan_batches(rows, [len(ids) for ids in prompts], lengths, learner.peer.micro_batch_tokens):
        check(cancelled)
        batch = make_batch(rollout, members, policy.device)
        logps, _ = completion_logps(policy, batch, KL_TEMPERATURE)
        with policy.reference():
            base, _ = completion_logps(policy, batch, KL_TEMPERATURE)
        # In double: for small differences almost all of k3 cancels.
        difference = (base.double() - logps.double()).masked_fill(~batch.completion_mask, 0.0)
        part = Tally()
        part.mean("kl", difference.exp() - difference - 1.0, batch.completion_mask)
        tally.add(part)
    return tally.values().get("kl", float("nan"))
