"""What the system lets this process have."""

import resource
import sys
from contextlib import suppress


def open_files(wanted: int) -> int:
    """How many files this process may have open; first raises the limit towards `wanted`, as far as the system lets it.

    Every socket is a file, and shells give a process 1024 of them, macOS 256.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # a system may have a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
