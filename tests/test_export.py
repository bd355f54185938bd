"""Exports: that they answer as the policy does, wherever they are loaded, and are asked as it was in training."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft import PeftModel
from safetensors.torch import load_file
from support.clean_environment import make_environment
from support.processes import ADDITION
from support.trained_run import MadeRun, byte_level_tokenizer, write_base, write_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hivegrpo.cli.launch_export import launch
from hivegrpo.peer.inference.answering import open_answering
from hivegrpo.peer.inference.card import Form, model_card
from hivegrpo.peer.inference.chat_template import adopt_training_template
from hivegrpo.peer.inference.evaluated import read_evaluation
from hivegrpo.peer.inference.export import Options, export
from hivegrpo.peer.inference.license import base_license, check_license
from hivegrpo.peer.inference.load import load
from hivegrpo.peer.inference.locate import open_run
from hivegrpo.peer.inference.merge import merge
from hivegrpo.peer.inference.origin import read_origin
from hivegrpo.peer.inference.provenance import identity_of, provenance_of
from hivegrpo.peer.inference.push import push, require_login
from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.protocol.config import DatasetSection, LoraSection, ModelSection, RunConfig
from hivegrpo.protocol.errors import ConfigError, HiveError, UnreachableError

BAR = 1e-5
"""Largest difference of logits, over the largest |logit|: an adapter that is merged adds B A to W once, in fp32."""
IDS = [[5, 40, 41, 9, 77, 3, 12, 60]]
TEMPLATE = "\n  {%- for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}\n<assistant>"
MEASURED = {1: {"eval/accuracy": 0.25}, 2: {"reward": 0.5}, 3: {"eval/accuracy": 0.75}}

PROGRAM = Path(__file__).parent / "support" / "loads_exports.py"

ignores_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def made(folder: Path) -> MadeRun:
    write_base(folder / "base")
    return write_run(
        folder / "run", folder / "base", MEASURED, evaluation={"path": "held_out.jsonl", "limit": 80}, grpo={"top_k": 7}
    )


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(torch.tensor(IDS)).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# The same model everywhere.


@pytest.mark.slow
@ignores_peft
def test_exports_answer_like_the_policy_where_only_transformers_and_peft_are(tmp_path: Path) -> None:
    """Of the demo's model, and of one with 24 layers: live, loaded here, and loaded in an environment without us."""
    write_base(tmp_path / "deep", layers=24, spread=0.02)  # as transformers draws it
    expected, worst = {}, 0.0
    for name, base in (("demo", ADDITION / "starter"), ("deep", tmp_path / "deep")):
        out = tmp_path / "exports" / name
        made = write_run(tmp_path / "runs" / name, base)
        live = load(str(made.folder), "latest", "cpu").policy
        expected[name] = logits_of(live.model)
        with live.reference():
            assert difference(logits_of(live.model), expected[name]) > 1e-2, "the adapter does something"
        export(str(made.folder), out / "merged")
        (out / "base").symlink_to(base)
        export(str(made.folder), out / "adapter", options=Options(adapter=True))
        here = {
            "merged": AutoModelForCausalLM.from_pretrained(out / "merged"),
            "adapter": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "base"), out / "adapter"),
        }
        for model in here.values():
            worst = max(worst, difference(logits_of(model), expected[name]))
    python = make_environment(tmp_path / "clean", "transformers", "peft", "torch")
    folders = [str(tmp_path / "exports" / name) for name in expected]
    done = subprocess.run(
        [python, "-I", PROGRAM, json.dumps(IDS), tmp_path / "logits.safetensors", *folders],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    for name, logits in load_file(tmp_path / "logits.safetensors").items():
        worst = max(worst, difference(logits, expected[Path(name).parent.name]))
    assert worst < BAR
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["merged"] == answers["adapter"] != "\n", "the cards' code samples the same with the same seed"


@pytest.mark.parametrize(
    ("options", "dtype"), [(Options(), torch.float32), (Options(dtype="bfloat16"), torch.bfloat16)]
)
def test_merged_weights_have_the_precision_asked_for(
    made: MadeRun, tmp_path: Path, options: Options, dtype: torch.dtype
) -> None:
    export(str(made.folder), tmp_path / "out", options=options)
    live = logits_of(load(str(made.folder), "latest", "cpu").policy.model)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {value.dtype for value in model.parameters()} == {dtype}
    # bfloat16 rounds each weight by up to 2^-9, and here computes in it, too, in two layers.
    assert difference(logits_of(model.float()), live) < (BAR if dtype == torch.float32 else 2e-2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("of what training has changed" in card) == (dtype == torch.bfloat16)


def moved(base: Path, **model: Any) -> Policy:
    """A policy with an adapter in which nothing is zero."""
    policy = Policy.load(base, ModelSection(path=base, **model), LoraSection(r=4), "cpu")
    policy.load_vector(0.1 * torch.randn(policy.size, generator=torch.Generator().manual_seed(1)))
    return policy


def test_what_rounding_costs_is_measured(made: MadeRun) -> None:
    """Against the definition, on weights that are computed here: W + (alpha / r) B A."""
    policy = moved(made.base)
    name = "model.layers.1.mlp.up_proj"
    layer = policy.model.get_submodule(name)
    parts = [layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.base_layer.weight]
    b, a, w = (part.detach().clone() for part in parts)
    exact = merge(policy, torch.float32)
    assert exact.rounding == 0.0
    torch.testing.assert_close(exact.model.get_submodule(name).weight, w + 32.0 / 4 * b @ a)
    rounded = merge(moved(made.base), torch.bfloat16)
    assert torch.equal(rounded.model.get_submodule(name).weight, exact.model.get_submodule(name).weight.bfloat16())
    # W and the change are both some 0.3 to 0.5 in size; a rounding is at most 2^-9 of the sum, 2^-9 / sqrt(3) mostly.
    assert 2**-9 / 4 < rounded.rounding < 2**-9 * 2


def test_a_base_in_four_bits_is_merged_as_what_it_was_trained_as(made: MadeRun) -> None:
    policy = moved(made.base, quantize="nf4")
    live = logits_of(policy.model)
    merged = merge(policy, torch.float32).model
    assert difference(logits_of(merged), live) < BAR
    assert not hasattr(merged.config, "quantization_config")
    assert difference(logits_of(merge(moved(made.base), torch.float32).model), live) > 1e-2, "4 bits are not nothing"


def test_a_head_with_an_adapter_leaves_tied_embeddings_alone(made: MadeRun, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(made.base)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "tied")
    model = ModelSection(path=tmp_path / "tied")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # peft, of what is done right here
        policy = Policy.load(tmp_path / "tied", model, LoraSection(r=4, target_modules=("lm_head", "q_proj")), "cpu")
    policy.load_vector(0.1 * torch.randn(policy.size, generator=torch.Generator().manual_seed(1)))
    live = logits_of(policy.model)
    merge(policy, torch.float32).model.save_pretrained(tmp_path / "out")
    assert difference(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), live) < BAR
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_every_parameter_that_was_trained_is_exported(made: MadeRun, tmp_path: Path) -> None:
    model = {"path": "model", "trainable": "full"}
    run = write_run(tmp_path / "run", made.base, model=model)
    live = load(str(run.folder), "latest", "cpu").policy
    export(str(run.folder), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(exported), logits_of(live.model))
    with pytest.raises(ConfigError, match="no adapter"):
        export(str(run.folder), tmp_path / "adapter", options=Options(adapter=True))
    with pytest.raises(ConfigError, match="--dtype"):
        export(str(run.folder), tmp_path / "adapter", options=Options(adapter=True, dtype="bfloat16"))


# The same prompts everywhere.


@pytest.mark.parametrize(
    ("template", "dataset"),
    [
        (TEMPLATE, {}),
        (TEMPLATE, {"system_prompt": "Add.\n'{{ 1 }}'"}),
        (TEMPLATE, {"prompt_template": "Q: {prompt}\nA:"}),
        (None, {"prompt_template": "Q: {prompt}\nA:"}),
        (None, {}),
    ],
    ids=["own template", "system prompt", "prompt template for its own", "prompt template", "plain"],
)
@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_an_export_is_asked_as_in_training(
    made: MadeRun, tmp_path: Path, template: str | None, dataset: dict[str, str], adapter: bool
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in made.base.iterdir():
        (base / path.name).symlink_to(path)
    if template is not None:
        (base / "chat_template.jinja").write_text(template)
    run = write_run(tmp_path / "run", base, dataset={"path": "rows.jsonl", **dataset})
    training = PromptEncoder(load_tokenizer(base), run.config.dataset)
    export(str(run.folder), tmp_path / "out", options=Options(adapter=adapter))
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in ("12+34=", " two\n", "{{ x }}"):
        asked = exported.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        assert asked["input_ids"] == training.encode(prompt)
        if not adapter:
            assert open_answering(str(tmp_path / "out"), device="cpu").encoder.encode(prompt) == training.encode(prompt)
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "1+1="}]
    text = exported.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    assert ("Mine." in text) == training.chat
    assert ("Add." in text) is False


HOSTILE = (
    "{{ 7 * 7 }}§",
    "'}}{{ raise_exception('mine') }}{{ '§",
    "' + raise_exception('mine') + '§",
    "\\' ~ raise_exception('mine') ~ \\'§\\",
    "§\\",
    "{% for x in range(9) %}§{% endfor %}",
    "{% raw %}§{% endraw %}{#%#}",
    "{%- set messages = [] -%}§\n{{-",
    "\r\n\t§\r \n\n",
    "ü😀\\N{BULLET}\\x41\\u0041\\n§\u2028\x00\x7f\\",
    '"§"',
)
"""§ is where the prompt goes."""


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_run_becomes_template_code(text: str, tmp_path: Path) -> None:
    """As prompt_template and as system_prompt: every character comes out as itself, after saving and loading."""
    path = Path("rows.jsonl")
    plain = DatasetSection(path=path, prompt_template=text.replace("§", "{prompt}"))
    chat = DatasetSection(path=path, system_prompt=text)
    for number, dataset in enumerate((plain, chat)):
        tokenizer = byte_level_tokenizer()
        tokenizer.chat_template = TEMPLATE if dataset is chat else None
        expected = PromptEncoder(tokenizer, dataset).encode("2+2=")
        assert adopt_training_template(tokenizer, dataset)
        tokenizer.save_pretrained(tmp_path / str(number))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(number))
        asked = loaded.apply_chat_template([{"role": "user", "content": "2+2="}], add_generation_prompt=True)
        assert asked["input_ids"] == expected


def test_each_of_several_templates_gets_the_system_prompt() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": f"tools {TEMPLATE}"}
    assert adopt_training_template(tokenizer, DatasetSection(path=Path("rows.jsonl"), system_prompt="Add."))
    for name in ("default", "tool_use"):
        messages = [{"role": "user", "content": "1+1="}]
        text = tokenizer.apply_chat_template(messages, chat_template=name, tokenize=False)
        assert "<system>Add.<user>1+1=" in text


def framing_tokenizer(prepend: str) -> PreTrainedTokenizerFast:
    """As Llama's: <s> before every text and, here, </s> after it; words begin with a space, also the first one."""
    alphabet = ["<s>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127)), "\n", "\r", "\t"]
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme=prepend, split=False)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prepend", ["never", "always"])
@pytest.mark.parametrize("prompt_template", [None, "Q: {prompt}\nA:"])
def test_the_tokenizers_own_special_tokens_are_in_the_template(prepend: str, prompt_template: str | None) -> None:
    dataset = DatasetSection(path=Path("rows.jsonl"), prompt_template=prompt_template)
    tokenizer = framing_tokenizer(prepend)
    expected = PromptEncoder(tokenizer, dataset).encode("2 + 2")
    assert (expected[0], expected[-1]) == (0, 1)
    assert adopt_training_template(tokenizer, dataset)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2"}], add_generation_prompt=True)
    assert asked["input_ids"] == expected


def test_the_space_that_begins_a_text_is_put_back_or_missed() -> None:
    """With "first", the text after <s> does not begin with a space: the template writes one, where that is enough."""
    dataset = DatasetSection(path=Path("rows.jsonl"), prompt_template="Q: {prompt}")
    tokenizer = framing_tokenizer("first")
    expected = PromptEncoder(tokenizer, dataset).encode("2 + 2")
    assert adopt_training_template(tokenizer, dataset)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2"}], add_generation_prompt=True)
    assert asked["input_ids"] == expected
    # Plain prompts that begin with a space already get no second one in training.
    assert not adopt_training_template(framing_tokenizer("first"), DatasetSection(path=Path("rows.jsonl")))


# What is said of it.


def test_the_folder_says_what_it_is(made: MadeRun, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(str(made.folder), tmp_path / "out", "2")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    origin = read_origin(tmp_path / "out")
    root = made.manifest(2).state.root.hex()
    config = RunConfig.from_json(json.dumps(origin.pop("config")))
    assert config == made.config.published()
    assert origin == {
        "format": 1,
        "run": "test",
        "run_id": made.chain.run_id,
        "coordinator": made.coordinator.peer_id,
        "version": 2,
        "state_root": root,
    }
    sampling = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 1.0, 1.0, 7)
    assert (sampling.eos_token_id, sampling.max_new_tokens) == ([1], config.grpo.max_completion_length)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "hivegrpo", "reinforcement-learning"],
    }
    facts = (made.chain.run_id, root, made.coordinator.peer_id, "| contributors | 2, 2 in each version |", "top_k=7")
    for fact in (*facts, "exact_match=1.0", "first 80 held-out rows of `held_out.jsonl", "Cost: "):
        assert fact in card.text
    # Metrics of version 1 are of version 0, those of version 3 of version 2, which is the one exported.
    assert "| version 0 | 25.0% |\n| version 2 | 75.0% |" in card.text
    export(str(made.folder), tmp_path / "first", "0")
    assert "75.0%" not in (tmp_path / "first" / "README.md").read_text()
    export(str(made.folder), tmp_path / "base", "base")
    assert read_origin(tmp_path / "base")["version"] == "base"
    assert "of a run of hivegrpo, as it was before training" in (tmp_path / "base" / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"run": ["a"]}', "no usable run"),
        ('{"run": "' + "a" * 65 + '"}', "no usable run"),
        ('{"version": true}', "no usable version"),
        ('{"version": ' + "1" * 65 + "}", "no usable version"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not a JSON object"),
    ],
    ids=["another type", "long", "no number", "long number", "nested", "a list"],
)
def test_a_damaged_origin_is_explained(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "hivegrpo.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_origin(tmp_path)


def test_names_in_an_origin_are_fit_for_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "hivegrpo.json").write_text(json.dumps({"run": "a\x1b[2J\nb", "version": "\x9b1", "format": 1}))
    assert read_origin(tmp_path) == {"run": "a?[2J b", "version": "?1", "format": 1}


def card_of(made: MadeRun, options: Options | None = None, **sections: dict[str, Any]) -> ModelCard:
    """The card that a run with other settings would have."""
    origin = provenance_of(open_run(made.folder), 3)
    values = json.loads(origin.config.canonical_json())
    for name, table in sections.items():
        values[name] |= table
    options = options or Options()
    measured = options.evaluation
    tables = measured.tables(identity_of(open_run(made.folder), 3)) if measured is not None else ()
    form = Form(options.adapter, "float32", license=options.license, evaluation=tables)
    return ModelCard(model_card(replace(origin, config=RunConfig.model_validate(values)), form))


def test_a_card_names_what_is_on_the_hub(made: MadeRun) -> None:
    hub = {"path": None, "name": "Qwen/Qwen2.5-0.5B", "revision": "main", "quantize": "nf4"}
    rows = {"path": None, "name": "openai/gsm8k", "config": "main"}
    card = card_of(made, Options(adapter=True, license="apache-2.0"), model=hub, dataset=rows)
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "adapter",
        "datasets": "openai/gsm8k",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "hivegrpo", "reinforcement-learning"],
    }
    assert "from_pretrained('Qwen/Qwen2.5-0.5B', revision='main', dtype=\"float32\", quantization_config=" in card.text
    generated = card_of(made, dataset={"path": None, "name": "reasoning_gym:chain_sum", "size": 5, "seed": 1})
    assert "datasets" not in generated.data.to_dict()


def test_what_strangers_named_stays_a_value(made: MadeRun) -> None:
    """In the front matter, and in the text, whose headings are ours alone."""
    evil = 'x"\nlicense: mit\n---\n# Mine\n`<b>`|'
    card = card_of(made, model={"path": None, "name": evil, "revision": evil}, dataset={"path": None, "name": evil})
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# test", "## Use", "## Training", "## Evaluation", "## Verify"]
    rows = [line for line in card.text.splitlines() if line.startswith("| base |")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 3


@pytest.mark.parametrize("name", ["a\\|![x](http://y)", "a\\\\|b", "\\", "a`\\|`b", "|" * 3, "\\|" * 3])
def test_no_value_ends_its_cell(made: MadeRun, name: str) -> None:
    card = card_of(made, dataset={"path": None, "name": name})
    [row] = [line for line in card.text.splitlines() if line.startswith("| dataset |")]
    cells = re.findall(r"((?:\\.|[^\\|])+)\|", row.removeprefix("|"))  # as GFM takes a row apart
    assert len(cells) == 2
    assert cells[1].strip().startswith("`")
    assert cells[1].strip().endswith("`")
    assert cells[1].count("`") == 2


def measurement(folder: Path, identity: dict[str, str]) -> Path:
    """What `hivegrpo evaluate` writes of one model, with a little more."""
    path = folder / "results.json"
    score = {"revision": "latest", "metric": "pass@4", "value": 0.5, "low": 0.25, "high": 0.75, "interval": "wilson"}
    clean = {"problems": 7, "value": 0.4, "low": 0.1, "high": 0.7}
    benchmark = {"name": "a|b", "problems": 8, "scores": [score | {"clean": None}, score | {"clean": clean}], "more": 1}
    models = [{"revision": "latest", "title": "this one, version 3", "identity": identity}]
    path.write_text(json.dumps({"format": 1, "level": 0.95, "models": models, "benchmarks": [benchmark]}))
    return path


def test_a_measurement_is_a_table(made: MadeRun, tmp_path: Path) -> None:
    path = measurement(tmp_path, identity_of(open_run(made.folder), 3))
    card = card_of(made, Options(evaluation=read_evaluation(path)))
    first = "| `this one, version 3` | `pass@4` | `50.0% [25.0%, 75.0%]` |  |"
    assert f"|---|---|---|---|\n{first}\n{first[:-3]} `40.0% [10.0%, 70.0%]` |" in card.text
    assert ", 8 problems` | `figure` | `mean [95% interval]` | `without what training has seen` |" in card.text
    for wrong in ("[1]", "{", "", "{}", '{"format": 2, "level": 0.95, "models": [], "benchmarks": []}'):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"results\.json"):
            read_evaluation(path)


@pytest.mark.parametrize("revision", ["2", "base"])
def test_a_measurement_of_another_model_is_refused(made: MadeRun, tmp_path: Path, revision: str) -> None:
    measured = read_evaluation(measurement(tmp_path, identity_of(open_run(made.folder), 3)))
    with pytest.raises(ConfigError, match="it measured this one, version 3"):
        export(str(made.folder), tmp_path / "to", revision, Options(evaluation=measured))
    assert not (tmp_path / "to").exists()
    measured = read_evaluation(measurement(tmp_path, identity_of(open_run(made.folder), None)))
    if revision == "base":
        export(str(made.folder), tmp_path / "to", revision, Options(evaluation=measured))
        assert "this one" in (tmp_path / "to" / "README.md").read_text()


MERGES = (
    "---\n"
    + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" if n else "a0: &a0 {b: c}\n" for n in range(12))
    + "---\n"
)
"""9^11 copies of a key, for a parser of YAML."""


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: 'My own; see below'\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("# A model under the MIT licence\n", None),
        ("\n---\r\ntags: [a]\r\nlicense: 'mit' \r\n---\r\n", "mit"),
        ("---\nlicense: mit\nlicense: apache-2.0\n---\n", None),
        ("---\nother:\n  license: mit\n---\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),
        (f"---\n{'a' * (1 << 16)}: b\nlicense: mit\n---\n", None),
        (MERGES, None),
        (None, None),
    ],
)
def test_a_licence_is_what_the_bases_card_says(tmp_path: Path, card: str | None, named: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_license(tmp_path) == named


def test_a_licence_that_is_none_is_refused() -> None:
    assert check_license("llama3.2") == "llama3.2"
    with pytest.raises(ConfigError, match="identifier"):
        check_license("MIT, more or less\n")


# The hub.


class Hub:
    """A hub that notes what it is asked."""

    def __init__(self, trouble: Exception | None = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.trouble = trouble

    def whoami(self) -> dict[str, str]:
        self.asked.append(("whoami",))
        if self.trouble is not None:
            raise self.trouble
        return {"name": "ann"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.asked.append(("create_repo", repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.asked.append(("upload_folder", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        if self.trouble is not None:
            raise self.trouble


def refusal(status: int) -> HfHubHTTPError:
    import httpx2

    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))
    return HfHubHTTPError(f"{status}: no\nmore", response=response)


def test_an_export_is_pushed_when_that_is_asked_for(
    made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    flags: dict[str, Any] = {"adapter": True, "dtype": None, "license": "mit", "evaluation": None}
    launch(str(made.folder), tmp_path / "out", "latest", push=None, **flags)
    assert hub.asked == []
    launch(str(made.folder), tmp_path / "pushed", "latest", push="ann/model", **flags)
    files = sorted(path.name for path in (tmp_path / "pushed").iterdir())
    assert hub.asked == [
        ("whoami",),
        ("create_repo", "ann/model", True, True),
        ("upload_folder", "ann/model", files),
    ]
    assert "adapter_model.safetensors" in files
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(tmp_path / "out"), str(tmp_path / "pushed")]
    assert "https://hub/ann/model" in captured.err


@pytest.mark.parametrize(
    ("trouble", "error", "says"),
    [
        (LocalTokenNotFoundError("no token"), ConfigError, "hf auth login"),
        (refusal(403), ConfigError, "refuses: 403: no. "),
        (refusal(503), UnreachableError, "fails: 503: no. "),
        (ConnectionError("offline"), UnreachableError, "does not answer: offline. "),
    ],
)
def test_what_the_hub_does_not_do_is_explained(
    tmp_path: Path, trouble: Exception, error: type[HiveError], says: str
) -> None:
    with pytest.raises(error) as failure:
        require_login(Hub(trouble), "ann/model")
    assert says in str(failure.value)
    assert "Nothing was exported" in str(failure.value)
    with pytest.raises(error) as failure:
        push(Hub(trouble), tmp_path, "ann/model")
    assert says in str(failure.value)
    assert f"hf upload ann/model {tmp_path}" in str(failure.value)


def test_a_hub_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(UnreachableError, match="does not answer"):
        require_login(HfApi(endpoint="http://127.0.0.1:9", token="hf_none"), "ann/model")
    with pytest.raises(ConfigError, match="not the name of a model"):
        require_login(Hub(), "ann/model/of/mine")


@pytest.mark.parametrize(
    ("flag", "says"), [({"license": "My own"}, "identifier"), ({"evaluation": Path("gone.json")}, "gone.json")]
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    flag: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr("hivegrpo.peer.inference.export.export", never)
    flags: dict[str, Any] = {"adapter": False, "dtype": None, "license": None, "evaluation": None, "push": None}
    with pytest.raises(ConfigError, match=says):
        launch(None, tmp_path / "out", "latest", **(flags | flag))
