"""A judge of proofs in a process of its own, where what a stranger sent has bounded time and memory."""

import asyncio
import json
import sys
from contextlib import suppress

from hivegrpo.protocol.errors import CommitmentError

JUDGE_SECONDS = 120.0
"""For a proof, the imports included, on a slow machine."""


async def judge_apart(run_id: str, proof: bytes) -> list[tuple[str, str]]:
    """Who is guilty by a proof, and why; CommitmentError if it shows nothing, or cannot be judged."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "hivegrpo.cli.verify_span", run_id),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(JUDGE_SECONDS):
            output, _ = await process.communicate(proof)
    except TimeoutError:
        raise CommitmentError(f"judging it took more than {JUDGE_SECONDS:.0f} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        answer = json.loads(output)
    except ValueError:
        raise CommitmentError(f"the judge ended with {process.returncode}, without an answer") from None
    if process.returncode != 0:
        raise CommitmentError(answer["error"])
    return [(peer, reason) for peer, reason in answer["guilty"]]
