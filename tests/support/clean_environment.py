"""An environment that has some distributions of this one, what they require, and nothing else."""

import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_environment(folder: Path, *names: str) -> Path:
    """A venv with links to the distributions and, transitively, to what they require here; its python."""
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    for found in closure(*names).values():
        for name in top_level(found):
            target = Path(str(found.locate_file(name)))
            link = site / name
            if target.exists() and not link.is_symlink():
                link.symlink_to(target)
    return folder / "bin" / Path(sys.executable).name


def closure(*names: str) -> dict[str, Distribution]:
    """Installed distributions by name: those named, and what they require without extras, on this platform."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = distribution(name)
        requirements = map(Requirement, found[name].requires or [])
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def top_level(found: Distribution) -> set[str]:
    """Files and folders that it has in site-packages, beside byte code and what acts on start-up."""
    names = {file.parts[0] for file in found.files or ()}
    return {name for name in names if name not in ("..", "__pycache__") and not name.endswith(".pth")}
