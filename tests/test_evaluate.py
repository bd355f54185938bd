"""Evaluations: of a model whose chances are known (support/coin.py), of a run, interrupted, and as a command."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import comb, sqrt
from pathlib import Path
from typing import Any

import pytest
from support.coin import CHANCES, LETTERS, write_coin, write_letters
from support.trained_run import MadeRun, write_base, write_run

from hivegrpo.cli.main import main
from hivegrpo.peer.evaluation import sampling
from hivegrpo.peer.evaluation.estimators import pass_at_k
from hivegrpo.peer.evaluation.evaluation import SAMPLES, evaluate
from hivegrpo.peer.evaluation.ledger import Ledger
from hivegrpo.peer.evaluation.problems import load_problems
from hivegrpo.peer.evaluation.settings import BenchmarkSection, EvaluateConfig
from hivegrpo.peer.evaluation.training import training_prompts
from hivegrpo.peer.inference.locate import LocalRun, open_run
from hivegrpo.peer.inference.remote import mirror_run
from hivegrpo.peer.learn.sampler import sample_within
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import serve_blobs
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.errors import BusyError, ConfigError
from hivegrpo.protocol.homes import locked_home, run_folder
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

EXAMPLE = Path(__file__).parents[1] / "examples" / "addition" / "evaluate.toml"
HELD_OUT = b"".join(b'{"answer":"%d","prompt":"%d+1="}\n' % (number + 1, number) for number in range(5))


@pytest.fixture(scope="module")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coin")
    write_coin(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    folder = tmp_path_factory.mktemp("run")
    write_base(folder / "base")
    return write_run(folder / "run", folder / "base", held_out=HELD_OUT)


@pytest.fixture
def made(original: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """The latest run of a state folder."""
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))
    return original.copy_to(run_folder(original.chain.run_id))


@dataclass
class Watched:
    """What an evaluation told, and how many completions it sampled."""

    told: list[tuple[str, int, int]] = field(default_factory=list)
    sampled: int = 0

    def show(self, what: str, done: int, total: int) -> None:
        self.told.append((what, done, total))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched()

    def counted(*arguments: Any) -> Any:
        completions = sample_within(*arguments)
        found.sampled += len(completions)
        return completions

    monkeypatch.setattr(sampling, "sample_within", counted)
    return found


def measure(
    model: Path, to: Path, watched: Watched, tokens: int = 65_536, seed: int = 0, **benchmark: Any
) -> dict[str, Any]:
    """The results of one benchmark."""
    section = {"reward": "exact_match", "max_completion_length": 4} | benchmark
    config = EvaluateConfig.of({"benchmark": [section], "seed": seed}, "")
    settings = PeerConfig(device="cpu", sampling_tokens=tokens)
    _, results = evaluate(str(model), ["latest"], config, settings, to, watched.show)
    [measured] = results["benchmarks"]
    return dict(measured)


def scores(benchmark: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["metric"]: score for score in benchmark["scores"]}


def ledgers(folder: Path) -> dict[str, set[bytes]]:
    """The lines of each file of samples."""
    return {path.name: set(path.read_bytes().splitlines()) for path in (folder / SAMPLES).iterdir()}


def test_pass_at_k_is_the_closed_form_s(coin: Path, tmp_path: Path, watched: Watched) -> None:
    """Of problems with the chances p, pass@k is the mean of 1 - (1 - p)^k, within four standard deviations.

    That is of the sampling alone; the interval, which is of the problems' choice too, is wider.
    """
    n, ks, repeats = 64, [1, 4, 16], 12
    benchmark = measure(coin, tmp_path, watched, source=str(write_letters(tmp_path / "p.jsonl", LETTERS * repeats)),
                        n=n, k=ks)  # fmt: skip
    found = scores(benchmark)
    for k in ks:
        truth = sum(1.0 - (1.0 - p) ** k for p in CHANCES) / len(CHANCES)
        variance = 0.0
        for p in CHANCES:
            chances = [comb(n, c) * p**c * (1.0 - p) ** (n - c) for c in range(n + 1)]
            squares = sum(chance * pass_at_k(n, c, k) ** 2 for c, chance in enumerate(chances))
            variance += (squares - (1.0 - (1.0 - p) ** k) ** 2) / repeats
        score = found[f"pass@{k}"]
        assert abs(score["value"] - truth) < 4.0 * sqrt(variance) / len(CHANCES)
        assert score["low"] < truth < score["high"]
    # Greedily, y is taken where it is likelier than n; at exactly one half the two logits are the same.
    assert [row["greedy"] for row in benchmark["per_problem"]["latest"]][: len(LETTERS)] == [
        int(p > 0.5) for p in CHANCES[:6]
    ] + benchmark_tie(benchmark) + [1, 1, 1]
    sampled = benchmark["completions"][0]["sampled"]
    assert (sampled["count"], sampled["clipped"], sampled["unscored"]) == (n * repeats * len(LETTERS), 0, 0)


def benchmark_tie(benchmark: dict[str, Any]) -> list[int]:
    """What came of the problem of chance one half."""
    return [benchmark["per_problem"]["latest"][CHANCES.index(0.5)]["greedy"]]


def test_the_majority_is_right_where_the_model_mostly_is(coin: Path, tmp_path: Path, watched: Watched) -> None:
    """Of k odd votes for y or n, y has the majority with a binomial's upper half."""
    n, k = 64, 15
    file = write_letters(tmp_path / "p.jsonl", "d" * 60 + "i" * 60)
    found = scores(measure(coin, tmp_path, watched, source=str(file), greedy=False, n=n, k=[k]))[f"maj@{k}"]
    truth = [sum(comb(k, c) * p**c * (1 - p) ** (k - c) for c in range(k // 2 + 1, k + 1)) for p in (0.2, 0.8)]
    # A vote's own variance bounds that of the mean over subsets.
    sigma = sqrt(sum(share * (1 - share) for share in truth) / 60) / 2
    assert abs(found["value"] - sum(truth) / 2) < 4.0 * sigma


def test_a_completion_depends_on_nothing_but_its_problem(coin: Path, tmp_path: Path, watched: Watched) -> None:
    """Not on the batch, on how many samples or problems there are, nor on what else is missing."""
    file = str(write_letters(tmp_path / "p.jsonl"))
    measure(coin, tmp_path / "whole", watched, source=file, n=6)
    assert watched.sampled == len(LETTERS) * 7
    measure(coin, tmp_path / "narrow", watched, tokens=30, source=file, n=6)
    assert ledgers(tmp_path / "narrow") == ledgers(tmp_path / "whole")
    watched.sampled = 0
    for settings in ({"n": 2, "limit": 3}, {"n": 4, "limit": 7}, {"n": 6}):
        measure(coin, tmp_path / "grown", watched, source=file, **settings)
    assert watched.sampled == len(LETTERS) * 7
    assert ledgers(tmp_path / "grown") == ledgers(tmp_path / "whole")


def test_an_interrupted_evaluation_goes_on_and_repeats_nothing(
    coin: Path, tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write_letters(tmp_path / "p.jsonl"))
    uninterrupted = measure(coin, tmp_path / "whole", watched, source=file, n=4)
    watched.sampled = 0
    counted = sampling.sample_within

    def interrupted(*arguments: Any) -> Any:
        if watched.sampled >= 24:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(sampling, "sample_within", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(coin, tmp_path / "cut", watched, tokens=40, source=file, n=4)
    assert watched.sampled == 26  # ten greedy ones and four problems, two a batch
    monkeypatch.setattr(sampling, "sample_within", counted)
    [torn] = [path for path in (tmp_path / "cut" / SAMPLES).iterdir() if path.read_bytes().count(b"\n") == 17]
    torn.write_bytes(torn.read_bytes()[:-9])  # of the last line, which is a sample of the fourth problem
    again = measure(coin, tmp_path / "cut", watched, source=file, n=4)
    assert watched.sampled == len(LETTERS) * 5 + 1
    assert ledgers(tmp_path / "cut") == ledgers(tmp_path / "whole")
    assert again == uninterrupted
    assert measure(coin, tmp_path / "cut", watched, source=file, n=4) == uninterrupted
    assert watched.sampled == len(LETTERS) * 5 + 1
    assert watched.told[-1][1:] == (50, 50)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 2.0}, {"top_k": 1}, {"prompt_template": "x{prompt}"}, {"max_completion_length": 3}],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_has_another_file(coin: Path, tmp_path: Path, watched: Watched, change: dict[str, Any]) -> None:
    file = str(write_letters(tmp_path / "p.jsonl", "eg"))
    measure(coin, tmp_path, watched, source=file, greedy=False, n=2)
    before = ledgers(tmp_path)
    measure(coin, tmp_path, watched, source=file, greedy=False, n=2, **change)
    assert watched.sampled == 8
    assert len(ledgers(tmp_path)) == 2
    assert before.items() < ledgers(tmp_path).items()


@pytest.mark.parametrize("line", ["[" * 100_000, "{", "5"], ids=["nested", "cut", "number"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    ledger = Ledger.open(tmp_path, {"model": "a"}, str)
    ledger.close()
    ledger.path.write_bytes(ledger.path.read_bytes() + f"{line}\n".encode())
    with pytest.raises(ConfigError, match="Line 2 of"):
        Ledger.open(tmp_path, {"model": "a"}, str)


def test_another_seed_is_for_samples_alone(coin: Path, tmp_path: Path, watched: Watched) -> None:
    file = str(write_letters(tmp_path / "p.jsonl"))
    first = measure(coin, tmp_path, watched, source=file, n=6)
    watched.sampled = 0
    second = measure(coin, tmp_path, watched, source=file, n=6, seed=1)
    assert watched.sampled == 6 * len(LETTERS)
    assert first["per_problem"] != second["per_problem"]


def test_a_damaged_file_of_samples_is_refused(coin: Path, tmp_path: Path, watched: Watched) -> None:
    file = str(write_letters(tmp_path / "p.jsonl", "eg"))
    measure(coin, tmp_path, watched, source=file)
    [path] = (tmp_path / SAMPLES).iterdir()
    header, first, second = path.read_bytes().splitlines()
    for lines, number in (([header, b"{}", second], 2), ([header, first, b"\xff"], 3), ([first, second], 1)):
        path.write_bytes(b"\n".join((*lines, b"")))
        with pytest.raises(ConfigError, match=f"Line {number} of "):
            measure(coin, tmp_path, watched, source=file)


def test_only_one_evaluation_writes_to_a_folder(coin: Path, tmp_path: Path, watched: Watched) -> None:
    file = str(write_letters(tmp_path / "p.jsonl", "eg"))
    with locked_home(tmp_path / "to"), pytest.raises(BusyError):
        measure(coin, tmp_path / "to", watched, source=file)


def test_what_is_cut_or_does_not_fit_is_counted(coin: Path, tmp_path: Path, watched: Watched) -> None:
    """The model looks back at 16 tokens. A prompt that does not fit counts as not solved."""
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": prompt, "answer": "y"} for prompt in ("j", "", "i" * 15, "i" * 14, "j")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure(coin, tmp_path, watched, source=str(file), max_completion_length=2, n=3)
    assert found["completions"][0]["unfit"] == [1, 2]
    assert found["completions"][0]["greedy"] == {"count": 3, "clipped": 0, "share_clipped": 0.0, "unscored": 0}
    assert scores(found)["greedy"]["value"] == 3 / 5
    assert "solved" not in found["per_problem"]["latest"][1]
    cut = measure(coin, tmp_path, watched, source=str(file), max_completion_length=1, n=3)
    assert cut["completions"][0]["unfit"] == [1]
    assert cut["completions"][0]["sampled"] == {"count": 12, "clipped": 12, "share_clipped": 1.0, "unscored": 0}


def test_completions_without_a_score_are_counted_and_never_all_of_them(
    coin: Path, tmp_path: Path, watched: Watched
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "j", "answer": "7"}\n{"prompt": "j", "answer": "seven"}\n')
    found = measure(coin, tmp_path, watched, source=str(file), reward="gsm8k_answer")
    assert found["completions"][0]["greedy"]["unscored"] == 1
    assert scores(found)["greedy"]["value"] == 0.0
    file.write_text('{"prompt": "j", "answer": "seven"}\n')
    with pytest.raises(ConfigError, match="gave no score to any of the 1 completions"):
        measure(coin, tmp_path, watched, source=str(file), reward="gsm8k_answer")


def test_a_run_s_versions_are_compared_on_its_held_out_rows(made: MadeRun, tmp_path: Path, watched: Watched) -> None:
    config = EvaluateConfig.of({"benchmark": [{"n": 2}, {"source": "addition:3", "size": 4}]}, "")
    folder, results = evaluate(None, ["base", "0", "3"], config, PeerConfig(device="cpu"), None, watched.show)
    assert folder == tmp_path / "state" / "evaluations" / made.chain.run_id[:16]
    held_out, addition = results["benchmarks"]
    assert (held_out["name"], held_out["problems"]) == ("held out", 3)  # the run's limit
    assert addition["problems"] == 4
    assert [model["identity"].get("state_root") for model in results["models"]] == [
        None, *(made.manifest(version).state.root.hex() for version in (0, 3))
    ]  # fmt: skip
    assert [(each["revision"], each["against"]) for each in addition["differences"]] == [("0", "base"), ("3", "base")]
    # Version 0 is the base: the same completions, from the same noise.
    texts = {
        json.loads(lines[0])["model"].get("state_root"): [json.loads(line)["text"] for line in lines[1:]]
        for path in (folder / SAMPLES).iterdir()
        if len(lines := path.read_text().splitlines()) == 7
    }
    assert len(texts) == 3
    assert texts[None] == texts[made.manifest(0).state.root.hex()] != texts[made.manifest(3).state.root.hex()]
    assert held_out["contamination"]["training_rows"] == 1


def test_a_revision_that_cannot_be_had_is_told_before_anything_is_sampled(
    made: MadeRun, tmp_path: Path, watched: Watched
) -> None:
    config = EvaluateConfig.of({"benchmark": [{}]}, "")
    with pytest.raises(ConfigError, match="Version 1 cannot be had"):
        evaluate(str(made.folder), ["base", "1"], config, PeerConfig(device="cpu"), tmp_path, watched.show)
    assert watched.sampled == 0


def test_figures_are_given_without_problems_that_were_trained_on(
    made: MadeRun, tmp_path: Path, watched: Watched
) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": prompt, "answer": "46"} for prompt in ("12+34=", "1+2=", " 12+34=\n", "2+1=")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure(made.folder, tmp_path, watched, source=str(file), n=2)
    assert found["contamination"] == {
        "checked": True, "count": 2, "share": 0.5, "training_rows": 1, "exact": (0, 2), "overlapping": (), "short": 4,
        "common": 0,
    }  # fmt: skip
    assert [score["clean"]["problems"] for score in found["scores"]] == [2, 2, 2, 2]
    made.blob(made.chain.manifest.message.dataset.blob).write_bytes(b"x" * len(b'{"answer":"46","prompt":"12+34="}\n'))
    found = measure(made.folder, tmp_path, watched, source=str(file), n=2)
    assert "are damaged" in found["contamination"]["why"]
    made.blob(made.chain.manifest.message.dataset.blob).unlink()
    found = measure(made.folder, tmp_path, watched, source=str(file), n=2)
    assert "not on this machine" in found["contamination"]["why"]
    assert found["scores"][0]["clean"] is None


def test_an_address_offers_the_rows_too(original: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched for an evaluation, and for nothing else."""
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path))
    manifest = original.chain.manifest.message
    refs = [ref_of(file.blob) for file in (manifest.dataset, manifest.evaluation)]

    async def mirror(rows: bool) -> LocalRun:
        network = MemoryNetwork()
        coordinator = network.join(original.coordinator)
        await serve_chain(coordinator, original.chain)
        await serve_blobs(coordinator, BlobStore(original.home / "blobs"))

        async def connect() -> Transport:
            return network.join(Identity.generate())

        return open_run(await mirror_run(coordinator.addresses()[0], "base", connect, rows=rows))

    assert [asyncio.run(mirror(rows=False)).has(ref) for ref in refs] == [False, False]
    run = asyncio.run(mirror(rows=True))
    assert [run.has(ref) for ref in refs] == [True, True]
    assert len(load_problems(BenchmarkSection(), run).rows) == 3
    assert list(training_prompts(run, None, None)) == ["12+34="]


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`hivegrpo evaluate`: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hivegrpo", "evaluate", *arguments])
        monkeypatch.setattr("hivegrpo.cli.output.structlog.configure", lambda **settings: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, out, err

    return run


def test_the_command_prints_a_table_and_writes_results_and_plot(made: MadeRun, tmp_path: Path, call: Call) -> None:
    arguments = ("--to", str(tmp_path / "to"), "-n", "3", "-k", "2", "--device", "cpu")
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "base - " not in out
    assert "latest - base" in out
    assert "held out, 3 problems" in out
    for metric in ("greedy", "pass@2", "maj@2"):
        assert any(line.split()[:1] == [metric] for line in out.splitlines())
    assert (tmp_path / "to" / "results.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = call(*arguments, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "to" / "results.json").read_text())
    assert str(tmp_path / "to") in err


def test_ctrl_c_says_that_it_goes_on(
    made: MadeRun, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "sample_within", interrupt)
    code, out, err = call("--to", str(tmp_path / "to"))
    assert (code, out) == (130, "")
    assert "goes on from here" in err
    assert not (tmp_path / "to" / "results.json").exists()


def test_the_example_measures_the_demo_s_run(made: MadeRun, tmp_path: Path, watched: Watched) -> None:
    """Here of a made run that is none, on the first problems."""
    config = EvaluateConfig.load(EXAMPLE)
    few = config.model_copy(update={"benchmark": tuple(
        section.model_copy(update={"limit": 3, "n": min(section.n, 4), "k": ()}) for section in config.benchmark
    )})  # fmt: skip
    _, results = evaluate(str(made.folder), ["base", "latest"], few, PeerConfig(device="cpu"), tmp_path, watched.show)
    assert [(each["name"], each["problems"]) for each in results["benchmarks"]] == [
        ("held out", 3), ("addition:3", 3), ("reasoning_gym:chain_sum", 3)
    ]  # fmt: skip
    assert all(
        score["low"] <= score["value"] <= score["high"] for each in results["benchmarks"] for score in each["scores"]
    )


def test_several_benchmarks_come_from_a_file(coin: Path, tmp_path: Path, call: Call) -> None:
    write_letters(tmp_path / "p.jsonl")
    file = tmp_path / "evaluate.toml"
    text = """
        [[benchmark]]
        name = "letters"
        source = "p.jsonl"
        reward = "exact_match"
        max_completion_length = 2
        [[benchmark]]
        source = "addition:1"
        size = 5
        prompt_template = "{prompt}"
        max_completion_length = 4
        [training]
        path = "p.jsonl"
    """
    file.write_text(text)
    code, out, err = call(str(coin), "--config", str(file), "--to", str(tmp_path / "to"))
    assert code == 0, err
    assert "letters, 10 problems" in out
    assert "addition:1, 5 problems" in out
    assert "10 (100.0%) occur in the 10 training rows" in out
    file.write_text(text.replace("reward", "rewad"))
    code, _, err = call(str(coin), "--config", str(file))
    assert code == 78
    assert 'no key "rewad" (did you mean "reward"?)' in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--revision", "17"), "Available are 0, 2-3"),
        (("--revision", "newest"), "is not a revision"),
        (("--revision", "0", "--revision", "0"), "named twice"),
        (("--data", "addition:many"), "a number of digits"),
        (("--data", "reasoning_gym:nothing"), "does not exist"),
        (("--data", "nothing.jsonl"), "nothing.jsonl cannot be read"),
        (("-n", "2", "-k", "3"), "each k is 1 to n"),
        (("-k", "3"), "set n"),
        (("--data", "addition:2", "--config", "evaluate.toml"), "--config says"),
        (("--reward", "nothing"), "no reward function"),
        (("--data", "addition:1", "--reward", "reasoning_gym:countdown"), "needs the column metadata"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("made")
def test_mistakes_are_explained(arguments: tuple[str, ...], says: str, call: Call) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (78, "")
    assert says in err
