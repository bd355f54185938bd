"""The volunteer's daemon: swarm (network), learn (GRPO), rewards, inference."""
