"""`hivegrpo coordinator succeed`: give a home's run another coordinator key, as the run key allows."""

import sys
from pathlib import Path

from hivegrpo.cli.coordinator_home import KEY_FILE
from hivegrpo.cli.run_key import from_text
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import sync_folder, write_whole
from hivegrpo.protocol.homes import locked_home
from hivegrpo.protocol.identity import Identity

NEXT_KEY_FILE = "next.key"


def succeed(home: Path, succession: str | None) -> None:
    """Print the command that signs a succession; with what it printed, put the home's next key in force.

    ConfigError if the home's run has no run key, or `succession` is not for this home; ChainError if it is forged.
    """
    with locked_home(home):
        file = ChainFile.open(home)
        if not file.chain.manifest.message.run_key:
            raise ConfigError(
                "This run has no run key, so that nobody can name another coordinator.",
                "Begin a new run with `key` in [run] of its run.toml.",
            )
        if succession is None:
            _ask(file.chain, Identity.load_or_create(home / NEXT_KEY_FILE))
        else:
            _install(home, file, from_text(succession))


def _ask(chain: Chain, key: Identity) -> None:
    head = chain.head.manifest.digest if chain.head is not None else chain.manifest.digest
    print(
        f"hivegrpo run-key sign RUN_KEY_FILE --run {chain.run_id} --number {len(chain.successions) + 1} "
        f"--coordinator {key.peer_id} --first {chain.height + 1} --parent {head.hex()}"
    )
    print(
        "Run this where the run key is kept. Then, here: hivegrpo coordinator succeed HOME --succession LINE",
        file=sys.stderr,
    )


def _install(home: Path, file: ChainFile, signed: pb.Signed) -> None:
    """The succession first, then the key: a crash between them is mended by doing it again."""
    chain = file.chain
    after = Chain(chain.run, successions=[*chain.successions, signed])
    pending = home / NEXT_KEY_FILE
    if pending.is_file():
        key = Identity.load_or_create(pending)
        named = parse(pb.Succession, signed.payload)
        if after.coordinator != key.peer_id:
            raise ConfigError(
                f"The succession names {after.coordinator}, this home's next key is {key.peer_id}.",
                "Sign the one that `hivegrpo coordinator succeed HOME` prints here.",
            )
        if after.coordinator != chain.coordinator and named.first != chain.height + 1:
            raise ConfigError(
                f"The succession is for version {named.first}, the next one here is {chain.height + 1}.",
                "Sign the one that `hivegrpo coordinator succeed HOME` prints now.",
            )
        file.succeed([signed])
        write_whole(home / KEY_FILE, key.to_bytes(), mode=0o600)
        pending.unlink()
        sync_folder(home)
    elif after.coordinator != Identity.load_or_create(home / KEY_FILE).peer_id:
        raise ConfigError(
            f"The succession names {after.coordinator}, whose key is not in this home.",
            "Sign the one that `hivegrpo coordinator succeed HOME` prints here.",
        )
    print(
        f"{file.chain.coordinator} signs from now on. `hivegrpo coordinator run` prints the new address; peers need it:"
    )
    print(f"hivegrpo peer run NEW_ADDRESS --run {chain.run_id}")
