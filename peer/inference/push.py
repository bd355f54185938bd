"""An export, to the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hivegrpo.protocol.errors import ConfigError, UnreachableError

T = TypeVar("T")

MESSAGE = "Export from hivegrpo"

SERVER_ERRORS = 500
"""HTTP statuses from here on are the server's own trouble."""


class Hub(Protocol):
    """What is asked of the hub, as huggingface_hub.HfApi has it."""

    def whoami(self) -> Any:
        """Who is logged in; an error if nobody is."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make a repository, unless it is there; its address."""

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        """Add a folder's files, in one commit."""


def require_login(hub: Hub, name: str) -> None:
    """ConfigError unless somebody is logged in and `name` can be that of a repository; UnreachableError as `push`.

    So that nobody waits for an export that cannot be pushed.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not listed

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is not the name of a model: {error}", 'Write "owner/name".') from None
    _ask(hub.whoami, "Nothing was exported: leave out --push to export without the hub.")


def push(hub: Hub, folder: Path, name: str) -> str:
    """Upload a folder to the model `name`, which is made as a private one if it is not there; its address.

    ConfigError if the hub refuses, UnreachableError if it does not answer: the folder is as it was.
    """
    later = f"The export is whole in {folder}; push it later: hf upload {name} {folder}"

    def upload() -> str:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message=MESSAGE)
        return str(address)

    return _ask(upload, later)


def _ask(question: Callable[[], T], hint: str) -> T:
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of the client that it has
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
    )

    try:
        return question()
    except LocalTokenNotFoundError:
        raise ConfigError("You are not logged in to the hub.", f"Log in with `hf auth login`. {hint}") from None
    except HfHubHTTPError as error:
        if error.response.status_code < SERVER_ERRORS:
            raise ConfigError(f"The hub refuses: {_reason(error)}.", hint) from None
        raise UnreachableError(f"The hub fails: {_reason(error)}.", hint) from None
    except (HTTPError, OSError) as error:
        raise UnreachableError(f"The hub does not answer: {_reason(error)}.", hint) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
