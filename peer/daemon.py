"""Start a peer: find the run, check everything it names against what is here, then put the volunteer to work."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, TypeVar

import structlog

from hivegrpo.peer.desk import Learns
from hivegrpo.peer.feedback import ErrorFeedback
from hivegrpo.peer.home import PeerHome, identity_path
from hivegrpo.peer.materials import file_refs
from hivegrpo.peer.numerics import check_numerics
from hivegrpo.peer.preparation import prepare_learner
from hivegrpo.peer.swarm.accuser import Accuser
from hivegrpo.peer.swarm.auditor import Auditor
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import ContributionStore
from hivegrpo.peer.swarm.exchanges import ExchangeServer
from hivegrpo.peer.swarm.session import Session
from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.peer.swarm.sync import Synchroniser
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.peer.volunteer import Volunteer
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.address import parse_address
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import find_chain, serve_chain
from hivegrpo.protocol.checks import MAX_ADDRESSES
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.envelope import PROTOCOL
from hivegrpo.protocol.errors import ChainError, HiveError, MismatchError, UnreachableError, WireError
from hivegrpo.protocol.files import remove_temporaries
from hivegrpo.protocol.history import History
from hivegrpo.protocol.homes import locked_home
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport

log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 2.0
DRAIN_SECONDS = 60.0

T = TypeVar("T")

Show = Callable[[dict[str, Any]], None]
MakeTransport = Callable[[Identity, Path, PeerConfig, str], Awaitable[Transport]]


async def run_peer(
    address: str,
    settings: PeerConfig,
    stop: asyncio.Event,
    show: Show,
    *,
    make_transport: MakeTransport,
    run_id: str | None = None,
) -> None:
    """Join the run at `address` and work until it is finished or `stop` is set. ChainError if it is not run `run_id`.

    `show` is given status dicts. HiveErrors say what the user can do; the network's mistakes never end the daemon.
    """
    coordinator, _ = parse_address(address)
    async with AsyncExitStack() as stack:
        key = identity_path(settings.home)
        stack.enter_context(locked_home(key.parent))
        identity = Identity.load_or_create(key)
        transport = await make_transport(identity, key, settings, address)
        stack.push_async_callback(transport.close)
        run = await _find_run(transport, address, coordinator)
        if run_id not in (None, run.run_id):
            raise ChainError(f"At {address} is run {run.run_id}, not {run_id}.", "Ask for the run's address.")
        home = PeerHome.of_run(run.run_id, settings.home)
        chainfile = ChainFile.create(home.root, run.run, coordinator, run.successions)
        chain = chainfile.chain
        config = _read_config(chain)
        show({"kind": "joining", "run_id": chain.run_id, "peer": identity.peer_id, "home": str(home.root)})

        worker = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="learn"))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(worker, _check_arithmetic, chain)
        remove_temporaries(home.root)
        sharing = Sharing(transport, identity, chain.run_id, chain.coordinator, BlobStore(home.blobs))
        await sharing.start()
        preparing = prepare_learner(chain, config, settings, sharing, home.model, worker)
        learner, base = await _run_beside(preparing, sharing.announce())
        stack.callback(learner.close)
        gc.collect()
        gc.freeze()  # a full collection over all that was imported takes a tenth of a second, in which no round goes on
        await work_in_run(
            address,
            identity=identity,
            transport=transport,
            chainfile=chainfile,
            config=config,
            home=home,
            sharing=sharing,
            learner=learner,
            worker=worker,
            stop=stop,
            show=show,
            base=base,
            invite=settings.invite.get_secret_value().strip() if settings.invite is not None else "",
        )


async def work_in_run(
    address: str,
    *,
    identity: Identity,
    transport: Transport,
    chainfile: ChainFile,
    config: RunConfig,
    home: PeerHome,
    sharing: Sharing,
    learner: Learns,
    worker: Executor,
    stop: asyncio.Event,
    show: Show,
    base: Path | None = None,
    invite: str = "",
) -> None:
    """The part of `run_peer` that needs no model: catch up, join, and work with whatever `learner` it is given.

    `sharing` serves already. `base` is the folder of the base model, for version 0 of a run that trains every
    parameter; `invite` is the token to join with, which a member needs no more.
    """
    chain = chainfile.chain
    loop = asyncio.get_running_loop()
    store, directory = sharing.store, sharing.directory
    versions = await loop.run_in_executor(worker, Versions, home.root, chainfile, store, config, base)
    await loop.run_in_executor(worker, versions.sweep, [ref.root for ref in file_refs(chain.manifest.message)])
    exchanges = ExchangeServer()
    await exchanges.start(transport)
    await serve_chain(transport, chain)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="canonical") as canonical:
        synchroniser = Synchroniser(versions, transport, sharing, canonical)
        try:
            await _run_beside(synchroniser.run(), sharing.announce())
        except WireError as error:
            raise UnreachableError(
                f"The run's newest version cannot be had: {error}.", "Try again once a peer that holds it is online."
            ) from error
        session = Session(
            address=address,
            chain=chain,
            identity=identity,
            transport=transport,
            directory=directory,
            join=lambda: _join(transport, chain, invite),
        )
        codec = get_codec(config.averaging.codec)
        keep = config.distribution.keep_versions
        with closing(History(home.history)) as history:
            accuser = Accuser(home.faults, store, session, history, chain)
            volunteer = Volunteer(
                config=config,
                identity=identity,
                session=session,
                versions=versions,
                synchroniser=synchroniser,
                exchanges=exchanges,
                directory=directory,
                contributions=ContributionStore(home.contributions, codec, versions.values, keep),
                feedback=ErrorFeedback(home.feedback, codec, identity.peer_id),
                learner=learner,
                worker=worker,
                canonical=canonical,
                history=history,
                auditor=Auditor(
                    run=chain.run,
                    run_id=chain.run_id,
                    identity=identity,
                    directory=directory,
                    session=session,
                    accuser=accuser,
                    history=history,
                    rate=config.averaging.audit_rate,
                ),
            )
            await _run_together(
                volunteer.work(),
                accuser.run(),
                _heartbeats(session, volunteer, versions, show),
                sharing.announce(),
                _leave_on(stop, volunteer),
                beside=session.run(),  # it is over when the run is finished; the volunteer may have a version to make
            )
    await session.tell(pb.Leave(reason="finished" if session.finished else "asked to leave"))
    show({"kind": "left", "version": versions.version, "state_root": versions.state_root.hex()})


async def _find_run(transport: Transport, address: str, coordinator: str) -> Chain:
    """The run at an address, verified against the peer id in it; UnreachableError or ChainError."""
    await transport.connect([address])
    try:
        return await find_chain(transport, coordinator)
    except WireError as error:
        raise UnreachableError(
            f"{address} answers, but serves no run: {error}.",
            "Check that the address is that of a coordinator, as `hivegrpo coordinator run` prints it.",
        ) from error


def _read_config(chain: Chain) -> RunConfig:
    manifest = chain.manifest.message
    if manifest.protocol != PROTOCOL:
        raise MismatchError(
            f"The run speaks {manifest.protocol[:40]!r}, this installation {PROTOCOL}.",
            "Install the version of hivegrpo that the run names: pip install -U hivegrpo.",
        )
    return RunConfig.from_json(manifest.config)


def _check_arithmetic(chain: Chain) -> None:
    """Known-answer test, against this installation's digests and against the run's."""
    here = bytes.fromhex(check_numerics())
    if here != chain.manifest.message.digests["known_answer"]:
        raise MismatchError(
            "This installation computes another version of the canonical arithmetic than the run.",
            "Install the version of hivegrpo that the run was launched with.",
        )


def _join(transport: Transport, chain: Chain, invite: str) -> pb.Join:
    return pb.Join(
        protocol=PROTOCOL,
        addresses=transport.addresses()[:MAX_ADDRESSES],
        known_answer=chain.manifest.message.digests["known_answer"],
        head=chain.head.manifest.signed if chain.head else None,
        agent=f"hivegrpo/{installed_version('hivegrpo')}",
        invite=invite,
    )


async def _heartbeats(session: Session, volunteer: Volunteer, versions: Versions, show: Show) -> None:
    """Tell the coordinator and the user how this peer is doing."""
    while True:
        state = "paused" if session.paused and volunteer.state == "online" else volunteer.state
        beat = pb.Heartbeat(version=versions.version, state=state, metrics=volunteer.metrics)
        show({"kind": "status", "version": versions.version, "state": state, **volunteer.metrics})
        await session.tell(beat)
        await asyncio.sleep(HEARTBEAT_SECONDS)


async def _leave_on(stop: asyncio.Event, volunteer: Volunteer) -> None:
    """On request, let the volunteer finish what is owed, for a bounded time."""
    await stop.wait()
    await volunteer.leave()
    await asyncio.sleep(DRAIN_SECONDS)
    log.warning("left without finishing the round in flight", seconds=DRAIN_SECONDS)


async def _run_beside(work: Coroutine[Any, Any, T], beside: Coroutine[Any, Any, None]) -> T:
    """The result of `work`, with something beside it that ends when it does; if that fails first, its exception."""
    working, side = asyncio.create_task(work), asyncio.create_task(beside)
    try:
        await asyncio.wait({working, side}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            side.result()
        return await working
    finally:
        for task in (working, side):
            task.cancel()
        await asyncio.gather(working, side, return_exceptions=True)


async def _run_together(*coroutines: Coroutine[Any, Any, None], beside: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends, or the one `beside` them fails; then end the rest.

    The first exception is raised, HiveErrors before others.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    side = asyncio.create_task(beside)
    try:
        await asyncio.wait([*tasks, side], return_when=asyncio.FIRST_COMPLETED)
        if side.done() and side.exception() is None:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*tasks, side):
            task.cancel()
        results = await asyncio.gather(*tasks, side, return_exceptions=True)
    failures = [result for result in results if isinstance(result, Exception)]
    for failure in sorted(failures, key=lambda error: not isinstance(error, HiveError)):
        raise failure
