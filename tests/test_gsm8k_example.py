"""Two rounds of examples/gsm8k on real rows of GSM8K, or on rows of the same form, with a tiny random model."""

import asyncio
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.invariants import assert_invariants_of_homes
from support.swarm import Swarm
from support.trained_run import byte_level_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from hivegrpo.cli.prepare import prepare_run
from hivegrpo.peer.daemon import run_peer
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport

ROOT = Path(__file__).parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"

PROBLEMS = [
    ("Ann has 3 boxes of 4 pens and loses 2. How many are left?", "3*4=<<3*4=12>>12\n12-2=<<12-2=10>>10", "10"),
    ("A bus of 40 seats is half full; 5 get on. How many sit?", "40/2=<<40/2=20>>20\n20+5=<<20+5=25>>25", "25"),
    ("Bo saves $250 a month. How much has he after 4 months?", "250*4=<<250*4=1000>>1,000", "1,000"),
    ("A rope of 9 m is cut into 3 equal parts. How long is each?", "9/3=<<9/3=3>>3", "3"),
    ("Cy reads 12 pages a day for 5 days. How many pages?", "12*5=<<12*5=60>>60", "60"),
    ("Di had 7 eggs and broke 3. How many are whole?", "7-3=<<7-3=4>>4", "4"),
    ("A shop sells 15 cakes in the morning and 18 later. How many in all?", "15+18=<<15+18=33>>33", "33"),
    ("Ed runs 2 km a day. How far in a week?", "2*7=<<2*7=14>>14", "14"),
    ("100 sheets are shared by 8 pupils, 12 each. How many are left?", "8*12=<<8*12=96>>96\n100-96=<<100-96=4>>4", "4"),
    ("Flo is 6 and her aunt 5 times as old. How old is the aunt?", "6*5=<<6*5=30>>30", "30"),
    ("A tank loses 3 litres an hour. How much in 9 hours?", "3*9=<<3*9=27>>27", "27"),
    ("Gus buys 2 caps at $11 each. What does he pay?", "2*11=<<2*11=22>>22", "22"),
]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    if GSM8K.is_file():
        return [json.loads(line) for line in GSM8K.read_text().splitlines()[:200]]
    return [{"question": question, "answer": f"{steps}\n#### {answer}"} for question, steps, answer in PROBLEMS]


def write_model(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE learnt from the texts, and a random Qwen2 of two layers."""
    tokenizer = byte_level_tokenizer()
    trained = tokenizer.train_new_from_iterator(texts, vocab_size=600)
    trained.chat_template = CHAT_TEMPLATE
    trained.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(trained),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=trained.eos_token_id,
        pad_token_id=trained.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def local_config(folder: Path) -> RunConfig:
    """The example's run.toml with a local model and local rows, and small numbers."""
    tables = tomllib.loads((ROOT / "examples" / "gsm8k" / "run.toml").read_text())
    tables["admission"] = {"mode": "open"}
    data = rows()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, data)))
    write_model(folder / "model", [text for row in data for text in row.values()])
    tables["model"] = {"path": str(folder / "model")}
    for section in ("dataset", "evaluation"):
        kept = {key: value for key, value in tables[section].items() if key not in ("name", "config", "split")}
        tables[section] = kept | {"path": str(folder / "rows.jsonl")}
    tables["run"] |= {"versions": 2, "start_peers": 2}
    tables["evaluation"] |= {"every": 1, "limit": 4}
    tables["grpo"] |= {"prompts_per_round": 4, "num_generations": 4, "max_completion_length": 12}
    tables["optimizer"] |= {"warmup_steps": 0}
    tables["timing"] = {"grace": 1.0}
    return RunConfig.model_validate(tables)


@pytest.mark.timeout(180)
def test_two_rounds_of_the_gsm8k_example(tmp_path: Path) -> None:
    config = local_config(tmp_path)
    coordinator = Identity.generate()
    run = prepare_run(config, coordinator, BlobStore(tmp_path / "coordinator" / "blobs"))
    swarm = Swarm(tmp_path, RunConfig.from_json(config.published().canonical_json()), run, coordinator)

    async def scenario() -> None:
        serving = await swarm.start_coordinator()

        async def make_transport(identity: Identity, key: Path, settings: PeerConfig, address: str) -> Transport:
            return swarm.network.join(identity)

        async def work(name: str) -> None:
            settings = PeerConfig(home=tmp_path / name, device="cpu", threads=1)
            address = swarm.network.address(coordinator.peer_id)
            await run_peer(address, settings, asyncio.Event(), lambda record: None, make_transport=make_transport)

        async with asyncio.timeout(150):
            await asyncio.gather(work("a"), work("b"))
        await serving.leave()

    asyncio.run(scenario())
    chain = ChainFile.open(tmp_path / "a").chain
    assert chain.height == 2
    for entry in chain.entries[1:]:
        metrics = dict(entry.manifest.message.metrics)  # the message itself has 0.0 for whatever is missing
        assert 0.0 <= metrics["reward"] <= 1.0
        assert metrics["completions/mean_length"] > 0
        assert 0.0 <= metrics["eval/accuracy"] <= 1.0
    assert_invariants_of_homes(swarm.coordinator_home, {name: tmp_path / name for name in ("a", "b")})
