"""Tables on the Hugging Face hub: ``hf://owner/repo/file.json``, fetched and pushed by huggingface_hub, where it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

ADDRESS = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+\.json)")  # pathlib makes one of two slashes
REPO = re.compile(r"[\w.-]+/[\w.-]+")


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is meant for the hub."""
    return os.fspath(path).startswith("hf:/")


def fetched(address: str | os.PathLike[str]) -> Path:
    """The file behind ``hf://owner/repo/file.json``, or ``hf://owner/repo@revision/file.json``, in the hub's cache.

    Raises ValueError for another form, ImportError without huggingface_hub, and OSError where it cannot be fetched.
    """
    found = ADDRESS.fullmatch(os.fspath(address))
    if found is None:
        raise ValueError(
            f"{os.fspath(address)!r}: write hf://owner/repo/file.json, or hf://owner/repo@revision/file.json"
        )
    repo, revision, name = found.groups()
    return Path(_hub().hf_hub_download(repo_id=repo, filename=name, revision=revision))


def push(path: str | os.PathLike[str], repo: str, name: str | None = None, *, private: bool = False) -> str:
    """Uploads a file to a repository of models, which is made where there is none; returns its address.

    name: its path there, by default the file's own. Raises ValueError for a repo that is no ``owner/repo`` and a name
    that does not end in .json, ImportError without huggingface_hub, and OSError where the hub cannot be reached.
    """
    name = Path(path).name if name is None else name
    if not REPO.fullmatch(repo):
        raise ValueError(f"repo={repo!r}: write owner/repo")
    if not name.endswith(".json"):
        raise ValueError(f"name={name!r}: a solver's file ends in .json")
    api = _hub().HfApi()
    try:
        api.create_repo(repo_id=repo, private=private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=os.fspath(path), path_in_repo=name, repo_id=repo, commit_message=f"{name} of dss_fast"
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # of a client for HTTP, which one depends on the release
        what = f"{type(error).__name__}: {error}"
        raise OSError(f"{repo}: the hub does not answer ({what}); see that this machine reaches it") from error
    return f"hf://{repo}/{name}"


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("hf:// addresses need huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub
