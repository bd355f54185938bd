"""The rows of a run: what its launcher refuses, what travels, and what a peer takes from others."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import addition_config

from hivegrpo.cli.prepare import prepare_run
from hivegrpo.peer.learn.data import Prompts, canonical_rows
from hivegrpo.peer.learn.digests import rows_digest
from hivegrpo.peer.learn.sources import MAX_BYTES
from hivegrpo.peer.materials import file_refs, read_rows
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.config import DatasetSection, EvaluationSection, RunConfig
from hivegrpo.protocol.envelope import open_run
from hivegrpo.protocol.errors import ChainError, ConfigError, MismatchError
from hivegrpo.protocol.identity import Identity

CHAT = [{"role": "user", "content": "1+1="}]
GENERATED = {"path": None, "name": "reasoning_gym:chain_sum", "size": 20}


def prepare(folder: Path, **sections: dict[str, Any]) -> tuple[pb.RunManifest, BlobStore]:
    """The manifest of a run of the packaged task, as the launcher makes it; sections override its own."""
    tables = RunConfig.load(addition_config(folder)).model_dump(mode="json", exclude_unset=True)
    for name, values in sections.items():
        tables[name] = {key: value for key, value in (tables.get(name, {}) | values).items() if value is not None}
    store, launcher = BlobStore(folder / "blobs"), Identity.generate()
    return open_run(prepare_run(RunConfig.model_validate(tables), launcher, store), launcher.peer_id).message, store


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / f"rows-{len(list(folder.glob('rows-*')))}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("row", "evaluated", "sections", "message"),
    [
        ({}, {"level": 1}, {}, "differ in their columns: level"),
        ({"level": 1}, {}, {}, "differ in their columns: level"),
        ({"level": 1}, {}, {"dataset": {"columns": ["level"]}}, 'no column "level"'),
        ({"prompt": CHAT}, {"prompt": CHAT}, {}, "no chat template"),
        ({}, {"prompt": CHAT}, {}, "no chat template"),
        ({"prompt": CHAT}, {"prompt": CHAT}, {"dataset": {"prompt_template": "{prompt}"}}, "prompt_template"),
    ],
)
def test_rows_that_cannot_work_are_refused_at_the_launch(
    tmp_path: Path, row: dict[str, Any], evaluated: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    base = {"prompt": "1+1=", "answer": "2"}
    paths = [write(tmp_path, base | changes) for changes in (row, evaluated)]
    tables = {name: {"path": str(path)} for name, path in zip(("dataset", "evaluation"), paths, strict=True)}
    for name, values in sections.items():
        tables[name] |= values
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(tmp_path, **tables)
    assert caught.value.hint


def test_a_reward_without_its_column_is_refused_at_the_launch(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "solution": "2"})
    with pytest.raises(ConfigError, match=r'"exact_match" needs the column answer; the dataset gives .*solution'):
        prepare(tmp_path, dataset={"path": str(path), "answer_column": ""})


def test_rows_of_a_file_travel_with_all_their_columns(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "answer": "2", "level": 1}, {"prompt": "2+2=", "answer": "4", "level": 2})
    manifest, store = prepare(tmp_path, dataset={"path": str(path)}, evaluation={"path": str(path)})
    assert manifest.rows == 2
    dataset = DatasetSection(path=Path("elsewhere.jsonl"))
    rows = read_rows(manifest.dataset, manifest.digests["dataset"], dataset, None, store)
    assert Prompts.from_jsonl(rows).rows[1] == {"prompt": "2+2=", "answer": "4", "level": 2}
    held_out = EvaluationSection(path=Path("elsewhere.jsonl"))
    assert read_rows(manifest.evaluation, manifest.digests["evaluation"], dataset, held_out, store) == rows


def test_a_path_that_came_from_the_wire_is_never_opened(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "answer": "2"})
    dataset, store = DatasetSection(path=path), BlobStore(tmp_path / "blobs")
    digest = rows_digest(canonical_rows(dataset))
    hub = DatasetSection(name="org/set")
    for section, held_out in ((dataset, None), (hub, EvaluationSection(path=path))):
        with pytest.raises(MismatchError, match="does not send the rows"):
            read_rows(pb.File(), digest, section, held_out, store)


def test_rows_that_each_peer_gets_by_itself_are_not_taken_from_the_launcher(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    rows = b'{"answer":"3","prompt":"1+1="}\n'
    ref = store.add_bytes(rows)
    file = pb.File(name="dataset.jsonl", blob=pb.Blob(root=ref.root, size=ref.size))
    with pytest.raises(MismatchError, match="sends the rows of org/set"):
        read_rows(file, rows_digest(rows), DatasetSection(name="org/set"), None, store)
    assert read_rows(file, rows_digest(rows), DatasetSection(path=Path("x.csv")), None, store) == rows
    with pytest.raises(MismatchError, match="not those that the run was launched with"):
        read_rows(file, bytes(32), DatasetSection(path=Path("x.csv")), None, store)


def test_rows_are_fetched_only_up_to_a_bound() -> None:
    manifest = pb.RunManifest(
        dataset=pb.File(name="dataset.jsonl", blob=pb.Blob(root=bytes(32), size=MAX_BYTES)),
        model=[pb.File(name="model.safetensors", blob=pb.Blob(root=bytes(32), size=MAX_BYTES + 1))],
    )
    assert BlobRef(bytes(32), MAX_BYTES) in file_refs(manifest)
    manifest.dataset.blob.size += 1
    with pytest.raises(ChainError, match=f"{MAX_BYTES + 1} bytes of rows"):
        file_refs(manifest)
    manifest.evaluation.CopyFrom(manifest.dataset)
    manifest.dataset.Clear()
    with pytest.raises(ChainError, match=f"{MAX_BYTES + 1} bytes of rows"):
        file_refs(manifest)


def test_generated_rows_do_not_travel_and_are_the_same_for_every_peer(tmp_path: Path) -> None:
    dataset, held_out = GENERATED | {"seed": 1}, GENERATED | {"seed": 2}
    manifest, store = prepare(tmp_path, dataset=dataset, evaluation=held_out)
    assert (manifest.rows, manifest.dataset.name, manifest.evaluation.name) == (20, "", "")
    assert manifest.digests["dataset"] != manifest.digests["evaluation"]
    section = DatasetSection(name="reasoning_gym:chain_sum", size=20, seed=1)
    rows = read_rows(manifest.dataset, manifest.digests["dataset"], section, None, store)
    assert len(Prompts.from_jsonl(rows)) == 20
    with pytest.raises(MismatchError, match="rows of reasoning_gym:chain_sum are not those"):
        read_rows(manifest.dataset, manifest.digests["evaluation"], section, None, store)
