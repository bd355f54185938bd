"""Which engine answers; what happens when one is replaced, fails to start, or is lost; and the processes."""

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from support.beds import within
from support.programs import gone
from support.serving import NAME, Script, client_of, fake_engine, listening, write_folder

from hivegrpo.cli import launch_serve as launch_module
from hivegrpo.cli.launch_serve import launch
from hivegrpo.peer.serving import engine as engine_module
from hivegrpo.peer.serving import engines as engines_module
from hivegrpo.peer.serving import process as process_module
from hivegrpo.peer.serving import releases as releases_module
from hivegrpo.peer.serving import source as source_module
from hivegrpo.peer.serving.app import Rules, build_app
from hivegrpo.peer.serving.dialects import Transformers, choose_dialect, engine_environment
from hivegrpo.peer.serving.engine import Engine, Launcher
from hivegrpo.peer.serving.engines import MAX_RESTARTS, Engines
from hivegrpo.peer.serving.process import Process
from hivegrpo.peer.serving.prompts import Encoded, PromptReader
from hivegrpo.peer.serving.refusals import Refusal
from hivegrpo.peer.serving.releases import Release, folder_release, held, prune
from hivegrpo.peer.serving.sampling import Defaults, Sampling
from hivegrpo.peer.serving.settings import ServeConfig
from hivegrpo.peer.serving.source import MAX_TRIES, Source
from hivegrpo.protocol.errors import ChainError, ConfigError, HiveError, UnreachableError

Record = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("exported"), template=None)


@pytest.fixture(scope="module")
def reader(folder: Path) -> Iterator[PromptReader]:
    reader = PromptReader.open(folder)
    yield reader
    reader.close()


class Fleet:
    """Engines with fake processes: `engines.switch` starts them from scripts, by version."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.scripts: dict[str, Script] = {}
        self.started: list[Engine] = []
        self.failing: set[str] = set()
        self.told: list[Record] = []
        self.engines = Engines(self._start, self.told.append, backoff=0.001)
        self._stack = stack

    def release(self, version: str) -> Release:
        return Release(self.folder, NAME, version)

    async def _start(self, release: Release) -> Engine:
        if release.version in self.failing:
            raise HiveError("It does not start.")
        script = self.scripts.setdefault(release.version, Script(pieces=(release.version,)))
        reader = PromptReader.open(self.folder)  # it ends with its engine
        engine = await self._stack.enter_async_context(fake_engine(self.folder, reader, script, release.version))
        self.started.append(engine)
        return engine

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.told]


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[tuple[Fleet, openai.AsyncOpenAI]]:
    async with AsyncExitStack() as stack:
        fleet = Fleet(folder, stack)
        app = build_app(fleet.engines, Rules((NAME,), None, 1000, 4096))
        url = await stack.enter_async_context(listening(app))
        client = await stack.enter_async_context(client_of(url))
        try:
            yield fleet, client
        finally:
            await fleet.engines.close()


def test_a_switch_under_load_loses_no_request(folder: Path) -> None:
    """Requests that the old engine has are answered by it, also those that wait for their turn; then it ends."""

    async def switch() -> None:
        async with fleet(folder) as (here, client):
            here.scripts["1"] = Script(pieces=("old",), hold_after=0)
            await here.engines.switch(here.release("1"))
            old = here.started[0]
            early = [asyncio.create_task(client.completions.create(model=NAME, prompt="x")) for _ in range(5)]
            await within(lambda: old._requests == 5)
            await here.engines.switch(here.release("2"))
            late = await asyncio.gather(*(client.completions.create(model=NAME, prompt="x") for _ in range(5)))
            assert {answer.choices[0].text for answer in late} == {"2"}
            assert old.child.running
            here.scripts["1"].go.set()
            answers = await asyncio.gather(*early)
            assert {(answer.choices[0].text, answer.system_fingerprint) for answer in answers} == {("old", "tiny@1")}
            await old.child.ended()
            await within(lambda: here.kinds() == ["serving", "serving", "drained"])
            assert here.told[-1]["done"]
            assert here.started[1].child.running

    asyncio.run(switch())


def test_an_engine_that_never_drains_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_module, "DRAIN_SECONDS", 0.01)

    async def switch() -> None:
        async with fleet(folder) as (here, client):
            here.scripts["1"] = Script(hold_after=0)
            await here.engines.switch(here.release("1"))
            ask = asyncio.create_task(client.completions.create(model=NAME, prompt="x"))
            await within(lambda: here.started[0]._requests == 1)
            await here.engines.switch(here.release("2"))
            await here.started[0].child.ended()
            assert not here.told[-1]["done"]
            with pytest.raises(openai.InternalServerError):
                await ask

    asyncio.run(switch())


def test_a_release_that_does_not_start_leaves_the_one_before(folder: Path) -> None:
    async def switch() -> None:
        async with fleet(folder) as (here, client):
            await here.engines.switch(here.release("1"))
            here.failing.add("2")
            with pytest.raises(HiveError):
                await here.engines.switch(here.release("2"))
            assert (await client.completions.create(model=NAME, prompt="x")).choices[0].text == "1"
            assert here.started[0].child.running

    asyncio.run(switch())


def test_a_lost_engine_is_started_again_and_meanwhile_missed(folder: Path) -> None:
    async def lose() -> None:
        async with fleet(folder) as (here, client):
            await here.engines.switch(here.release("1"))
            here.failing.add("1")
            await here.started[0].child.stop()
            await within(lambda: "trouble" in here.kinds())
            with pytest.raises(openai.InternalServerError) as missed:
                await client.completions.create(model=NAME, prompt="x")
            assert missed.value.response.headers["retry-after"]
            here.failing.clear()
            await within(lambda: here.kinds()[-1] == "serving")
            assert (await client.completions.create(model=NAME, prompt="x")).choices[0].text == "1"
            assert [record["said"] for record in here.told if record["kind"] == "lost"] == [
                here.started[0].child.said()
            ]

    asyncio.run(lose())


def test_an_engine_that_is_lost_again_and_again_is_given_up(folder: Path) -> None:
    async def lose() -> None:
        async with fleet(folder) as (here, _):
            await here.engines.switch(here.release("1"))
            failed = asyncio.create_task(here.engines.failed())
            for number in range(MAX_RESTARTS + 1):
                await within(lambda number=number: len(here.started) == number + 1)
                await within(lambda: here.kinds()[-1] == "serving")
                await here.started[-1].child.stop()
                await within(lambda number=number: here.kinds().count("lost") == number + 1)
            with pytest.raises(HiveError, match="lost 6 times"):
                await failed

    asyncio.run(lose())


class Told:
    """Stands in for `Engines`: takes releases, and fails for some."""

    def __init__(self, failures: int = 0) -> None:
        self.releases: list[Release] = []
        self.failures = failures
        self.tries = 0

    async def switch(self, release: Release) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise HiveError("No memory.")
        self.releases.append(release)


def source_of(monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[Source, list[Record]]:
    """A source whose process is a small program; its waits take no time."""
    monkeypatch.setattr(source_module, "RETRY_SECONDS", 0.001)
    told: list[Record] = []
    source = Source("run", "latest", 1.0, told.append)
    source._command = [sys.executable, "-c", f"import json, sys, time\n{code}"]
    return source, told


def says(version: int) -> str:
    record = {"folder": "/x", "name": NAME, "version": str(version)}
    return f"print({json.dumps(record)!r}, flush=True)\n"


WAIT = "time.sleep(1000)\n"


def test_newer_releases_are_switched_to_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow() -> None:
        source, told = source_of(monkeypatch, f"{says(1)}print('noise')\n{says(2)}{WAIT}")
        try:
            assert (await source.first()).version == "1"
            engines = Told(failures=2)
            following = asyncio.create_task(source.follow(engines))
            await within(lambda: engines.releases != [])
            assert engines.releases == [Release(Path("/x"), NAME, "2")]
            assert ["No memory" in record["message"] for record in told] == [True, True]
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        finally:
            await source.close()

    asyncio.run(follow())


def test_a_release_is_tried_so_often_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow() -> None:
        source, told = source_of(monkeypatch, f"{says(1)}{says(2)}{WAIT}")
        try:
            await source.first()
            engines = Told(failures=100)
            following = asyncio.create_task(source.follow(engines))
            await within(lambda: len(told) == MAX_TRIES)
            await asyncio.sleep(0.1)  # nothing can tell of a try that does not come
            assert engines.tries == MAX_TRIES
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        finally:
            await source.close()

    asyncio.run(follow())


def test_a_switch_that_breaks_otherwise_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would be followed any more, and nothing would say so."""

    class Broken(Told):
        async def switch(self, release: Release) -> None:
            raise LookupError("nobody thought of this")

    async def follow() -> None:
        source, _ = source_of(monkeypatch, f"{says(1)}{says(2)}{WAIT}")
        try:
            await source.first()
            async with asyncio.timeout(10):
                with pytest.raises(LookupError, match="nobody thought"):
                    await source.follow(Broken())
        finally:
            await source.close()

    asyncio.run(follow())


def test_an_export_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow() -> None:
        source, told = source_of(monkeypatch, "")
        source._command = ["\0"]
        following = asyncio.create_task(source.follow(Told()))
        await within(lambda: told != [] and "no longer" in told[-1]["message"])
        assert ["The export failed" in record["message"] for record in told[:-1]] == [True] * source_module.MAX_STARTS
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(follow())


@pytest.mark.parametrize(
    ("name", "text"), [("config.json", "[]"), ("config.json", None), ("generation_config.json", "[]")]
)
def test_a_folder_that_is_no_model_is_said_and_leaves_nothing(tmp_path: Path, name: str, text: str | None) -> None:
    broken = write_folder(tmp_path / "broken", template=None)
    (broken / name).unlink(missing_ok=True)
    if text is not None:
        (broken / name).write_text(text)

    class Late(Transformers):
        def command(self, port: int) -> list[str]:
            return ["sleep", "1000"]

    async def start() -> None:
        with pytest.raises(HiveError):
            await Launcher(Late("cpu"))(Release(broken, NAME, "1"))

    asyncio.run(start())
    assert not process_module._alive
    prune(tmp_path, tmp_path / "other")
    assert not broken.exists()  # nobody holds it


def test_an_export_that_fails_at_first_ends_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        record = {"error": "The run is not here.", "hint": "Name another.", "exit_code": 78}
        source, _ = source_of(monkeypatch, f"print({json.dumps(record)!r})\nsys.exit(78)")
        with pytest.raises(HiveError, match=r"The run is not here\. Name another\.") as failed:
            await source.first()
        assert failed.value.exit_code == 78
        broken, _ = source_of(monkeypatch, "raise SystemError('broken')")
        with pytest.raises(HiveError, match="broken"):
            await broken.first()

    asyncio.run(fail())


def test_an_export_that_ends_is_started_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow() -> None:
        source, told = source_of(monkeypatch, says(1))
        await source.first()
        following = asyncio.create_task(source.follow(Told()))
        await within(lambda: told != [] and "no longer" in told[-1]["message"])
        assert len(told) == source_module.MAX_STARTS + 1
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await source.close()

    asyncio.run(follow())


def test_a_run_that_is_not_reached_is_looked_for_again_and_what_is_broken_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = iter(
        [Release(folder, NAME, "1"), *[UnreachableError("Nobody answers.")] * 50, Release(folder, NAME, "2")]
        + [ChainError("It is forged.")] * releases_module.MAX_FAILURES
    )

    def export(run: str, revision: str) -> Release:
        outcome = next(outcomes)
        if isinstance(outcome, HiveError):
            raise outcome
        return outcome

    monkeypatch.setattr(releases_module, "export_release", export)
    monkeypatch.setattr(releases_module.time, "sleep", lambda seconds: None)
    assert releases_module.main("run", "latest", "60") == ChainError.exit_code
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.get("version", record.get("error")) for record in told] == [
        "1", "Nobody answers.", "2", "It is forged."
    ]  # fmt: skip


def test_what_is_held_is_not_pruned(tmp_path: Path) -> None:
    for name in ("1", "2", "3", ".4.half"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    os.utime(tmp_path / ".4.half", (0, 0))
    with held(tmp_path / "1"):
        prune(tmp_path, tmp_path / "3")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    prune(tmp_path, tmp_path / "3")
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    with pytest.raises(ConfigError):
        held(tmp_path / "1").__enter__()


def fails(monkeypatch: pytest.MonkeyPatch, run: str | None, revision: str = "latest", **flags: object) -> HiveError:
    """How a command that fails before it starts anything ends."""
    monkeypatch.setattr("hivegrpo.cli.signals.signal.signal", lambda number, handler: None)
    monkeypatch.setattr("hivegrpo.cli.output.structlog.configure", lambda **settings: None)
    with pytest.raises(HiveError) as failed:
        launch(run, flags, revision=revision, as_json=True, verbose=False)
    return failed.value


def test_what_cannot_be_followed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, revision in ((str(folder), "latest"), ("/ip4/127.0.0.1", "3")):
        error = fails(monkeypatch, run, revision, follow=5.0)
        assert (error.exit_code, "--follow" in str(error)) == (78, True)


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = fails(monkeypatch, str(folder), port=taken.getsockname()[1])
    assert (error.exit_code, "--port" in str(error)) == (75, True)


@pytest.mark.parametrize(
    ("before", "raised", "connections"),
    [
        ((1024, 1 << 20), 4352, 4096),
        ((1024, resource.RLIM_INFINITY), 4352, 4096),
        ((1024, 2048), 2048, 1792),
        ((256, 256), 256, 128),
        ((1 << 16, 1 << 20), None, 4096),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 4096),
    ],
)
def test_connections_leave_files_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], raised: int | None, connections: int
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: before)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: calls.append(limits))
    assert launch_module._most_connections() == connections
    assert calls == ([] if raised is None else [(raised, before[1])])


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the platform has no such limit")
def test_a_reader_that_stops_reading_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends it: the connection of an answer that is given up stays until all is sent."""
    monkeypatch.setattr(launch_module, "SEND_SECONDS", 0.2)

    async def stall() -> None:
        with launch_module._listening("127.0.0.1", 0) as listener:
            lost = asyncio.Event()

            async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"x" * (64 << 20))
                try:
                    await writer.wait_closed()
                except TimeoutError:
                    lost.set()

            server = await asyncio.start_server(answer, sock=listener)
            with socket.socket() as reader:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reader.connect(listener.getsockname())
                async with asyncio.timeout(30):
                    await lost.wait()
            server.close()

    asyncio.run(stall())


def test_a_folder_of_another_version_is_not_served(tmp_path: Path) -> None:
    write_plain(tmp_path)
    (tmp_path / "hivegrpo.json").write_text('{"format": 1, "run": "addition", "version": 7}')
    assert folder_release(tmp_path) == Release(tmp_path, "addition", "7")
    assert folder_release(tmp_path, "7").version == "7"
    with pytest.raises(ConfigError, match="holds one version: 7"):
        folder_release(tmp_path, "8")


def write_plain(folder: Path) -> Path:
    write_folder(folder)
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pytorch_model.bin", ""),
        ("model.pt", ""),
        ("model.pth", ""),
        ("adapter_config.json", "{}"),
        ("model.safetensors", None),
        ("config.json", '{"model_type": "qwen2", "architectures": ["CLIPModel"]}'),
        ("config.json", '{"model_type": "qwen2"}'),
        ("config.json", '{"model_type": "clip", "architectures": ["Qwen2ForCausalLM"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": "weights.dat"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": "../model.safetensors"}}'),
        ("model.safetensors.index.json", "[" * 100_000),
    ],
)
def test_only_plain_weights_of_a_built_in_model_are_served(tmp_path: Path, name: str, text: str | None) -> None:
    """`transformers serve` would load the rest: pickles, and what an adapter names."""
    folder = write_plain(tmp_path)
    assert folder_release(folder).folder == folder
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ConfigError):
        folder_release(folder)


LISTENING = (
    "import http.server, sys\n"
    "class Handler(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200), self.end_headers()\n"
    "    def do_POST(self):\n"
    "        self.send_response(200), self.send_header('content-type', 'text/event-stream'), self.end_headers()\n"
    '        self.wfile.write(b\'data: {"choices": [{"text": "x", "finish_reason": "stop"}]}\\n\\n\')\n'
    "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
)
STUBBORN = (
    "import os, signal, subprocess, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen(['sleep', '1000'])\n"
    "print(os.getpid(), child.pid, flush=True)\n"
    "while True:\n    time.sleep(1)\n"
)


def test_a_process_that_stays_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivegrpo.peer.serving.process.GRACEFUL_SECONDS", 0.05)

    async def stop() -> list[int]:
        command = [sys.executable, "-c", STUBBORN]
        process = await Process.start(command, folder=tmp_path, environment=os.environ, records=True)
        pids = [int(word) for word in (await anext(process.lines())).split()]
        assert pids[0] == process.pid
        await process.stop()
        return pids

    assert gone(asyncio.run(stop()), 5.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_process_does_not_outlive_the_one_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys\nfrom pathlib import Path\nfrom hivegrpo.peer.serving.process import Process\n"
        "async def main():\n"
        "    command = ['sh', '-c', 'echo here; exec sleep 1000']\n"
        "    process = await Process.start(command, folder=Path('.'), environment=os.environ, records=True)\n"
        "    await anext(process.lines())\n"
        "    print(process.pid, flush=True)\n"
        "    await process.ended()\n"
        "asyncio.run(main())\n"
    )

    async def kill() -> int:
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=tmp_path
        )
        assert parent.stdout is not None
        child = int(await parent.stdout.readline())
        assert not gone([child])
        parent.send_signal(signal.SIGKILL)
        await parent.wait()
        return child

    assert gone([asyncio.run(kill())], 10.0)


def test_an_engine_that_ends_while_it_starts_says_why(folder: Path) -> None:
    class Broken(Transformers):
        def command(self, port: int) -> list[str]:
            return [sys.executable, "-c", "raise SystemExit('no such device')"]

    async def start() -> None:
        with pytest.raises(HiveError, match="no such device"):
            await Launcher(Broken("cpu"))(Release(folder, NAME, "1"))

    asyncio.run(start())


def test_a_port_that_somebody_else_took_gets_no_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine sleeps; at its port this process answers, whose first two ports are taken so."""

    class Late(Transformers):
        def command(self, port: int) -> list[str]:
            return ["sleep", "1000"]

    async def start() -> None:
        script = Script()
        async with listening(script.app()) as url:
            ports = iter([int(url.rpartition(":")[2])] * 2)
            monkeypatch.setattr(engine_module, "_free_port", lambda: next(ports))
            with pytest.raises(HiveError, match="took the engine's port"):
                await Launcher(Late("cpu"))(Release(folder, NAME, "1"))
        assert next(ports, None) is None  # it has tried all of them
        assert script.requests == []

    monkeypatch.setattr(engine_module, "MAX_PORTS", 2)
    asyncio.run(start())


def test_an_engine_at_its_own_port_is_asked(folder: Path) -> None:
    class Small(Transformers):
        def command(self, port: int) -> list[str]:
            return [sys.executable, "-c", LISTENING, str(port)]

    async def start() -> None:
        engine = await Launcher(Small("cpu"))(Release(folder, NAME, "1"))
        assert engine.child.running
        await engine.close()

    asyncio.run(start())


def test_transformers_gets_the_whole_sampling_and_greedy_has_none() -> None:
    """Its own rule ignores a temperature unless the model's file samples, and adds a top_k of 50 to it."""
    defaults = Defaults(1.0, 1.0, {"eos_token_id": [1, 2]})
    prompt = Encoded("x", [5])
    sampled = Transformers("cpu").payload(prompt, Sampling(9, 0.5, 0.8, 3), defaults)
    expected = {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 0, "eos_token_id": [1, 2]}
    assert json.loads(sampled["generation_config"]) == {**expected, "max_new_tokens": 9}
    greedy = json.loads(Transformers("cpu").payload(prompt, Sampling(9, 0.0, 0.8, 3), defaults)["generation_config"])
    assert greedy["do_sample"] is False
    assert greedy.get("temperature") is None


@pytest.mark.parametrize("name", ["HIVEGRPO_SERVE_API_KEY", "hivegrpo_serve_api_key", "Hivegrpo_Serve_Api_Key"])
def test_no_child_gets_the_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "secret")
    assert ServeConfig.load().api_key.get_secret_value() == "secret"
    assert "secret" not in engine_environment().values()
    assert "secret" not in source_module._environment().values()
    assert engine_environment()["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_where_others_can_reach_it_a_key_is_needed(host: str) -> None:
    with pytest.raises(ConfigError, match="HIVEGRPO_SERVE_API_KEY"):
        ServeConfig.load(host=host)
    assert ServeConfig.load(host=host, api_key="k").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_it_is_not(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServeConfig.load(host=host).api_key is None
    monkeypatch.setenv("HIVEGRPO_SERVE_API_KEY", "")
    with pytest.raises(ConfigError, match="empty"):
        ServeConfig.load(host=host)


def test_an_engine_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="vLLM"):
        choose_dialect("vllm", "auto")


def test_a_request_that_waited_too_long_is_told(
    folder: Path, reader: PromptReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hivegrpo.peer.serving.engine.TURN_SECONDS", 0.01)

    async def wait() -> None:
        async with fake_engine(folder, reader, Script(hold_after=0)) as engine:
            prompt, sampling = Encoded("x", [5]), Sampling(5, 0.0, 1.0, 0)
            first = asyncio.create_task(anext(engine.generate(prompt, sampling)))
            await within(lambda: engine._turns.locked())
            with pytest.raises(Refusal, match="its turn"):
                await anext(engine.generate(prompt, replace(sampling, seed=1)))
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    asyncio.run(wait())
