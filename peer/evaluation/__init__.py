"""How well a model solves problems: pass@k and maj@k with intervals, and what of it could be memory."""
