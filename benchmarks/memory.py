"""Peak memory of log-probabilities and their backward pass: hivegrpo's against torch's log_softmax.

Each way is measured in a process of its own, as what its peak resident memory is above the moment before: inputs are
there by then, and two tokens have been computed, so that libraries are loaded and threads started. Exits with 0 if
hivegrpo's way needs at most a quarter of the plain one's, with 1 if not.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from hivegrpo.peer.learn.logprobs import hidden_logps, token_logps

BAR = 0.25
SECONDS = 600.0
"""For one way."""


@dataclass(frozen=True)
class Size:
    """What is computed: `rows` completions of `length` tokens."""

    rows: int
    length: int
    vocabulary: int
    width: int
    """Of the hidden states."""


def plain(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """By the book, with nothing kept that is not needed."""
    return torch.nn.functional.linear(hidden, weight).log_softmax(-1).gather(-1, token_ids.unsqueeze(-1))


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return hidden_logps(hidden, weight, None, token_ids, 1.0)[0]


def ours_of_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Where the model makes its logits itself, because more is done to them than the head does."""
    return token_logps(torch.nn.functional.linear(hidden, weight), token_ids, 1.0)[0]


@dataclass(frozen=True)
class Way:
    """One way to compute them, and who trains with it."""

    title: str
    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    trained: bool = False
    """Whether the head gets a gradient."""
    against: str = ""
    """The way it is compared with."""
    barred: bool = False
    """Whether the bar is for it."""


WAYS = {
    "plain": Way("log_softmax of all logits, frozen head", plain),
    "hidden": Way("hivegrpo, frozen head (an adapter is trained)", ours, against="plain", barred=True),
    "plain_trained": Way("log_softmax of all logits, trained head", plain, trained=True),
    "hidden_trained": Way(
        "hivegrpo, trained head (all is trained)", ours, trained=True, against="plain_trained", barred=True
    ),
    "logits": Way("hivegrpo, logits that the model makes itself", ours_of_logits, against="plain"),
}


def peak_above_start(way: Way, size: Size) -> int:
    """Bytes, in this process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size.vocabulary, size.width, generator=generator).requires_grad_(way.trained)
    hidden = torch.randn(size.rows, size.length, size.width, generator=generator).requires_grad_()
    token_ids = torch.randint(size.vocabulary, (size.rows, size.length), generator=generator)
    way.compute(hidden[:1, :2], weight, token_ids[:1, :2]).sum().backward()
    hidden.grad = weight.grad = None
    before = psutil.Process().memory_info().rss
    earlier = peak_bytes()
    way.compute(hidden, weight, token_ids).sum().backward()
    peak = peak_bytes()
    if peak == earlier:
        raise RuntimeError("loading the libraries took more memory than this: measure a larger size")
    return peak - before


def peak_bytes() -> int:
    """The most that was ever resident in this process.

    Linux starts ru_maxrss at what the parent had before this program was executed; VmHWM it does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def measure(name: str, arguments: list[str]) -> int:
    """Bytes, in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--way", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return int(done.stdout)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="completions")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens there are")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--way", choices=WAYS, help="measure only this one, here, and print bytes")
    options = parser.parse_args()
    size = Size(options.rows, options.length, options.vocabulary, options.width)
    if options.way is not None:
        print(peak_above_start(WAYS[options.way], size))
        return 0
    sizes = [f"--{name}={value}" for name, value in vars(size).items()]
    figures = {name: measure(name, sizes) for name in WAYS}
    ratios = {name: figures[name] / figures[way.against] for name, way in WAYS.items() if way.against}
    print(f"{size.rows} x {size.length} tokens of {size.vocabulary:,}, {size.width} wide, float32")
    for name, way in WAYS.items():
        ratio = f"{ratios[name]:8.3f}" if name in ratios else ""
        print(f"{way.title:50}{figures[name] / 2**20:10.0f} MiB{ratio}")
    met = all(ratios[name] <= BAR for name, way in WAYS.items() if way.barred)
    print(f"the bar is {BAR} where hivegrpo makes the logits: {'met' if met else 'NOT met'}")
    if options.json is not None:
        outcome = {"size": vars(size), "bytes": figures, "ratios": ratios, "bar": BAR, "met": met}
        options.json.write_text(json.dumps(outcome, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
