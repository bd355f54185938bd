"""A program for an environment without us: loads folders of exports, and runs the code in their cards.

`python loads_exports.py IDS LOGITS FOLDER...`: each FOLDER has `merged`, `adapter` and `base` in it. Writes the logits
of the token ids to the file LOGITS, by "FOLDER/merged" and "FOLDER/adapter", and prints what the cards' code of the
first folder prints, as JSON.
"""

import contextlib
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path

OURS = ("hivegrpo", "hivemind", "structlog")
SEED = "torch.manual_seed(0)\n"


def main() -> None:
    for name in OURS:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
            sys.exit(f"{name} is here")
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    ids, file, folders = torch.tensor(json.loads(sys.argv[1])), sys.argv[2], sys.argv[3:]
    logits = {}
    with torch.no_grad():
        for folder in folders:
            merged, base = (AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}") for kind in ("merged", "base"))
            logits[f"{folder}/merged"] = merged(ids).logits.contiguous()
            adapted = PeftModel.from_pretrained(base, f"{folder}/adapter")
            logits[f"{folder}/adapter"] = adapted(ids).logits.contiguous()
    save_file(logits, file)
    print(json.dumps({kind: answer(Path(folders[0]) / kind) for kind in ("merged", "adapter")}))


def answer(folder: Path) -> str:
    """What a card's code prints, from one seed, where it runs in the export's folder and the base is beside that."""
    import torch

    os.chdir(folder)
    found = re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = found[1].replace('"base"', '"../base"').replace("output = ", f"{SEED}output = ")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {"torch": torch})
    return said.getvalue()


if __name__ == "__main__":
    main()
