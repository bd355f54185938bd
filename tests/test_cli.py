"""The command line: what it costs to ask for help, and what the user's mistakes lead to."""

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import click
import pytest
import typer
from support.processes import ADDITION

from hivegrpo.cli import coordinator_home
from hivegrpo.cli.coordinator_home import CONFIG_FILE, find_unfinished, open_home
from hivegrpo.cli.main import app, main
from hivegrpo.cli.network import best_first, kept_port
from hivegrpo.cli.output import short_lines
from hivegrpo.cli.threads import count_peers, fair_threads, is_peer, usable_cores
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import RUN_FILE
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import run_id_of, sign
from hivegrpo.protocol.errors import BusyError, ConfigError, HiveError, UnreachableError
from hivegrpo.protocol.homes import locked_home
from hivegrpo.protocol.identity import Identity

HELP_SECONDS = 1.0
HEAVY = ("torch", "transformers", "hivemind", "peft", "datasets", "matplotlib")


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group, as one types it."""
    yield path
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


EVERY = list(commands(typer.main.get_command(app)))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hivegrpo.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_the_commands_are_those_of_the_manual() -> None:
    assert {" ".join(path) for path in EVERY} == {
        "", "coordinator", "coordinator run", "coordinator succeed", "coordinator status", "coordinator pause",
        "coordinator resume", "coordinator promote-reference", "coordinator rollback", "coordinator ban",
        "coordinator unban", "coordinator invite", "coordinator revoke", "coordinator verify", "peer", "peer run",
        "run-key", "run-key create", "run-key sign", "solo", "demo", "chat", "export", "check", "verify-span", "watch",
        "simulate", "cost", "evaluate", "serve", "sweep"
    }  # fmt: skip


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_is_quick_and_imports_nothing_heavy(path: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom hivegrpo.cli.main import main\n"
        f"sys.argv = ['hivegrpo', *{list(path)!r}, '--help']\n"
        "try:\n    main()\nfinally:\n"
        f"    heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "    assert not heavy, f'--help imports {heavy}'\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "Usage: hivegrpo" in done.stdout
    # Time on the processor, which is what it takes on an idle machine; other tests may keep this one busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < HELP_SECONDS


def test_version_is_the_installed_one() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, version("hivegrpo"))


@pytest.mark.parametrize("arguments", [("frobnicate",), ("peer", "run"), ("peer", "run", "x", "--port", "many"), ()])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).returncode == 2


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and the one paragraph of a command that fails before it starts anything."""
    monkeypatch.setattr(sys, "argv", ["hivegrpo", *arguments])
    monkeypatch.setattr("hivegrpo.cli.signals.signal.signal", lambda number, handler: None)
    monkeypatch.setattr("hivegrpo.cli.output.structlog.configure", lambda **settings: None)
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.strip().count("\n") == 0
    assert isinstance(ended.value.code, int)
    return ended.value.code, err


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A run.toml like the demo's, beside what it names."""
    text = (ADDITION / "run.toml").read_text()
    for name in ("starter", "train.jsonl", "heldout.jsonl"):
        (tmp_path / name).symlink_to(ADDITION / name)
    (tmp_path / "run.toml").write_text(text)
    return tmp_path / "run.toml"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("versions", "version"), 'did you mean "versions"?'),
        (("[grpo]", "[gpro]"), 'did you mean "grpo"?'),
        (("versions = ", "versions = -"), "[run] versions"),
        (('path = "train.jsonl"', 'path = "gone.jsonl"'), "gone.jsonl"),
        (('path = "starter"', 'path = "gone"'), "There is no model in"),
        (('functions = ["exact_match"]', 'functions = ["exact"]'), "exact_match"),
        (('path = "train.jsonl"', 'path = "train.jsonl"\nanswer_column = "solution"'), 'no column "solution"'),
        (("[run]", "[run"), "not valid TOML"),
    ],
    ids=["key", "section", "value", "dataset", "model", "reward", "column", "toml"],
)
def test_a_wrong_run_toml_is_explained(
    change: tuple[str, str],
    says: str,
    toml: Path,
    state: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = toml.read_text()
    assert change[0] in text
    toml.write_text(text.replace(*change, 1))
    code, paragraph = fails(capsys, monkeypatch, "coordinator", "run", "--config", str(toml))
    assert code == 78
    assert says in paragraph
    assert [path.name for path in state.glob("runs/*")] == []


def test_a_missing_run_toml_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, paragraph = fails(capsys, monkeypatch, "coordinator", "run", "--config", "gone.toml")
    assert code == 78
    assert "gone.toml" in paragraph


@pytest.mark.parametrize("address", ["127.0.0.1:4001", "/ip4/127.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/0/p2p/Qm"])
def test_a_wrong_address_is_explained(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, paragraph = fails(capsys, monkeypatch, "peer", "run", address)
    assert code == 78
    assert "is not a node's address" in paragraph


@pytest.mark.parametrize("flags", [("--port", "70000"), ("--device", "abacus"), ("--threads", "0")])
def test_a_wrong_setting_is_explained(
    flags: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"/ip4/127.0.0.1/tcp/4001/p2p/{Identity.generate().peer_id}"
    code, paragraph = fails(capsys, monkeypatch, "peer", "run", address, *flags)
    assert code == 78
    assert flags[0].removeprefix("--") in paragraph


def test_a_demo_with_too_few_peers_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, paragraph = fails(capsys, monkeypatch, "demo", "--peers", "1")
    assert code == 78
    assert "--peers 3" in paragraph


@pytest.mark.parametrize("command", ["check", "chat"])
def test_a_folder_without_a_run_is_explained(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, paragraph = fails(capsys, monkeypatch, command, str(tmp_path))
    assert code == 78
    assert str(tmp_path) in paragraph


def test_errors_keep_their_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Path | None) -> None:
        raise UnreachableError("Nobody answers.", "Ask again.")

    monkeypatch.setattr("hivegrpo.cli.check_run.check_run", fail)
    assert fails(capsys, monkeypatch, "check") == (69, "Error: Nobody answers. Ask again.\n")


def test_an_error_with_a_stranger_s_words_is_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Path | None) -> None:
        raise UnreachableError("It says \x1b]0;owned\x07.", "Ask\u202e again.")

    monkeypatch.setattr("hivegrpo.cli.check_run.check_run", fail)
    assert fails(capsys, monkeypatch, "check") == (69, "Error: It says ?]0;owned?. Ask? again.\n")


def test_short_lines_with_a_stranger_s_words_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    short_lines(lambda record: ("serving", f"Version {record['version']} is served."))({"version": "1\x1b[2J"})
    assert capsys.readouterr().err == "Version 1?[2J is served.\n"


# Homes of a coordinator. What a run is made of is not prepared here: tests of the launch do that.


@pytest.fixture
def config(toml: Path) -> RunConfig:
    return RunConfig.load(toml)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is a signed manifest and nothing else."""

    def prepare_run(config: RunConfig, identity: Identity, store: BlobStore) -> pb.Signed:
        manifest = pb.RunManifest(coordinator=identity.peer_id, config=config.canonical_json(), nonce=os.urandom(16))
        return sign(identity, run_id_of(manifest.SerializeToString(deterministic=True)), manifest)

    monkeypatch.setattr("hivegrpo.cli.prepare.prepare_run", prepare_run)


@contextmanager
def opened(config: RunConfig, home: Path | None = None, new: bool = False) -> Iterator[Path]:
    with open_home(config, home, new=new) as root:
        yield root


@pytest.mark.usefixtures("quick")
def test_an_unfinished_run_of_the_same_config_goes_on(config: RunConfig, state: Path) -> None:
    with opened(config) as first:
        assert first.parent.parent == state / "runs"
        assert first.name == "coordinator"
    with opened(config) as again:
        assert again == first
    with opened(config, new=True) as second:
        assert second != first
    other = config.model_copy(update={"run": config.run.model_copy(update={"versions": 7})})
    with opened(other) as third:
        assert third not in (first, second)
    assert len(list(state.glob("runs/*/coordinator"))) == 3
    assert list(state.glob(".*")) == []


@pytest.mark.usefixtures("quick", "state")
def test_the_newest_of_several_unfinished_runs_goes_on(config: RunConfig) -> None:
    with opened(config) as first, opened(config, new=True) as second:
        pass
    os.utime(first / RUN_FILE, (2e9, 2e9))
    assert find_unfinished(config) == first
    os.utime(second / RUN_FILE, (3e9, 3e9))
    assert find_unfinished(config) == second


@pytest.mark.usefixtures("quick", "state")
def test_a_finished_run_does_not_go_on(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(config) as home:
        pass
    entries = config.run.versions  # without the last version: version 0 is one of them
    monkeypatch.setattr(coordinator_home, "count_entries", lambda _: entries)
    assert find_unfinished(config) == home
    entries += 1
    assert find_unfinished(config) is None


@pytest.mark.usefixtures("quick", "state")
def test_a_given_home_keeps_its_run(config: RunConfig, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with opened(config, home) as root:
        assert root == home
        manifest = (home / RUN_FILE).read_bytes()
    with opened(config, home):
        assert (home / RUN_FILE).read_bytes() == manifest
    with pytest.raises(ConfigError, match="holds a run already"), opened(config, home, new=True):
        pass
    (home / CONFIG_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="other settings"), opened(config, home):
        pass


@pytest.mark.usefixtures("quick", "state")
def test_a_home_in_use_is_refused(config: RunConfig) -> None:
    with opened(config), pytest.raises(BusyError, match="in use"), opened(config):
        pass


@pytest.mark.usefixtures("state")
def test_a_run_that_cannot_be_prepared_leaves_nothing(
    config: RunConfig, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_run(config: RunConfig, identity: Identity, store: BlobStore) -> pb.Signed:
        raise UnreachableError("The hub does not answer.")

    monkeypatch.setattr("hivegrpo.cli.prepare.prepare_run", prepare_run)
    with pytest.raises(UnreachableError), opened(config):
        pass
    assert list(state.iterdir()) == []


def test_a_home_stays_locked_only_while_it_is_open(tmp_path: Path) -> None:
    with locked_home(tmp_path), pytest.raises(HiveError), locked_home(tmp_path):
        pass
    with locked_home(tmp_path):
        pass


@pytest.mark.parametrize(("text", "port"), [("4001", 4001), ("4001\n", 4001), ("", 0), ("99999", 0), ("x", 0)])
def test_the_port_is_kept(tmp_path: Path, text: str, port: int) -> None:
    assert kept_port(tmp_path) == 0
    (tmp_path / "port").write_text(text)
    assert kept_port(tmp_path) == port


def test_the_address_to_paste_is_one_that_others_can_dial() -> None:
    loopback, loopback6 = "/ip4/127.0.0.1/tcp/1/p2p/a", "/ip6/::1/tcp/1/p2p/a"
    lan, lan6 = "/ip4/192.168.0.7/tcp/1/p2p/a", "/ip6/fd00::7/tcp/1/p2p/a"
    assert best_first([loopback6, lan6, loopback, lan]) == [lan, lan6, loopback, loopback6]


def test_a_peer_is_known_by_its_command_line() -> None:
    assert is_peer(["/usr/bin/python3", "/home/ann/.venv/bin/hivegrpo", "peer", "run", "/ip4/..."])
    assert is_peer([sys.executable, "-m", "hivegrpo.cli.main", "peer", "run", "/ip4/..."])
    assert not is_peer([sys.executable, "-m", "hivegrpo.cli.main", "coordinator", "run"])
    assert not is_peer(["vim", "hivegrpo", "peer"])
    assert not is_peer([])


def test_peers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_peers() >= 0
    monkeypatch.setattr("hivegrpo.cli.threads.usable_cores", lambda: 8)
    for peers, threads in ((0, 8), (1, 8), (3, 2), (20, 1)):
        monkeypatch.setattr("hivegrpo.cli.threads.count_peers", lambda peers=peers: peers)
        assert fair_threads() == threads
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.slow
def test_an_unreachable_coordinator_is_explained(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}"
    done = run("peer", "run", address, "--host", "127.0.0.1", "--home", str(tmp_path / "home"))
    assert done.returncode == 69, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: Nobody answers at")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_coordinator_keeps_run_and_port_and_stops_when_nobody_listens(toml: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    arguments = ("coordinator", "run", "--config", str(toml), "--home", home, "--host", "127.0.0.1", "--json")
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        busy = run(*arguments, "--port", str(port))
        assert busy.returncode == 75, busy.stderr
        assert str(port) in busy.stderr

    run_ids = set()
    for flags in (("--port", str(port)), ()):
        command = [sys.executable, "-m", "hivegrpo.cli.main", *arguments, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        started = json.loads(process.stdout.readline())
        assert started["kind"] == "started"
        assert f"/tcp/{port}/p2p/" in started["address"]
        run_ids.add(started["run_id"])
        process.stdout.close()
        assert process.wait(60) == 0, process.stderr.read()
        process.stderr.close()
    assert len(run_ids) == 1
