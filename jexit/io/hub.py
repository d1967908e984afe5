"""The Hugging Face hub, through its own library: models in the local cache, down and up."""

from __future__ import annotations

import os
import pathlib
import re

from jexit.errors import MissingFile, UserError

# What a model directory is read from; pickles, which are refused, are not even fetched.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def is_hub_id(text: str) -> bool:
    """Whether the text could be an OWNER/NAME of the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def cached(hub_id: str) -> pathlib.Path:
    """Where a model lies in the hub's local cache; raises MissingFile when it does not."""
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=FILES))
    except Exception as error:  # the library raises many kinds when nothing is cached
        raise MissingFile(
            f"there is no directory {hub_id}, nor a model of that name in the hub's local cache; "
            f"fetch a hub model first (convert.from_hf --download, or hf download {hub_id}), or "
            "give a model directory"
        ) from error


def download(hub_id: str) -> None:
    """Fetches a model into the local cache, or what of it is not there yet.

    Raises UserError for what is no hub id, and when the hub refuses or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    if not is_hub_id(hub_id) or pathlib.Path(hub_id).is_dir():
        raise UserError(f"--download fetches OWNER/NAME of the hub, and --source is {hub_id}")
    try:
        snapshot_download(hub_id, allow_patterns=FILES)
    except Exception as error:
        raise UserError(
            f"{hub_id} cannot be fetched ({_reason(error)}); check its name on the hub and the "
            "network, and log in for a gated model (hf auth login)"
        ) from error


def upload(directory: str | os.PathLike[str], hub_id: str) -> None:
    """Puts a directory's files into a repository, which is made, private, if it is not there.

    Raises UserError when the hub refuses or cannot be reached; the directory stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(hub_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=directory, commit_message="Upload a model with early exits"
        )
    except Exception as error:
        raise UserError(
            f"{directory} is written, and cannot be uploaded to {hub_id} ({_reason(error)}); log "
            f"in with a token that may write there (hf auth login), then: hf upload {hub_id} "
            f"{directory}"
        ) from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:1] or [type(error).__name__])[:200].rstrip(".")
