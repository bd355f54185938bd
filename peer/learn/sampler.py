"""Sampling completions: one prefill a prompt, which its whole group shares, then token by token.

An own loop, because `generate` computes every prompt of a group G times, goes on with rows that have ended, and copies
the cache for every token.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hivegrpo.peer.learn.cancel import check
from hivegrpo.protocol.errors import NumericsError

Noise = torch.Generator | Sequence[torch.Generator]
"""On the model's device: one for the batch, so that what a row draws depends on the others, or one for each row."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, under TRL's names."""

    max_completion_length: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """Tokens after a prompt, and the log-probability that each had when it was drawn."""

    token_ids: list[int]
    """With the end token, if it came to one."""
    logps: Tensor
    """(T,) behaviour log-probabilities at the sampling temperature, before top_p and top_k; float32 on the CPU."""
    entropies: Tensor
    """(T,) of the distributions that `logps` are of, in nats; float32 on the CPU."""
    terminated: bool
    """Whether it ended by itself, and was not cut at max_completion_length."""


def context_of(model: Any) -> int:
    """Tokens that a model can look back at, its own included; as good as unbounded if its config names no limit."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    end_ids: frozenset[int],
    generator: Noise,
    cancelled: threading.Event | None = None,
) -> list[Completion]:
    """`copies` completions of each prompt, side by side in one batch; those of prompt i are i * copies and on.

    model: a causal language model of transformers. Raises Cancelled between tokens, and NumericsError if a token was
    drawn, greedily too, from logits that are not finite.
    """
    from hivegrpo.peer.learn.cache import make_cache  # here: it imports transformers

    device = model.device
    ids, mask = pad_left(prompts, device)
    padded = len({len(prompt) for prompt in prompts}) > 1
    cache = make_cache(model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = _forward(model, ids, mask if padded else None, positions, cache)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    logits, mask = logits.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
    position = positions[:, -1:].repeat_interleave(copies, dim=0)

    rows = len(prompts) * copies
    tokens = torch.zeros(rows, sampling.max_completion_length, dtype=torch.long, device=device)
    logps, entropies = torch.zeros(2, rows, sampling.max_completion_length, device=device)
    lengths = torch.full((rows,), sampling.max_completion_length, device=device)
    terminated = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)
    ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
    for place in range(sampling.max_completion_length):
        check(cancelled)
        taken, logps[alive, place], entropies[alive, place] = draw(logits, sampling, generator)
        tokens[alive, place] = taken
        ended = torch.isin(taken, ends)
        going = _close_ranks(ended)
        if len(going) < len(alive):
            terminated[alive[ended]] = True
            lengths[alive[ended]] = place + 1
        if len(going) == 0 or place + 1 == sampling.max_completion_length:
            break
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive, taken, mask, position = alive[going], taken[going], mask[going], position[going]
            if not isinstance(generator, torch.Generator):
                generator = [generator[row] for row in going.tolist()]
        if padded:
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        position = position + 1
        logits = _forward(model, taken.unsqueeze(1), mask if padded else None, position, cache)
    drawn = torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)
    if not logps[drawn].isfinite().all():  # looked at once: for each token it would wait for the device
        raise _not_finite()
    counts = lengths.tolist()
    return [
        Completion(row_tokens[:count], row_logps, row_entropies, ended)
        for row_tokens, row_logps, row_entropies, count, ended in zip(
            tokens.tolist(),
            logps[drawn].cpu().split(counts),
            entropies[drawn].cpu().split(counts),
            counts,
            terminated.tolist(),
            strict=True,
        )
    ]


@torch.inference_mode()
def stream(
    model: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    end_ids: frozenset[int],
    generator: torch.Generator,
    cancelled: threading.Event | None = None,
) -> Iterator[int]:
    """The tokens of one completion of one prompt, each as soon as it is drawn, up to the end token if it comes to one.

    They are those that `sample` draws from the same generator. Raises Cancelled between tokens, and NumericsError if
    one is drawn from logits that are not finite.
    """
    from hivegrpo.peer.learn.cache import make_cache  # here: it imports transformers

    cache = make_cache(model.config)
    ids = torch.tensor([list(prompt)], device=model.device)
    positions = torch.arange(len(prompt), device=model.device).unsqueeze(0)
    for _ in range(sampling.max_completion_length):
        check(cancelled)
        taken, logps, _ = draw(_forward(model, ids, None, positions, cache), sampling, generator)
        if not logps.isfinite().item():
            raise _not_finite()
        token = int(taken.item())
        yield token
        if token in end_ids:
            return
        ids, positions = taken.unsqueeze(1), positions[:, -1:] + 1


def sample_within(
    budget: int,
    model: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    end_ids: frozenset[int],
    generator: Noise,
    cancelled: threading.Event | None = None,
) -> list[Completion]:
    """As `sample`, in as many batches as it takes to hold at most `budget` tokens (or one prompt's group) at a time.

    With a generator for each row, what is drawn depends on neither budget nor other rows (but for rounding: a kernel
    may add up in another order for another batch).
    """
    longest = max(map(len, prompts)) + sampling.max_completion_length
    step = max(1, budget // (copies * longest))
    completions: list[Completion] = []
    for start in range(0, len(prompts), step):
        part = prompts[start : start + step]
        rows = slice(start * copies, (start + step) * copies)
        own = generator if isinstance(generator, torch.Generator) else generator[rows]
        completions += sample(model, part, copies, sampling, end_ids, own, cancelled)
    return completions


def draw(logits: Tensor, sampling: Sampling, generator: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row, its log-probability, and the distribution's entropy: (B, V) -> (B,), (B,), (B,).

    The log-probability is that of softmax(logits / temperature) even where top_p or top_k narrow the choice: the same
    quantity as in the loss. Greedy (temperature 0) takes the most probable token, with its log-probability at 1.
    """
    logps = (logits.float() / (sampling.temperature or 1.0)).log_softmax(dim=-1)
    probabilities = logps.exp()
    if sampling.temperature == 0.0:
        taken = logps.argmax(dim=-1, keepdim=True)
    else:
        narrowed = narrow(probabilities, sampling.top_p, sampling.top_k)
        # As torch.multinomial draws one, without its checks, which wait for the device and end the process on a NaN.
        # From NaNs it draws some token, whose log-probability is NaN: `sample` looks at that.
        taken = (narrowed / _races(narrowed, generator)).argmax(dim=-1, keepdim=True)
    entropies = torch.special.entr(probabilities).sum(dim=-1)
    return taken.squeeze(1), logps.gather(1, taken).squeeze(1), entropies


def _races(like: Tensor, generator: Noise) -> Tensor:
    """Exponential noise, (B, V) as `like`."""
    races = torch.empty_like(like)
    if isinstance(generator, torch.Generator):
        return races.exponential_(generator=generator)
    for row, own in zip(races, generator, strict=True):
        row.exponential_(generator=own)
    return races


def narrow(probabilities: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zero all but the top_k most probable tokens of each row, then all but the fewest that hold top_p of what is left.

    (B, V) -> (B, V), not normalised again. top_p of 1 and top_k of 0 leave everything.
    """
    if 0 < top_k < probabilities.shape[1]:
        least = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return probabilities


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded on the left with 0, and their mask (1 at tokens)."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(sequence)) + list(sequence) for sequence in sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences]).unsqueeze(1)
    mask = (torch.arange(longest) >= longest - lengths).long()
    return ids.to(device), mask.to(device)


def _close_ranks(ended: Tensor) -> Tensor:
    """Which rows go on, in an order in which most stay where they are: the last fill the gaps. (B,) bool -> (B',)."""
    going = (~ended).nonzero().squeeze(1)
    if len(going) == len(ended):
        return going
    order = torch.arange(len(going), device=ended.device)
    order[ended[: len(going)]] = going[going >= len(going)]
    return order


def _not_finite() -> NumericsError:
    return NumericsError(
        "The policy's logits are not finite.", "It has diverged, or this device computes wrong numbers."
    )


def _forward(model: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
    """Logits of each row's next token, (B, V); without a mask, no row is padded."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    last: Tensor = output.logits[:, -1]
    return last
