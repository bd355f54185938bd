"""Code that loads an export and asks it something, for its card: a test runs it where hivegrpo is not installed."""

from hivegrpo.protocol.config import ModelSection


def loading_code(model: ModelSection, *, adapter: bool, prompt: str | None = None) -> str:
    """Python for transformers, and peft for an adapter on the base that `model` names.

    prompt: what is asked, if it is short and plain; strangers wrote it, and it stands in a card's block of code.
    """
    plain = prompt is not None and len(prompt) <= MOST_CHARACTERS and prompt.isascii() and "`" not in prompt
    asked = ASK.format(prompt=repr(prompt) if plain else '"2+2="')
    return "\n".join([*(_adapter(model) if adapter else MERGED), asked])


def _adapter(model: ModelSection) -> list[str]:
    """A base that came with the run has no name that others could load it by: it is exported, too."""
    imported = ["AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"]
    arguments = [repr(model.name) if model.name else "base", f'dtype="{model.dtype}"']
    lines = [FOLDER] if model.name else [FOLDER, BASE]
    if model.revision:
        arguments.insert(1, f"revision={model.revision!r}")
    if model.quantize:
        imported.insert(2, "BitsAndBytesConfig")
        kind = f'bnb_4bit_quant_type="{model.quantize}", bnb_4bit_compute_dtype="{model.dtype}"'
        lines.append(f"quantization = BitsAndBytesConfig(load_in_4bit=True, {kind})")
        arguments.append("quantization_config=quantization")
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(imported)}",
        "",
        *lines,
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})",
        "model = PeftModel.from_pretrained(model, folder)",
    ]


FOLDER = 'folder = "."  # this folder, or its name on the hub'
BASE = 'base = "base"  # the run\'s own'
MERGED = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
    "",
    FOLDER,
    "model = AutoModelForCausalLM.from_pretrained(folder)",
)
ASK = """\
tokenizer = AutoTokenizer.from_pretrained(folder)

messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(
    inputs["input_ids"],
    attention_mask=inputs["attention_mask"],
    generation_config=GenerationConfig.from_pretrained(folder),
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
"""The template gives the training's prompts, the generation config its sampling."""
MOST_CHARACTERS = 200
