"""Make the addition demo: its problems, and a starter model that adds but forgets to carry.

    python examples/addition/make_starter.py --out cli/addition

The task is `a+b=` with a and b in 10..99, answered by the sum's digits and end-of-text. The starter is trained,
supervised, on the training problems; on most problems with a carry the taught answer is the digit-wise sum that drops
every carry. It then knows the form of an answer, is right where nothing carries, and samples right answers elsewhere
often enough for GRPO to find them. A model taught only correct sums learns them all at once, within a hundred steps:
there is no stable place to stop between a poor starter and a finished one.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HELDOUT = 500
ACCURACY = (0.30, 0.42)  # greedy, on the held-out problems
MIXED_GROUPS = 0.40  # at least this share of groups must hold both right and wrong completions
NUM_GENERATIONS = 8
MAX_COMPLETION_LENGTH = 5  # three digits, end-of-text, and one to spare
EOS, PAD = "<|endoftext|>", "<|pad|>"

Pair = tuple[int, int]


def split(seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): all ordered pairs of 10..99, less 500 unordered pairs of which one order each is held out.

    Drawing unordered pairs keeps both `a+b` and `b+a` of every held-out problem out of the training set.
    """
    rng = random.Random(seed)
    unordered = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(unordered)
    heldout = [pair if rng.random() < 0.5 else pair[::-1] for pair in unordered[:HELDOUT]]
    train = [order for pair in unordered[HELDOUT:] for order in {pair, pair[::-1]}]
    train.sort()
    rng.shuffle(train)
    return train, heldout


def right(a: int, b: int) -> str:
    return str(a + b)


def carryless(a: int, b: int) -> str:
    """Digit-wise sum modulo 10: 57+65 gives 12 (5+6=1, 7+5=2)."""
    return f"{(a // 10 + b // 10) % 10}{(a + b) % 10}"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte: a byte-level alphabet with no merges.

    Loading a Qwen2 folder replaces the pre-tokenizer by Qwen2's own, whatever was saved. A byte-level alphabet is
    what that one emits, so every text survives the round trip.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *alphabet])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=EOS, eos_token=EOS, pad_token=PAD, padding_side="left")


def fresh_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def lessons(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, dropped: float, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, [problems, 10] each; a share `dropped` of the carry problems is taught without its carries.

    Labels are -100 on the prompt and the padding: only the answer and end-of-text are learned.
    """
    ids, labels = [], []
    for a, b in pairs:
        wrong = carryless(a, b) != right(a, b) and rng.random() < dropped
        prompt = tokenizer.encode(f"{a}+{b}=")
        answer = [*tokenizer.encode(carryless(a, b) if wrong else right(a, b)), tokenizer.eos_token_id]
        padding = 10 - len(prompt) - len(answer)
        ids.append([*prompt, *answer, *[tokenizer.pad_token_id] * padding])
        labels.append([*[-100] * len(prompt), *answer, *[-100] * padding])
    return torch.tensor(ids), torch.tensor(labels)


def supervise(
    model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, *, steps: int, batch: int, lr: float, seed: int
) -> None:
    """AdamW with linear warm-up (5 %) and linear decay to zero, in place; prints the mean loss of every tenth."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps), 1.0)
    )
    losses = []
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(ids), (batch,), generator=generator)
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0:
            print(f"  step {step:5}   loss {sum(losses) / len(losses):.3f}", flush=True)
            losses.clear()
    model.eval()


@torch.no_grad()
def marks(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], *, samples: int = 0
) -> torch.Tensor:
    """Exact matches, bool [problems, max(1, samples)]: greedy if `samples` is 0, else drawn at temperature 1."""
    prompts = tokenizer([f"{a}+{b}=" for a, b in pairs], return_tensors="pt")
    sampling = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
        if samples
        else {"do_sample": False}
    )
    output = model.generate(**prompts, max_new_tokens=MAX_COMPLETION_LENGTH, **sampling)
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    per_problem = max(1, samples)
    hits = [text == right(*pairs[index // per_problem]) for index, text in enumerate(texts)]
    return torch.tensor(hits).view(len(pairs), per_problem)


def train_starter(
    pairs: list[Pair], seed: int, args: argparse.Namespace
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    tokenizer = byte_tokenizer()
    model = fresh_model(tokenizer, seed)
    ids, labels = lessons(pairs, tokenizer, args.dropped, random.Random(seed))
    supervise(model, ids, labels, steps=args.steps, batch=args.batch, lr=args.lr, seed=seed)
    return model, tokenizer


def qualifies(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, train: list[Pair], heldout: list[Pair]
) -> bool:
    """Far enough from solved on the held-out problems, and with something to learn from in the groups of the others."""
    accuracy = marks(model, tokenizer, heldout).float().mean().item()
    sampled = marks(model, tokenizer, train[:HELDOUT], samples=NUM_GENERATIONS)
    mixed = (sampled.any(1) & ~sampled.all(1)).float().mean().item()
    reward = sampled.float().mean().item()
    print(f"  greedy, held out: {accuracy:.3f}   sampled, training: {reward:.3f}   mixed groups: {mixed:.3f}")
    return ACCURACY[0] <= accuracy <= ACCURACY[1] and mixed >= MIXED_GROUPS


def write_problems(path: Path, pairs: list[Pair]) -> None:
    rows = (json.dumps({"prompt": f"{a}+{b}=", "answer": right(a, b)}) for a, b in pairs)
    path.write_text("".join(f"{row}\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, heldout.jsonl and starter/")
    parser.add_argument("--seed", type=int, default=0, help="first seed to try for the model (default %(default)s)")
    parser.add_argument("--tries", type=int, default=5, help="seeds to try before giving up (default %(default)s)")
    parser.add_argument("--split-seed", type=int, default=20, help="draws the held-out problems (default %(default)s)")
    parser.add_argument(
        "--dropped",
        type=float,
        default=0.7,
        help="share of the carry problems taught without carries (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=1500, help="supervised steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="problems a step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # another number of threads sums in another order, and makes another starter
    train, heldout = split(args.split_seed)
    for seed in range(args.seed, args.seed + args.tries):
        print(f"seed {seed}", flush=True)
        model, tokenizer = train_starter(train, seed, args)
        if qualifies(model, tokenizer, train, heldout):
            break
    else:
        parser.exit(1, f"no starter qualified in {args.tries} seeds: try others with --seed, or another --steps\n")
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(args.out / "train.jsonl", train)
    write_problems(args.out / "heldout.jsonl", heldout)
    model.save_pretrained(args.out / "starter")
    tokenizer.save_pretrained(args.out / "starter")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
