"""Which policy version is the KL reference."""

from hivegrpo.protocol.config import GrpoSection


def reference_of(version: int, before: int, grpo: GrpoSection) -> int:
    """The reference of what is sampled under a version: itself every so many versions, else that of the one before."""
    every = grpo.ref_model_sync_steps
    return version if every is not None and version > 0 and version % every == 0 else before
