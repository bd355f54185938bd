"""How many threads a peer may use: three peers with default threads on one machine run six to ten times slower."""

import os

import psutil


def fair_threads() -> int:
    """Cores / peers that run on this machine, this one among them; at least 1."""
    return max(1, usable_cores() // max(1, count_peers()))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_peers() -> int:
    """Processes of `hivegrpo peer run`, `hivegrpo solo` and runs of `hivegrpo sweep` that this user can see."""
    return sum(is_peer(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def is_peer(command: list[str]) -> bool:
    """Whether a command line is that of a peer, in a swarm or alone."""
    for place in range(len(command) - 2):
        program = command[place]
        if program == "hivegrpo.cli.main" or program.rpartition("/")[2] == "hivegrpo":
            return command[place + 1 : place + 3] == ["peer", "run"] or command[place + 1] == "solo"
        if program == "hivegrpo.cli.sweep.worker":
            return True
    return False
