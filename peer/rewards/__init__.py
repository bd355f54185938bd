"""Verifiable reward functions, looked up by name among what is installed."""
