"""Giving up work half-way: the event loop sets an event, the learning thread looks at it between forward passes."""

import threading


class Cancelled(Exception):
    """The work was given up, and left nothing behind.

    Not concurrent.futures.CancelledError: awaiting an executor turns that one into a cancellation of the awaiting task.
    """


def check(cancelled: threading.Event | None) -> None:
    """Raise Cancelled if the event is set."""
    if cancelled is not None and cancelled.is_set():
        raise Cancelled
