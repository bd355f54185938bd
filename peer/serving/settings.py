"""How `hivegrpo serve` runs on this machine."""

import ipaddress
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from hivegrpo.protocol.config import RoleConfig

EngineName = Literal["transformers", "vllm"]


class ServeConfig(RoleConfig):
    """`hivegrpo serve`; environment HIVEGRPO_SERVE_*."""

    model_config = SettingsConfigDict(env_prefix="HIVEGRPO_SERVE_")
    role: ClassVar[str] = "serve"

    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs an api_key."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one."""
    api_key: SecretStr | None = None
    """What clients have to send as bearer token; nothing if left out."""
    names: tuple[str, ...] = Field(default=(), max_length=16)
    """Names that clients call the model by; the run's name if left out."""
    engine: EngineName = "transformers"
    """What computes: `transformers serve`, or vLLM where it is installed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the engine computes; auto takes a GPU if there is one."""
    follow: float | None = Field(default=None, ge=1.0, le=86_400.0)
    """Seconds between two looks for a newer version of the run; none are looked for if left out."""
    queue: int = Field(default=128, ge=1, le=10_000)
    """Requests that may be in work or wait at once; further ones are asked to come again."""
    max_body_bytes: int = Field(default=2 << 20, ge=1024, le=1 << 30)
    """Bytes of one request."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.api_key is not None and not self.api_key.get_secret_value().isprintable():
            raise ValueError("api_key must be printable")
        if self.api_key is not None and not self.api_key.get_secret_value().strip():
            raise ValueError("api_key is empty: leave it out, or give one")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached by others, so api_key is needed: "
                "set HIVEGRPO_SERVE_API_KEY to a long random text"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
