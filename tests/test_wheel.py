"""The wheel holds exactly what the tree holds: an editable install would not notice a missing subpackage."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "coordinator", "peer", "protocol")


def tree() -> list[str]:
    """Files that are in the repository, or would be after `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return sorted(name for name in names.split("\0") if name and (ROOT / name).is_file())


def test_the_wheel_holds_what_the_tree_holds(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in tree():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = tmp_path.glob("hivegrpo-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"hivegrpo/{name}" for name in tree() if name.split("/")[0] in PACKAGES}
    assert packed == expected
