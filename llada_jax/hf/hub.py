"""What is asked of the Hugging Face Hub: may I upload, take this directory, give me that one."""

import re
from pathlib import Path

from llada_jax.errors import UserError, reason, require

REPOSITORY = r"[\w.-]+/[\w.-]+"
# What is downloaded of a repository: no PyTorch pickles, no images.
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]

# The Hub's client raises its own errors, those of its HTTP library and the system's, and the list
# changes with its version. All of them say why, so every Exception is caught below.


def check_upload(repository: str) -> None:
    """Asks the Hub who you are: before an export is written, not after it.

    Raises:
        UserError: it is not the name of a repository, or you are not logged in.
    """
    if not re.fullmatch(REPOSITORY, repository):
        raise UserError(
            f"--push-to-hub {repository!r} must be a repository such as your-name/your-model."
        )
    hub = require("huggingface_hub", extra="hf")
    try:
        hub.HfApi().whoami()
    except Exception as error:
        raise UserError(
            f"--push-to-hub {repository}: you are not logged in to the Hub ({reason(error)}); run "
            "`hf auth login`."
        ) from error


def upload(directory: str, repository: str) -> None:
    """Uploads an export; a new repository is private.

    Raises:
        UserError: the Hub refuses it.
    """
    api = require("huggingface_hub", extra="hf").HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Export from llada_jax"
        )
    except Exception as error:
        raise UserError(
            f"{directory} is complete, but {repository} did not take it ({reason(error)}); try "
            f"again with `hf upload {repository} {directory}`."
        ) from error


def download(source: str) -> str:
    """Returns the directory of a repository, which is downloaded or found in the Hub's cache.

    Args:
        source: what the user gave: a repository such as "GSAI-ML/LLaDA-8B-Base".

    Raises:
        UserError: it is not a repository, or cannot be downloaded.
    """
    # A path that exists was meant as one, even if it looks like the name of a repository.
    if Path(source).exists() or not re.fullmatch(REPOSITORY, source):
        raise UserError(
            f"--from {source} is neither a directory with a config.json nor a repository such as "
            "GSAI-ML/LLaDA-8B-Base; give one."
        )
    hub = require("huggingface_hub", extra="hf")
    try:
        return hub.snapshot_download(source, allow_patterns=DOWNLOADED)
    except Exception as error:
        raise UserError(
            f"--from {source} is not a directory here, and cannot be downloaded ({reason(error)}); "
            "download it where there is a network and give its directory."
        ) from error
