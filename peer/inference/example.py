"""A prompt like those that a run was trained on, to show how its model wants to be asked."""

from hivegrpo.peer.inference.locate import LocalRun
from hivegrpo.peer.learn.data import PROMPT, Prompts
from hivegrpo.peer.swarm.versions import ref_of


def example_prompt(run: LocalRun) -> str | None:
    """Of the run's held-out rows, or of its training rows, if they are here; of messages, the last one's content."""
    manifest = run.chain.manifest.message
    for file in (manifest.evaluation, manifest.dataset):
        if file.name and run.has(ref_of(file.blob)):
            first, _, _ = run.read(ref_of(file.blob), "the dataset").partition(b"\n")
            prompt = Prompts.from_jsonl(first).rows[0][PROMPT]
            return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return None
