"""Deterministic simulation: the real coordinator's state machine, and any number of peers that hold no model."""
