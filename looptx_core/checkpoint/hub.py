"""Models on the Hugging Face hub: `hf:OWNER/NAME[@REVISION]` in place of a folder.

What is downloaded stands in the hub's own cache, and is checked as any folder of others is. No
file that could hold a pickle is asked for. HF_ENDPOINT, HF_TOKEN and HF_HOME are the hub's.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looptx_core.checkpoint.registry import abilities
from looptx_core.errors import DataError, LooptxError, UsageError, remedy

PREFIX = "hf:"
_FILES = ["*.json", "*.safetensors", "*.md", "*.model", "*.txt", "*.jinja"]
_OWN_PATHS = ["data.json"]
"""Names files of the user's machine, which are nobody else's affair."""
_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")


def is_hub_name(path: str | Path) -> bool:
    """Whether a name means a model on the hub."""
    return str(path).startswith(PREFIX)


def download_model(name: str | Path) -> Path:
    """The folder of a model on the hub, in the hub's cache; without a network, as it was last.

    Raises `UsageError` for a malformed name, `DataError` for a model that there is not or that may
    not be read, `LooptxError` where the hub can't be reached.
    """
    repository, revision = _parsed(name)
    with _explained(f"{PREFIX}{repository}"):
        return Path(_api().snapshot_download(repository, revision=revision, allow_patterns=_FILES))


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    repository: str
    url: str
    files: int
    bytes: int


def push_model(
    folder: Path,
    name: str,
    *,
    private: bool = False,
    message: str | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> Pushed:
    """Upload a model's or an adapter's folder; the repository is made where there is none.

    The note on where the training data lies on this machine stays here. report: called with what
    is about to be uploaded. Raises what `download_model` does, `DataError` for a folder that is no
    whole model, and `UsageError` where a private one is asked for and a public one is there.
    """
    repository, revision = _parsed(name)
    if revision:
        raise UsageError(f"{name}: a model is pushed to the main branch; leave out @{revision}")
    abilities(folder)  # reads the headers of its files
    files = [file for pattern in _FILES for file in folder.rglob(pattern)
             if file.name not in _OWN_PATHS]  # fmt: skip
    size = sum(file.stat().st_size for file in files)
    report(f"{folder}: {len(files)} files, {size:,} bytes, to {name}")
    with _explained(name):
        api = _api()
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UsageError(
                f"{name}: a public repository of this name is there; make it private on its page, "
                "choose another name, or leave `private` out"
            )
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=_FILES,
            ignore_patterns=_OWN_PATHS, commit_message=message or f"{repository}, by looptx",
        )  # fmt: skip
    return Pushed(repository, str(done.repo_url), len(files), size)


def _api() -> Any:
    from huggingface_hub import HfApi  # brings an HTTP client, so only here
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():  # a bar would fill a log
        disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="looptx")


def _parsed(name: str | Path) -> tuple[str, str | None]:
    """The repository and the revision of a name. Raises `UsageError`."""
    found = _NAME.fullmatch(str(name).removeprefix(PREFIX))
    if not is_hub_name(name) or found is None:
        raise UsageError(f"{name}: give a model of the hub as hf:OWNER/NAME")
    return found[1], found[2]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """The hub's errors as ours."""
    from huggingface_hub import errors

    try:
        yield
    except LooptxError:
        raise
    except (errors.HFValidationError, errors.BadRequestError) as error:
        raise UsageError(
            f"{name}: the hub refuses it ({_reason(error)}); check the name"
        ) from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{name}: its owner has to grant access first; ask for it on the model's page"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise DataError(
            f"{name}: the hub has no such model or revision, or a private one; check the name, or "
            "log in by hf auth login"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise LooptxError(
            f"{name}: the hub asks who you are; log in by hf auth login, or set HF_TOKEN"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "")
        mend = "try again later"
        if status in (401, 403):
            mend = "log in by hf auth login with a token that may do this, or set HF_TOKEN"
        raise LooptxError(f"{name}: the hub answers {status} ({_reason(error)}); {mend}") from error
    except Exception as error:  # a network fails in many ways, and so does a full disk
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise LooptxError(f"{name}: {error.strerror}; {remedy(error)}") from error
        raise LooptxError(
            f"{name}: the hub can't be reached ({_reason(error)}); check the network and "
            "HF_ENDPOINT, or give a folder"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
