"""GRPO: data, sampling, advantages, losses, the gradient, the canonical step."""
