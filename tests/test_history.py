from pathlib import Path

import pytest

from hivegrpo.protocol.history import History, read_history


def test_records_come_back_in_order(tmp_path: Path) -> None:
    history = History(tmp_path / "home" / "history.jsonl")
    history.record("vote", version=1, state_root=b"\x01\xff")
    history.record("version", version=1)
    assert list(read_history(tmp_path / "home" / "history.jsonl")) == [
        {"kind": "vote", "version": 1, "state_root": "01ff"},
        {"kind": "version", "version": 1},
    ]
    history.close()


def test_a_home_without_history_has_no_records(tmp_path: Path) -> None:
    assert list(read_history(tmp_path / "history.jsonl")) == []


@pytest.mark.parametrize("torn", [b'{"kind":"vo', b"{"])
def test_a_line_that_a_crash_cut_short_is_left_out_and_then_overwritten(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"kind":"vote"}\n' + torn)
    assert [record["kind"] for record in read_history(path)] == ["vote"]
    history = History(path)
    history.record("version")
    history.close()
    assert [record["kind"] for record in read_history(path)] == ["vote", "version"]


def test_what_is_not_json_is_our_own_mistake(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    with pytest.raises(TypeError):
        history.record("vote", version={1, 2})
    history.close()
