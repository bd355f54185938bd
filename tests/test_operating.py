"""A run operated by its command line, as real processes: the socket under uvloop."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import Record, addition_config, machine

from hivegrpo.cli.operate import send_order
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.invites import PREFIX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_commands_reach_the_coordinator_and_tokens_no_log(tmp_path: Path) -> None:
    config = addition_config(tmp_path, admission={"mode": "invite"})

    async def scenario() -> None:
        async with machine(tmp_path) as host:
            coordinator = await host.coordinator(config)
            started = await coordinator.wait_for(lambda record: record["kind"] == "started")

            async def order(command: str, **rest: Any) -> Record:
                return await asyncio.to_thread(send_order, {"command": command, **rest}, Path(started["home"]))

            made = await host.hivegrpo("coordinator", "invite", "--note", "for Ann", "--json")
            assert await made.ended() == 0, made.tail()
            token = made.records[0]["token"]
            assert token.startswith(PREFIX)
            assert await order("pause") == {"paused": True}
            status = await order("status")
            assert (status["paused"], status["peers"]) == (True, [])
            assert [invite["note"] for invite in status["invites"]] == ["for Ann"]
            await coordinator.wait_for(lambda record: record["kind"] == "status" and record["paused"])
            with pytest.raises(ConfigError, match="no version to roll back yet"):
                await order("rollback", version=3)
            written = "".join([*coordinator.lines, json.dumps(coordinator.records)])
            assert token not in written
            assert token[-40:] not in written

    asyncio.run(scenario())
