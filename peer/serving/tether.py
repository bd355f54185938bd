"""Run a command that the kernel kills when its parent dies, however that happens. Linux; elsewhere it is just run.

    python -m hivegrpo.peer.serving.tether PARENT COMMAND...

PARENT is the parent's process id: if it is gone already, nothing is run.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl(2); it outlives execve, and belongs to the parent's thread that forked."""


def main(parent: int, command: list[str]) -> None:
    """Never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - no shell


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
