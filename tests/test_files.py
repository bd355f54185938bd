"""Files that are written whole: their permissions, and what is left of one that could not be written."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hivegrpo.protocol.files import write_whole


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("mode", [0o644, 0o600], ids=oct)
def test_a_file_has_its_mode_less_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        write_whole(path, content, mode)
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask
    write_whole(tmp_path / "default", b"")
    assert stat.S_IMODE((tmp_path / "default").stat().st_mode) == 0o644 & ~umask


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "folder", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
