"""Engines: how each is started, and how it is asked.

Both are asked through /v1/completions with a prompt that is encoded already, so that the prompt is the training's in
either, and both always stream, because only a stream that is hung up on ends the work on it. What `transformers serve`
5.23 does, by its source:

- It computes one answer after the other; its continuous batching gives every request the sampling of the first.
- Temperature and top_p count only if the model's generation config samples, so a whole config goes with each request.
- `seed` sets the generator of the whole process when the request comes in: with one request at a time it is exact.
- `n`, presence_penalty and others are ignored; a stop string stays in the text; too long a prompt is computed.
- Chat parses answers of known families, and leaves special tokens in them where a model ends on another token.
- A stream has neither `[DONE]` nor, where it fails, always valid JSON.
"""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from typing import Any, Protocol

from hivegrpo.peer.serving.prompts import Encoded
from hivegrpo.peer.serving.sampling import Defaults, Sampling
from hivegrpo.peer.serving.settings import EngineName
from hivegrpo.protocol.errors import ConfigError

MODEL = "."
"""What engines call the model: the folder that they run in. A path with @ or : in it means something else to them."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
OURS = "HIVEGRPO_"
"""Prefix of variables that are no business of an engine's."""


class Dialect(Protocol):
    """One kind of engine."""

    @property
    def slots(self) -> int:
        """Answers that it computes at once."""

    def command(self, port: int) -> list[str]:
        """Its command line, to be run in the exported folder; it listens on loopback."""

    def payload(self, prompt: Encoded, sampling: Sampling, defaults: Defaults) -> dict[str, Any]:
        """The body of a request to /v1/completions."""


@dataclass(frozen=True, slots=True)
class Transformers:
    """`transformers serve`."""

    device: str
    slots: int = 1

    def command(self, port: int) -> list[str]:
        program = [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve", MODEL]
        return [*program, "--host", "127.0.0.1", "--port", str(port), "--device", self.device, "--log-level", "error"]

    def payload(self, prompt: Encoded, sampling: Sampling, defaults: Defaults) -> dict[str, Any]:
        config = {"top_k": 0, "do_sample": sampling.temperature > 0.0, **defaults.settings}
        if sampling.temperature > 0.0:
            config |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        else:
            config |= {"top_k": None, "min_p": None}
        return {
            "model": MODEL,
            "prompt": prompt.text,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed,
            "generation_config": json.dumps({**config, "max_new_tokens": sampling.max_tokens}),
            "stream": True,
        }


@dataclass(frozen=True, slots=True)
class Vllm:
    """`vllm serve`, which takes its defaults from generation_config.json as well."""

    slots: int = 64

    def command(self, port: int) -> list[str]:
        program = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL]
        return [*program, "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]

    def payload(self, prompt: Encoded, sampling: Sampling, defaults: Defaults) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": prompt.ids,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def choose_dialect(engine: EngineName, device: str) -> Dialect:
    """ConfigError if the engine is not installed, or has no choice of a device."""
    if engine == "transformers":
        return Transformers(device)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed.", "Install it (pip install vllm), or leave out --engine.")
    if device != "auto":
        raise ConfigError("vLLM takes the device that it was built for.", "Leave out --device.")
    return Vllm()


def engine_environment() -> dict[str, str]:
    """This process's environment without our own settings, of which one is the clients' key; no hub is asked.

    Settings are read from variables in any case.
    """
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(OURS)} | ENVIRONMENT
