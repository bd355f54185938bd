"""The upload cap: what leaves a node in any window of time."""

import asyncio
import time
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.beds import MIB, PATIENCE, echo_call

from hivegrpo.protocol.errors import RemoteError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork
from hivegrpo.protocol.transport.rate import BURST_BYTES, SLICE_BYTES, YIELD_SECONDS, TokenBucket, UploadCap


class Clock:
    """Goes on when somebody sleeps; sleepers oversleep by up to what `late` says, in turn."""

    def __init__(self, late: list[float] | None = None) -> None:
        self.now = 50.0
        self.late = late or [0.0]
        self.slept = 0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds + self.late[self.slept % len(self.late)]
        self.slept += 1
        await asyncio.sleep(0)
        self.now = max(self.now, until)


def held(sends: list[tuple[float, int]], rate: float, burst: int) -> bool:
    """Whether no window, from any send to any later one, has more than rate x window + burst (and float rounding)."""
    totals = [0, *accumulate(size for _, size in sends)]
    return all(
        totals[last + 1] - totals[first] <= rate * (sends[last][0] - sends[first][0]) + burst + 1e-3
        for first in range(len(sends))
        for last in range(first, len(sends))
    )


@given(
    st.floats(1e3, 1e5),
    st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 1000)), min_size=1, max_size=60),
)
def test_a_bucket_holds_in_every_window(rate: float, requests: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, 1000, clock)
    sends = []
    for pause, size in requests:
        clock.now += pause
        if (seconds := bucket.take(size)) > 0.0:
            clock.now += seconds * 0.5
            assert bucket.take(size) > 0.0, "it said when it can work"
            clock.now += seconds * 0.5 + 1e-6
            assert bucket.take(size) == 0.0
        sends.append((clock.now, size))
    assert held(sends, rate, 1000)


@given(st.lists(st.floats(0.0, 0.2), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 5))
def test_a_cap_holds_for_several_streams_whose_timers_are_late(late: list[float], bulk: int, urgent: int) -> None:
    async def scenario() -> list[tuple[float, int]]:
        clock = Clock(late)
        cap = UploadCap(8.0, clock, clock.sleep)
        sends: list[tuple[float, int]] = []

        async def stream(urgent: bool) -> None:
            for size in (SLICE_BYTES, 100, SLICE_BYTES, SLICE_BYTES, 5000):
                await cap.admit(size, urgent)
                sends.append((clock.now, size))

        await asyncio.gather(
            *(stream(urgent=False) for _ in range(bulk)), *(stream(urgent=True) for _ in range(urgent))
        )
        return sends

    sends = asyncio.run(scenario())
    assert len(sends) == 5 * (bulk + urgent)
    assert held(sends, 1e6, BURST_BYTES)


def test_urgent_frames_pass_bulk_and_bulk_goes_on() -> None:
    async def scenario() -> None:
        clock = Clock()
        cap = UploadCap(1.0, clock, clock.sleep)
        order: list[str] = []

        async def send(kind: str, times: int) -> None:
            for _ in range(times):
                await cap.admit(SLICE_BYTES, kind == "urgent")
                order.append(kind)

        await send("bulk", BURST_BYTES // SLICE_BYTES)
        bulk = [asyncio.create_task(send("bulk", 20)) for _ in range(4)]
        await asyncio.sleep(0)
        order.clear()
        await send("urgent", 4)
        # Eighty bulk slices were waiting; each urgent one let at most one of them pass.
        assert order.count("bulk") <= 4
        order.clear()
        flood = asyncio.create_task(send("urgent", 1000))
        await asyncio.wait(bulk)
        assert order.count("urgent") < 1000, "bulk waited for the end of all that is urgent"
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


class Uplink:
    """A cap, and what passed it since, by whom, at a clock that stands still unless the cap sleeps."""

    def __init__(self, mbit: float | None) -> None:
        self.clock = Clock()
        self.cap = UploadCap(mbit, self.clock, self.clock.sleep)
        self.passed: list[str] = []

    async def blob(self, remote: str, slices: int) -> None:
        for _ in range(slices):
            await self.cap.admit_last(SLICE_BYTES, remote)
            self.passed.append(remote)
            await asyncio.sleep(0)

    async def push(self, slices: int) -> None:
        """One frame; without a cap it leaves at ten slices a second."""
        with self.cap.sending(slices * SLICE_BYTES):
            for _ in range(slices):
                await self.cap.admit(SLICE_BYTES, urgent=False)
                if not self.cap.capped:
                    await self.clock.sleep(0.1)
                self.passed.append("push")

    async def pushes(self, frames: int, slices: int) -> None:
        """Frame after frame, as chunks follow each other."""
        for _ in range(frames):
            await self.push(slices)


@pytest.mark.parametrize("mbit", [None, 8.0])
def test_blobs_yield_to_an_exchange_and_have_the_rest(mbit: float | None) -> None:
    async def scenario() -> None:
        link = Uplink(mbit)
        pushing = asyncio.create_task(link.pushes(20, 8))
        await asyncio.sleep(0)
        fetching = [asyncio.create_task(link.blob("joiner", 300)) for _ in range(4)]
        await pushing
        # 160 slices were pushed. Blobs had a sixteenth of that, or one slice a second, and one that had begun to wait.
        assert 1 <= link.passed.count("joiner") <= 160 // 16 + link.clock.now - 50.0 + 2
        began = link.clock.now
        await asyncio.gather(*fetching)
        assert link.clock.now - began <= 1200 * SLICE_BYTES / 1e6, "alone, blobs have the whole line"

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_push_that_nobody_reads_does_not_stop_blobs() -> None:
    async def scenario() -> None:
        link = Uplink(None)
        with link.cap.sending(1):
            await link.blob("joiner", 5)
        assert 4 * YIELD_SECONDS <= link.clock.now - 50.0 <= 6 * YIELD_SECONDS

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_who_takes_nothing_for_long_is_yielded_to_no_more() -> None:
    """Else one suspended laptop would hold all that a node serves at a slice a second."""

    async def scenario() -> None:
        link = Uplink(None)
        with link.cap.sending(1), link.cap.taking():
            await link.blob("joiner", 50)
        assert link.clock.now - 50.0 <= 2 * YIELD_SECONDS

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_stream_that_nobody_reads_is_one_that_takes_nothing() -> None:
    async def never(stream: Stream) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        link, network = Uplink(None), MemoryNetwork()
        node, suspended = network.join("node", link.cap), network.join("suspended")
        await suspended.serve_stream("push", never)
        await node.connect(suspended.addresses())
        async with await node.open_stream("suspended", "push") as stream:
            await stream.send(bytes(MIB))  # fills what the reader buffers
            pushing = asyncio.create_task(stream.send(bytes(MIB), timeout=None))
            await asyncio.sleep(0)
            await link.blob("joiner", 50)
            assert not pushing.done()
            assert link.clock.now - 50.0 <= 2 * YIELD_SECONDS
            pushing.cancel()
            await suspended.close()
        await node.close()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_who_fetches_on_many_streams_gets_no_larger_share() -> None:
    async def scenario() -> None:
        link = Uplink(1.0)
        greedy = [asyncio.create_task(link.blob("greedy", 40)) for _ in range(16)]
        await asyncio.sleep(0)
        link.passed.clear()
        await link.blob("modest", 40)
        assert link.passed.count("greedy") <= 42
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        assert not link.cap._turns, "nobody is remembered who waits for nothing"

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_push_in_memory_overtakes_blobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over streams as they are: eight joiners fetch while a megabyte is pushed, and in turns would get as much."""
    passed = 0
    pass_door = UploadCap._pass_door

    async def counted(self: UploadCap, size: int) -> None:
        nonlocal passed
        await pass_door(self, size)
        passed += 1

    monkeypatch.setattr(UploadCap, "_pass_door", counted)

    async def scenario() -> None:
        network = MemoryNetwork()
        node, other = network.join(Identity.generate(), UploadCap(16.0)), network.join(Identity.generate())
        fetched = asyncio.Event()

        async def sink(stream: Stream) -> None:
            while True:
                await stream.receive(MIB)
                fetched.set()

        async def serve(stream: Stream) -> None:
            await stream.send(bytes(SLICE_BYTES))
            while True:
                await stream.send(bytes(MIB))

        await other.serve_stream("push", sink)
        await node.serve_stream("blob", serve)
        await other.connect(node.addresses())
        draining = [asyncio.create_task(sink(await other.open_stream(node.peer_id, "blob"))) for _ in range(8)]
        await fetched.wait()
        stream = await node.open_stream(other.peer_id, "push")
        before, began = passed, time.perf_counter()
        await stream.send(bytes(MIB))
        during, spent = passed - before, time.perf_counter() - began
        for task in draining:
            task.cancel()
        await asyncio.gather(*draining, return_exceptions=True)
        for transport in (other, node):
            await transport.close()
        assert during - (MIB // SLICE_BYTES + 1) <= 2 + spent / YIELD_SECONDS

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_all_that_a_node_sends_in_memory_goes_through_its_cap() -> None:
    """Pushes, answers to streams that others opened, and calls: by a clock that only the cap turns."""

    async def scenario() -> None:
        clock = Clock()
        network = MemoryNetwork()
        capped = network.join(Identity.generate(), UploadCap(8.0, clock, clock.sleep))
        other = network.join(Identity.generate())

        async def sink(stream: Stream) -> None:
            while True:
                await stream.receive(MIB)

        async def serve(stream: Stream) -> None:
            await stream.receive(10)
            await stream.send(bytes(MIB))

        await other.serve_stream("sink", sink)
        await other.serve_call("echo", echo_call)
        await capped.serve_stream("serve", serve)
        await capped.serve_call("echo", echo_call)
        await other.connect(capped.addresses())
        spent = []
        for work in (
            lambda: send_to(capped, other.peer_id, "sink", bytes(MIB)),
            lambda: fetch_from(other, capped.peer_id),
            lambda: capped.call(other.peer_id, "echo", bytes(MIB // 2)),
            lambda: other.call(capped.peer_id, "echo", bytes(MIB // 2)),
        ):
            before = clock.now
            await work()
            spent.append(clock.now - before)
        await other.close()
        await capped.close()
        # A megabyte a second, less what may be saved up as a burst.
        least = [(size - BURST_BYTES) / 1e6 for size in (MIB, MIB, MIB // 2, MIB // 2)]
        assert all(seconds >= enough for seconds, enough in zip(spent, least, strict=True)), (spent, least)

    asyncio.run(scenario())


async def send_to(node: Transport, peer: str, name: str, frame: bytes) -> None:
    async with await node.open_stream(peer, name) as stream:
        await stream.send(frame)


async def fetch_from(node: Transport, peer: str) -> None:
    async with await node.open_stream(peer, "serve") as stream:
        await stream.send(b"go")
        assert len(await stream.receive(MIB)) == MIB


def test_a_frame_that_is_cancelled_half_way_ends_its_stream() -> None:
    """Or else the next frame would be read as the rest of this one."""

    async def scenario() -> None:
        network = MemoryNetwork()
        capped = network.join(Identity.generate(), UploadCap(1.0))
        other = network.join(Identity.generate())
        ended = asyncio.Event()

        async def sink(stream: Stream) -> None:
            with pytest.raises(RemoteError, match="ended the stream"):
                await stream.receive(MIB)
            ended.set()

        await other.serve_stream("sink", sink)
        await capped.connect(other.addresses())
        stream = await capped.open_stream(other.peer_id, "sink")
        sending = asyncio.create_task(stream.send(bytes(MIB)))
        await asyncio.sleep(0.01)  # the burst has left, and the other 0.9 MiB take seven seconds
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await ended.wait()
        with pytest.raises(RemoteError, match="closed"):
            await stream.send(b"next")
        await other.close()
        await capped.close()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


@pytest.mark.slow
def test_a_cap_holds_over_libp2p() -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    mbit, rate, seconds = 16.0, 2e6, 1.5

    async def scenario() -> list[tuple[float, int]]:
        other = await P2PTransport.create(Identity.generate(), dht=False)
        capped = await P2PTransport.create(Identity.generate(), dht=False, upload=UploadCap(mbit))
        arrived: list[tuple[float, int]] = []

        async def sink(stream: Stream) -> None:
            while True:
                frame = await stream.receive(MIB)
                arrived.append((time.perf_counter(), 4 + len(frame)))

        async def feed() -> None:
            async with await capped.open_stream(other.peer_id, "sink") as stream:
                while True:
                    await stream.send(bytes(SLICE_BYTES - 4))

        try:
            await other.serve_stream("sink", sink)
            await other.serve_call("echo", echo_call)
            await capped.connect(other.addresses())
            feeding = [asyncio.create_task(feed()) for _ in range(4)]
            began = time.perf_counter()
            arrived.append((began, 0))
            calls = 0
            while time.perf_counter() < began + seconds:
                await capped.call(other.peer_id, "echo", b"urgent", timeout=1.0)  # with four streams always waiting
                calls += 1
                await asyncio.sleep(0.05)
            for task in feeding:
                task.cancel()
            await asyncio.gather(*feeding, return_exceptions=True)
            assert calls >= 5
        finally:
            await capped.close()
            await other.close()
        return arrived

    arrived = asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    began, ended = arrived[0][0], arrived[-1][0]
    total = sum(size for _, size in arrived)
    burst = UploadCap(mbit).burst
    # What has arrived had left before; whatever waited in p2pd left no earlier than at the beginning.
    assert total <= rate * (ended - began) + burst
    # A cap that a busy machine does not nearly use up would be a wrong one: half is far below what any run gave.
    assert total >= 0.5 * rate * (ended - began)
