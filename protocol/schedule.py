"""The learning rate of each optimizer step, as transformers' schedulers of the same names have it."""

import math

from hivegrpo.protocol.config import OptimizerSection


def learning_rate(step: int, versions: int, optimizer: OptimizerSection) -> float:
    """Rate of optimizer step `step` (the first is 1) of a run of `versions` steps.

    With k = step - 1, w warm-up steps and p = (k - w) / (versions - w): k / w of the peak while k < w; then 1
    (constant), 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine) of it.
    """
    assert 1 <= step <= versions
    done = step - 1
    if done < optimizer.warmup_steps:
        return optimizer.learning_rate * done / optimizer.warmup_steps
    progress = (done - optimizer.warmup_steps) / (versions - optimizer.warmup_steps)
    match optimizer.lr_scheduler_type:
        case "constant":
            return optimizer.learning_rate
        case "linear":
            return optimizer.learning_rate * (1.0 - progress)
        case "cosine":
            return optimizer.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
