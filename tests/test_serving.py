"""The endpoint of `hivegrpo serve`, asked by OpenAI's own client, before an engine that does what the test says."""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.beds import within
from support.serving import CONTEXT, NAME, Script, serving, write_folder

from hivegrpo.peer.learn.templates import refusal
from hivegrpo.peer.serving.prompts import REST_SECONDS, PromptReader
from hivegrpo.peer.serving.refusals import Refusal
from hivegrpo.peer.serving.requests import MAX_CHOICES, read_chat, read_completion
from hivegrpo.peer.serving.sampling import Defaults
from hivegrpo.peer.serving.stops import StopCutter
from hivegrpo.protocol.errors import ConfigError

SURROGATE = rb'{"model": "m", "prompt": "\ud800"}'
"""Half a character, which JSON can say and no tokenizer can read."""
DEEP = b'{"model": "m", "prompt": "p", "metadata": ' + b"[" * 700 + b"]" * 700 + b"}"
"""Python reads what it cannot go through."""
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def reader(folder: Path) -> Iterator[PromptReader]:
    """One for all: its template has a process, which takes seconds to start."""
    reader = PromptReader.open(folder)
    yield reader
    reader.close()


def test_a_chat_is_answered_from_the_prompt_of_the_training(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            messages = [{"role": "developer", "content": "be brief"}, *ASK]
            answer = await bed.client.chat.completions.create(model=NAME, messages=messages)
            assert answer.choices[0].message.content == "abcdef"
            assert answer.choices[0].finish_reason == "stop"
            prompt = "<system>be brief<user>hi="
            assert bed.script.requests[0]["prompt"] == prompt
            assert answer.usage.prompt_tokens == len(prompt)  # a token a byte
            assert answer.usage.completion_tokens == 7
            assert answer.usage.total_tokens == len(prompt) + 7
            assert answer.model == NAME
            assert answer.system_fingerprint == f"{NAME}@1"

    asyncio.run(ask())


def test_completions_answer_several_prompts_in_order(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            answer = await bed.client.completions.create(model=NAME, prompt=["one", "two"], n=2, max_tokens=5)
            assert [(choice.index, choice.text) for choice in answer.choices] == [(at, "abcdef") for at in range(4)]
            assert [request["prompt"] for request in bed.script.requests] == ["one", "one", "two", "two"]
            assert answer.usage.prompt_tokens == 6
            assert answer.usage.completion_tokens == 4 * 7

    asyncio.run(ask())


def test_a_stream_is_passed_on_as_it_comes(folder: Path, reader: PromptReader) -> None:
    """The first piece is there while the engine still holds the second."""

    async def ask() -> None:
        async with serving(folder, reader, Script(hold_after=1)) as bed:
            stream = await bed.client.chat.completions.create(
                model=NAME, messages=ASK, stream=True, stream_options={"include_usage": True}
            )
            chunks = [await anext(stream)]
            assert chunks[0].choices[0].delta.content == "ab"
            assert chunks[0].choices[0].delta.role == "assistant"
            bed.script.go.set()
            chunks += [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "abcdef"
            assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
            assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [7]
            assert len({chunk.id for chunk in chunks}) == 1

    asyncio.run(ask())


def test_a_stream_ends_with_done_and_has_no_usage_unasked(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            response = await bed.post("/v1/completions", json={"model": NAME, "prompt": "x", "stream": True})
            assert response.headers["content-type"].startswith("text/event-stream")
            events = response.text.strip().split("\n\n")
            assert events[-1] == "data: [DONE]"
            assert not any("usage" in event for event in events)

    asyncio.run(ask())


def test_n_answers_have_their_indices_and_seeds(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            whole = await bed.client.chat.completions.create(model=NAME, messages=ASK, n=3, seed=40)
            assert [choice.index for choice in whole.choices] == [0, 1, 2]
            assert [request["seed"] for request in bed.script.requests] == [40, 41, 42]
            stream = await bed.client.chat.completions.create(model=NAME, messages=ASK, n=3, stream=True)
            texts = {0: "", 1: "", 2: ""}
            async for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            assert texts == dict.fromkeys(range(3), "abcdef")
            unseeded = {request["seed"] for request in bed.script.requests[3:]}
            assert len(unseeded) == 3

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_across_pieces_and_the_work_on_it(
    folder: Path, reader: PromptReader, stream: bool
) -> None:
    """The engine would go on after "ef" only if the test let it: what ends it is that it is hung up on."""

    async def ask() -> None:
        script = Script(pieces=("ab", "cd", "ef", "gh"), hold_after=3)
        async with serving(folder, reader, script) as bed:
            request = {"model": NAME, "prompt": "x", "stop": ["zz", "de"], "max_tokens": 50}
            if stream:
                chunks = [chunk async for chunk in await bed.client.completions.create(**request, stream=True)]
                text = "".join(chunk.choices[0].text for chunk in chunks)
                reason = chunks[-1].choices[0].finish_reason
            else:
                answer = await bed.client.completions.create(**request)
                text, reason = answer.choices[0].text, answer.choices[0].finish_reason
                assert answer.usage.completion_tokens == len("abcdef")
            assert (text, reason) == ("abc", "stop")
            async with asyncio.timeout(10):
                await script.cancelled.wait()

    asyncio.run(ask())


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(1, 11)),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: set[int]) -> None:
    """Against a reference that looks at the text letter by letter, for the first that is complete."""
    expected, stopped = text, False
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            expected, stopped = text[: min(starts)], True
            break
    cutter, got = StopCutter(stops), ""
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for start, end in itertools.pairwise(bounds):
        passed, done = cutter.feed(text[start:end])
        got += passed
        if done:
            break
    else:
        done = False
        got += cutter.rest()
    assert (got, done) == (expected, stopped)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"generation_config": "{}"}, "generation_config"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop.0"),
        ({"stream": 5}, "stream"),
        ({"streams": True}, "streams"),
        ({"stream": True, "stream_options": {"string": True}}, "stream_options.string"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
        ({"model": None}, "model"),
    ],
    ids=str,
)
def test_what_is_not_done_is_refused_by_name(given: dict[str, object], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_chat(json.dumps({"model": NAME, "messages": ASK, **given}).encode())
    assert refused.value.status == 400
    assert str(refused.value.param).startswith(param)


def test_what_asks_for_nothing_is_taken() -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "user": "me"}
    nulls = {"stop": None, "seed": None, "n": None, "tool_choice": None, "max_tokens": None}
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}]
    wanted = read_chat(json.dumps({"model": NAME, "messages": parts, **neutral, **nulls}).encode())
    assert wanted.prompts == ([{"role": "user", "content": "a\nb"}],)
    assert (wanted.n, wanted.stops, wanted.max_tokens) == (1, (), None)
    assert read_completion(b'{"model": "m", "prompt": "p", "echo": false, "best_of": 1}').max_tokens == 16


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"model": 1e999}',
        SURROGATE,
        SURROGATE.replace(rb"\ud800", b"\xed\xa0\x80"),
        SURROGATE.decode().encode("utf-16"),
        DEEP,
        DEEP.replace(b"metadata", b"prompt"),
        DEEP.replace(b"metadata", b"else"),
    ],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        read_completion(body)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("read", "given"),
    [
        (read_chat, {"messages": [{"role": "user", "content": [0] * 10_000}]}),
        (read_chat, {"messages": [0] * 10_000}),
        (read_chat, {"messages": [{"role": "user", "content": "x"} | dict.fromkeys(map(str, range(10_000)), 0)]}),
        (read_chat, {"messages": [{"role": "user", "content": [0] * 200}] * 200}),
        (read_completion, {"prompt": [0] * 10_000}),
        (read_completion, {"prompt": "x", "stop": [0] * 10_000}),
        (read_completion, {"prompt": "x"} | dict.fromkeys(map(str, range(10_000)), 0)),
    ],
    ids=["parts", "messages", "names in a message", "parts of messages", "prompts", "stops", "names"],
)
def test_a_request_with_many_errors_costs_as_much_as_one_with_few(
    read: Callable[[bytes], object], given: dict[str, object]
) -> None:
    """Each that pydantic collects takes time and memory, in which nobody else is answered."""
    with pytest.raises(Refusal) as refused:
        read(json.dumps({"model": NAME, **given}).encode())
    collected = refused.value.__context__
    assert isinstance(collected, ValidationError)
    assert collected.error_count() <= 3  # each of the types that it may have says what it misses


def test_a_body_is_read_only_in_a_place_of_the_queue(folder: Path, reader: PromptReader) -> None:
    """Bodies that are on their way take memory: the queue bounds how many there are."""

    async def ask() -> None:
        async with serving(folder, reader, Script(), queue=1) as bed:
            host, port = bed.url.removeprefix("http://").split(":")
            asking, answering = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json"
            answering.write(f"{head}\r\ncontent-length: 100\r\nexpect: 100-continue\r\n\r\n".encode())
            async with asyncio.timeout(10):
                assert b" 100 " in await asking.readline()  # the body is waited for
            with pytest.raises(openai.RateLimitError):
                await bed.client.completions.create(model=NAME, prompt="x")
            answering.close()

    asyncio.run(ask())


def test_an_unknown_model_is_not_found(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            with pytest.raises(openai.NotFoundError) as missing:
                await bed.client.chat.completions.create(model="/etc/passwd", messages=ASK)
            assert missing.value.code == "model_not_found"
            assert [model.id async for model in bed.client.models.list()] == [NAME]
            assert (await bed.client.models.retrieve(NAME)).owned_by == "hivegrpo"
            with pytest.raises(openai.NotFoundError):
                await bed.client.models.retrieve("other")
            with pytest.raises(openai.NotFoundError) as page:
                await bed.client.embeddings.create(model=NAME, input="x")
            assert "Not Found" in page.value.message
            assert bed.script.requests == []

    asyncio.run(ask())


def test_a_prompt_that_leaves_no_room_is_refused_and_a_long_answer_cut(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            for prompt in ("x" * CONTEXT, "x" * 10 * CONTEXT):
                with pytest.raises(openai.BadRequestError) as refused:
                    await bed.client.completions.create(model=NAME, prompt=prompt, max_tokens=1)
                assert refused.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError, match="empty"):
                await bed.client.completions.create(model=NAME, prompt="")
            assert bed.script.requests == []
            await bed.client.completions.create(model=NAME, prompt="x" * (CONTEXT - 3), max_tokens=50)
            await bed.client.chat.completions.create(model=NAME, messages=ASK)
            allowed = [request["max_tokens"] for request in bed.script.requests]
            assert allowed == [3, CONTEXT - len("<user>hi=")]

    asyncio.run(ask())


def test_a_model_without_a_chat_template_only_completes(tmp_path: Path) -> None:
    async def ask() -> None:
        plain = write_folder(tmp_path / "plain", template=None)
        async with serving(plain, PromptReader.open(plain), Script()) as bed:
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                await bed.client.chat.completions.create(model=NAME, messages=ASK)
            assert (await bed.client.completions.create(model=NAME, prompt="x")).choices[0].text == "abcdef"

    asyncio.run(ask())


def test_a_template_that_refuses_is_the_clients_business(tmp_path: Path) -> None:
    async def ask() -> None:
        folder = write_folder(tmp_path / "picky", template="{{ raise_exception('system first') }}")
        reader = PromptReader.open(folder)
        try:
            async with serving(folder, reader, Script()) as bed:
                with pytest.raises(openai.BadRequestError, match="system first"):
                    await bed.client.chat.completions.create(model=NAME, messages=ASK)
        finally:
            reader.close()

    asyncio.run(ask())


class Exhausted:
    """A renderer that has lost prompts of somebody's, until it forgets them."""

    given_up = True

    def forget(self) -> None:
        self.given_up = False

    def render(self, messages: list[dict[str, str]]) -> str:
        if messages[0]["content"] == "loop":
            self.given_up = True
            raise refusal("took too long")
        if messages[0]["content"] == "fork":
            raise ConfigError("No process can be had.")
        return messages[0]["content"]

    def close(self) -> None:
        pass


def test_chat_comes_back_after_prompts_that_were_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client cannot switch it off for others; what is not the request's fault says to come again."""
    now = 1000.0
    monkeypatch.setattr("hivegrpo.peer.serving.prompts.time.monotonic", lambda: now)
    reader = PromptReader.open(folder)
    reader._renderer = Exhausted()

    def status(text: str) -> int:
        try:
            reader._messages([{"role": "user", "content": text}])
        except Refusal as refused:
            return refused.status
        return 200

    assert [status("hi"), status("fork"), status("loop"), status("hi")] == [200, 503, 400, 503]
    now += REST_SECONDS - 1.0
    assert status("hi") == 503
    now += 1.0
    assert status("hi") == 200
    reader.close()


def test_the_client_decides_how_it_is_sampled_and_the_folder_what_it_leaves_out(folder: Path) -> None:
    def wanted(**given: object) -> object:
        return read_completion(json.dumps({"model": NAME, "prompt": "x", **given}).encode())

    trained = Defaults(temperature=0.7, top_p=0.9, settings={"eos_token_id": [1]})
    assert trained.sampling(wanted(), 0, 5).temperature == 0.7
    assert trained.sampling(wanted(temperature=0, top_p=0.5), 0, 5).temperature == 0
    assert trained.sampling(wanted(temperature=0, top_p=0.5), 0, 5).top_p == 0.5
    assert Defaults.read(folder) == Defaults(1.0, 1.0, {})


def test_keys_are_asked_for(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script(), api_key="sésame") as bed:
            body = {"model": NAME, "prompt": "x"}
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sesame"}):
                response = await bed.post("/v1/completions", json=body, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
            assert bed.script.requests == []
            right = {"authorization": "Bearer sésame".encode()}
            assert (await bed.post("/v1/completions", json=body, headers=right)).status_code == 200

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost:8000", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
    ],
    ids=str,
)
def test_without_a_key_no_web_page_gets_in(
    folder: Path, reader: PromptReader, headers: dict[str, str], status: int
) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            for method, path, body in (
                ("POST", "/v1/completions", {"model": NAME, "prompt": "x"}),
                ("GET", "/health", None),
            ):
                response = await bed.post(path, method=method, json=body, headers=headers)
                assert response.status_code == status
                if status == 403:
                    assert response.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(ask())


def test_with_a_key_the_host_is_free(folder: Path, reader: PromptReader) -> None:
    """Reverse proxies pass on the name that the client asked for."""

    async def ask() -> None:
        async with serving(folder, reader, Script(), api_key="sesame") as bed:
            headers = {"host": "models.example", "authorization": "Bearer sesame"}
            response = await bed.post("/v1/completions", json={"model": NAME, "prompt": "x"}, headers=headers)
            assert response.status_code == 200

    asyncio.run(ask())


async def chunked(url: str, kibibytes: int) -> bytes:
    """All that is answered, until the connection closes, to a body whose length is not told and which has no end."""
    host, port = url.removeprefix("http://").split(":")
    asking, answering = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    answering.write(
        f"{head}\r\ntransfer-encoding: chunked\r\n\r\n".encode() + kibibytes * (b"400\r\n" + b"x" * 1024 + b"\r\n")
    )
    async with asyncio.timeout(10):
        answer = await asking.read()
    answering.close()
    return answer


def test_what_is_too_large_or_no_json_is_refused_unread(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script(), body=4096) as bed:
            typed = {"content-type": "application/json"}
            large = await bed.post("/v1/completions", content=b"x" * 5000, headers=typed)
            assert large.status_code == 413
            assert large.json()["error"]["code"] == "request_too_large"
            assert b" 413 " in await chunked(bed.url, 5)
            plain = await bed.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
            assert plain.status_code == 415
            assert (await bed.post("/v1/completions", content=b"{", headers=typed)).status_code == 400

    asyncio.run(ask())


def test_fifty_at_once_are_answered_one_after_the_other(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            asks = [bed.client.completions.create(model=NAME, prompt="x") for _ in range(50)]
            answers = await asyncio.gather(*asks)
            assert [answer.choices[0].text for answer in answers] == ["abcdef"] * 50
            assert bed.script.most_at_once == 1

    asyncio.run(ask())


def test_a_full_queue_says_when_to_come_again(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script(hold_after=0), queue=2) as bed:
            asks = [asyncio.create_task(bed.client.completions.create(model=NAME, prompt="x")) for _ in range(2)]
            await within(lambda: bed.engine._requests == 2)
            with pytest.raises(openai.RateLimitError) as full:
                await bed.client.completions.create(model=NAME, prompt="x")
            assert int(full.value.response.headers["retry-after"]) > 0
            bed.script.go.set()
            await asyncio.gather(*asks)
            await bed.client.completions.create(model=NAME, prompt="x")

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_ends_the_work_and_frees_the_place(folder: Path, reader: PromptReader, stream: bool) -> None:
    """One in work, and one that waits for its turn and never gets to the engine."""

    async def ask() -> None:
        script = Script(hold_after=1)
        async with serving(folder, reader, script, queue=2) as bed:

            async def use() -> None:
                answer = await bed.client.completions.create(model=NAME, prompt="x", n=2, stream=stream)
                if stream:
                    async for _ in answer:
                        pass

            asks = [asyncio.create_task(use()) for _ in range(2)]
            async with asyncio.timeout(10):
                await script.holding.wait()
            await within(lambda: bed.engine._requests == 2)
            for task in asks:
                task.cancel()
            async with asyncio.timeout(10):
                await script.cancelled.wait()
            assert await bed.engine.idle(10)
            assert len(script.requests) == 1
            script.go.set()
            assert (await bed.client.completions.create(model=NAME, prompt="x")).choices[0].text == "abcdef"

    asyncio.run(ask())


@pytest.mark.parametrize("failure", [{"fail_after": 1}, {"error_after": 1}], ids=str)
def test_an_engine_that_breaks_off_is_never_a_short_answer(
    folder: Path, reader: PromptReader, failure: dict[str, int]
) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script(**failure)) as bed:
            with pytest.raises(openai.InternalServerError) as lost:
                await bed.client.completions.create(model=NAME, prompt="x")
            assert lost.value.status_code == 503
            assert "retry-after" in lost.value.response.headers
            stream = await bed.client.completions.create(model=NAME, prompt="x", stream=True)
            assert (await anext(stream)).choices[0].text == "ab"
            with pytest.raises(openai.APIError, match="lost"):
                [chunk async for chunk in stream]
            raw = await bed.post("/v1/completions", json={"model": NAME, "prompt": "x", "stream": True})
            assert "[DONE]" not in raw.text

    asyncio.run(ask())


def test_what_fails_before_the_first_piece_has_a_status_in_a_stream_too(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script(status=500)) as bed:
            with pytest.raises(openai.InternalServerError):
                await bed.client.completions.create(model=NAME, prompt="x", stream=True)

    asyncio.run(ask())


def test_without_an_engine_everything_says_to_come_again(folder: Path, reader: PromptReader) -> None:
    async def ask() -> None:
        async with serving(folder, reader, Script()) as bed:
            bed.engine.lost = True
            with pytest.raises(openai.InternalServerError) as lost:
                await bed.client.completions.create(model=NAME, prompt="x")
            assert lost.value.status_code == 503
            assert "retry-after" in lost.value.response.headers

    asyncio.run(ask())
