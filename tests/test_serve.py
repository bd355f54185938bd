"""`hivegrpo serve` whole: OpenAI's client, our command, `transformers serve`, and a run that gets a newer version."""

import asyncio
import shutil
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import openai
import psutil
import pytest
from support.beds import within
from support.processes import ADDITION, Process, machine
from support.serving import client_of
from support.trained_run import MadeRun, write_run
from transformers import AutoTokenizer

from hivegrpo.peer.inference.load import load
from hivegrpo.protocol.chainfile import ChainFile

pytestmark = pytest.mark.slow

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CONTEXT = 128
PROMPT = "12+34="
ASK = {"model": "test", "prompt": PROMPT, "temperature": 0}
CHAT = {"model": "test", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}


class Served:
    """A run at version 2 that is served and followed; version 3 is there when the test wants it."""

    def __init__(self, made: MadeRun, home: Path, process: Process, client: openai.AsyncOpenAI) -> None:
        self.process = process
        self.client = client
        self._made = made
        self._home = home

    async def answer(self) -> tuple[str, str]:
        """Text, and the version that it is from."""
        answer = await self.client.completions.create(**ASK)
        return answer.choices[0].text, answer.system_fingerprint

    def commit(self) -> None:
        """Version 3 arrives, as a peer's daemon writes it down."""
        ChainFile.open(self._home).append(self._made.chain.entry(3))

    def engines(self) -> list[psutil.Process]:
        """The engines' processes."""
        return [child for child in psutil.Process(self.process.pid).children() if _is_engine(child)]


def _is_engine(process: psutil.Process) -> bool:
    """One that has just ended is none."""
    try:
        return "transformers.cli.transformers" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    folder = tmp_path_factory.mktemp("run")
    base = folder / "base"
    shutil.copytree(ADDITION / "starter", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    return write_run(folder / "run", base)


@pytest.fixture(scope="module")
def served(runner: asyncio.Runner, made: MadeRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    home = folder / "run" / "peer"
    chainfile = ChainFile.create(home, made.chain.run, made.coordinator.peer_id)
    for version in range(3):
        chainfile.append(made.chain.entry(version))
    shutil.copytree(made.home / "blobs", home / "blobs")
    stack = AsyncExitStack()

    async def start() -> Served:
        host = await stack.enter_async_context(machine(folder))
        flags = ("--port", "0", "--follow", "1", "--device", "cpu", "--json")
        process = await host.hivegrpo("serve", str(home.parent), *flags)
        record = await process.wait_for(lambda record: record["kind"] == "listening")
        client = await stack.enter_async_context(client_of(record["url"].removesuffix("/v1")))
        return Served(made, home, process, client)

    yield runner.run(start())
    runner.run(stack.aclose())


def test_answers_are_those_of_the_policy(runner: asyncio.Runner, served: Served, made: MadeRun) -> None:
    trained = load(str(made.folder), "2", "cpu")
    ids = trained.tokenizer(PROMPT, return_tensors="pt")
    output = trained.merged().generate(**ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
    expected = trained.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(expected) > 1

    async def ask() -> None:
        completion = await served.client.completions.create(**ASK)
        chat = await served.client.chat.completions.create(**CHAT, max_tokens=16)
        assert completion.choices[0].text == chat.choices[0].message.content == expected
        assert completion.usage.prompt_tokens == chat.usage.prompt_tokens == len(PROMPT)
        assert completion.usage.completion_tokens == chat.usage.completion_tokens

    runner.run(ask())


def test_streams_and_stop_strings(runner: asyncio.Runner, served: Served) -> None:
    async def ask() -> None:
        whole, _ = await served.answer()
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await served.client.chat.completions.create(**CHAT, **usage)
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).startswith(whole)
        assert chunks[-1].usage.completion_tokens > 0
        stopped = await served.client.completions.create(**ASK, stop=whole[1])
        assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (whole[: whole.index(whole[1])], "stop")

    runner.run(ask())


def test_several_answers_and_a_seed_that_gives_them_again(runner: asyncio.Runner, served: Served) -> None:
    """Beside other requests, which draw from the engine's generator too."""

    async def ask() -> None:
        request = ASK | {"temperature": 2.0, "n": 4, "seed": 7}
        others = [served.client.completions.create(**(ASK | {"temperature": 1.0})) for _ in range(4)]
        first, *_ = await asyncio.gather(served.client.completions.create(**request), *others)
        second = await served.client.completions.create(**request)
        texts = [choice.text for choice in first.choices]
        assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
        assert len(set(texts)) > 1
        assert [choice.text for choice in second.choices] == texts

    runner.run(ask())


def test_what_is_wrong_is_said_and_does_no_harm(runner: asyncio.Runner, served: Served) -> None:
    async def ask() -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            await served.client.completions.create(**(ASK | {"model": "gpt-4"}))
        assert missing.value.code == "model_not_found"
        long = {"messages": [{"role": "user", "content": "1" * CONTEXT}]}
        with pytest.raises(openai.BadRequestError) as refused:
            await served.client.chat.completions.create(**(CHAT | long))
        assert refused.value.code == "context_length_exceeded"
        longest = await served.client.completions.create(**(ASK | {"prompt": "1" * (CONTEXT - 1)}))
        assert longest.usage.completion_tokens == 1
        await served.answer()

    runner.run(ask())


def test_fifty_at_once_and_one_that_hangs_up(runner: asyncio.Runner, served: Served) -> None:
    async def ask() -> None:
        alone = await served.answer()
        asks = [asyncio.create_task(served.answer()) for _ in range(50)]
        gone = [asyncio.create_task(served.client.completions.create(**ASK, stream=True)) for _ in range(5)]
        await asks[0]
        for task in gone:
            task.cancel()
        assert await asyncio.gather(*asks) == [alone] * 50
        assert await served.answer() == alone

    runner.run(ask())


def test_a_newer_version_is_switched_to_under_load_without_losing_a_request(
    runner: asyncio.Runner, served: Served
) -> None:
    async def switch() -> None:
        answers: list[tuple[str, str]] = []
        over = asyncio.Event()

        async def load() -> None:
            while not over.is_set():
                answers.append(await served.answer())
                await asyncio.sleep(0.02)  # so that the new engine gets some of the processor

        loads = [asyncio.create_task(load()) for _ in range(8)]
        await within(lambda: len(answers) > 8)
        served.commit()
        await served.process.wait_for(lambda record: record["kind"] == "drained")
        count = len(answers)
        await within(lambda: len(answers) > count + 8)
        over.set()
        await asyncio.gather(*loads)
        assert {version for _, version in answers} == {"test@2", "test@3"}
        assert len(set(answers)) == 2
        await within(lambda: len(served.engines()) == 1)  # the older one has a moment to leave

    runner.run(switch())


def test_an_engine_that_is_killed_is_started_again(runner: asyncio.Runner, served: Served) -> None:
    async def kill() -> None:
        before = await served.answer()
        [engine] = served.engines()
        engine.kill()
        await served.process.wait_for(lambda record: record["kind"] == "lost")
        with pytest.raises(openai.InternalServerError) as missed:
            await served.answer()
        assert missed.value.response.headers["retry-after"]
        records = served.process.records
        await served.process.wait_for(lambda record: record["kind"] == "lost" and records[-1]["kind"] == "serving")
        assert await served.answer() == before

    runner.run(kill())


def test_ctrl_c_lets_requests_finish_and_leaves_nothing(runner: asyncio.Runner, served: Served) -> None:
    async def stop() -> None:
        children = psutil.Process(served.process.pid).children(recursive=True)
        asks = [asyncio.create_task(served.answer()) for _ in range(20)]
        await asks[0]
        served.process.send(signal.SIGINT)
        assert len({await ask for ask in asks}) == 1
        assert await served.process.ended() == 0
        assert served.process.records[-1] == {"kind": "stopped"}
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, 5.0)
        assert alive == []

    runner.run(stop())
