"""How an answer is sampled: what the client asks for, else what the exported folder says, else OpenAI's defaults."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hivegrpo.peer.serving.requests import Wanted
from hivegrpo.protocol.errors import ConfigError

FILE = "generation_config.json"
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "repetition_penalty", "top_k", "min_p")
"""What else of the file has a meaning for one sampled answer."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Of one answer."""

    max_tokens: int
    temperature: float
    """0 always takes the most probable token."""
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Defaults:
    """What an exported folder's generation_config.json says."""

    temperature: float
    top_p: float
    settings: dict[str, Any]
    """The rest of it that counts, under transformers' names."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """ConfigError if the file is damaged; without one, OpenAI's defaults."""
        path = folder / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            temperature, top_p = values.get("temperature"), values.get("top_p")
            return cls(
                temperature=1.0 if temperature is None else float(temperature),
                top_p=1.0 if top_p is None else float(top_p),
                settings={name: values[name] for name in KEPT if values.get(name) is not None},
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}.", "Export the model again.") from None

    def sampling(self, wanted: Wanted, choice: int, max_tokens: int) -> Sampling:
        """Of the request's answer number `choice`: answers to a seeded request have seeds of their own, in a row.

        Without a seed, a fresh one is drawn: the engine has one generator for all, which a seeded request has set.
        """
        # OpenAI's seeds are signed; torch takes both, vLLM as well.
        seed = secrets.randbits(62) if wanted.seed is None else (wanted.seed + choice) % 2**63
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature if wanted.temperature is None else wanted.temperature,
            top_p=self.top_p if wanted.top_p is None else wanted.top_p,
            seed=seed,
        )
