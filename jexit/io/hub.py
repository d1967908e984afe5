"""Finds, downloads and uploads models on the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import os
import pathlib
import re

from jexit.errors import MissingFile, UserError

# The files that a model directory needs. Pickles, which jexit does not read, are not downloaded.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def is_hub_id(text: str) -> bool:
    """Returns whether `text` has the form OWNER/NAME of a model on the Hugging Face hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def cached(hub_id: str) -> pathlib.Path:
    """Returns the directory of the model `hub_id` in the local cache of the Hugging Face hub.

    Raises MissingFile if the cache does not contain the model.
    """
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=FILES))
    except Exception as error:  # the library raises many kinds when nothing is cached
        raise MissingFile(
            f"there is no directory {hub_id}, and the hub's local cache does not contain a model "
            "of that name; download the model first (convert.from_hf --download, or hf download "
            f"{hub_id}), or give a model directory"
        ) from error


def download(hub_id: str) -> None:
    """Downloads the files of the model `hub_id` that are not yet in the hub's local cache.

    Raises UserError if `hub_id` is not an OWNER/NAME or is a local directory, and if the hub
    refuses the download or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    if pathlib.Path(hub_id).is_dir():
        raise UserError(
            f"--source is the local directory {hub_id}, but --download fetches a model from the "
            "hub; leave --download out"
        )
    if not is_hub_id(hub_id):
        raise UserError(
            f"--source is {hub_id}, but --download needs the OWNER/NAME of a model on the hub; "
            "give such a name, or leave --download out"
        )
    try:
        snapshot_download(hub_id, allow_patterns=FILES)
    except Exception as error:
        raise UserError(
            f"{hub_id} cannot be downloaded ({_reason(error)}); check its name on the hub and the "
            "network, and log in if the model is gated (hf auth login)"
        ) from error


def upload(directory: str | os.PathLike[str], hub_id: str) -> None:
    """Uploads the files of `directory` to the hub repository `hub_id`.

    A repository that does not exist yet is created as a private one. Raises UserError if the hub
    refuses the upload or cannot be reached.
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
            f"{directory} has been written, but its upload to {hub_id} failed ({_reason(error)}); "
            "check the network, log in with a token that has write access (hf auth login), then "
            f"run: hf upload --private {hub_id} {directory}"
        ) from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:1] or [type(error).__name__])[:200].rstrip(".")
