"""The addition demo's problems and starter model, as they ship."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ADDITION = Path(str(files("hivegrpo.cli") / "addition"))
STARTER = ADDITION / "starter"


def problems(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ADDITION / name).read_text().splitlines()]


def operands(problem: dict[str, str]) -> tuple[int, int]:
    a, b = problem["prompt"].removesuffix("=").split("+")
    return int(a), int(b)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(STARTER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(STARTER)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The figures were taken on one thread, and the model is too small to gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_ordinary_folder_under_4_mb() -> None:
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in STARTER.iterdir()} == expected
    assert sum(path.stat().st_size for path in STARTER.iterdir()) < 4_000_000


def test_an_fp32_qwen2_under_a_million_parameters(model: PreTrainedModel) -> None:
    assert model.config.model_type == "qwen2"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_every_printable_byte_is_one_token_and_comes_back(tokenizer: PreTrainedTokenizerBase) -> None:
    printable = "".join(chr(code) for code in range(32, 127)) + "\n"
    for text in (printable, printable[::-1], " 1  2\n\n\t3 ", "12+34="):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text


def test_bytes_beyond_ascii_come_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "é ∑ 蜂 🐝"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_end_and_padding_are_distinct_and_agree_with_the_model(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_problems_are_two_digit_sums_without_repeats(name: str) -> None:
    rows = problems(name)
    for row in rows:
        a, b = operands(row)
        assert row == {"prompt": f"{a}+{b}=", "answer": str(a + b)}
        assert 10 <= a <= 99
        assert 10 <= b <= 99
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_no_held_out_problem_is_in_the_training_set_in_either_order() -> None:
    train = {operands(row) for row in problems("train.jsonl")}
    heldout = {operands(row) for row in problems("heldout.jsonl")}
    assert len(heldout) == 500
    assert train.isdisjoint(heldout)
    assert train.isdisjoint({(b, a) for a, b in heldout})


@pytest.mark.usefixtures("one_thread")
def test_the_starter_is_neither_lost_nor_finished(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = problems("heldout.jsonl")
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    output = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    answers = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True))
    assert 0.25 <= right / len(rows) <= 0.45
