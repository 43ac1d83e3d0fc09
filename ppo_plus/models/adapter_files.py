"""Adapters on disk and on the Hub: find them, read their weights and load them onto a base model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.utils import CONFIG_NAME, load_peft_weights
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME as MODEL_CONFIG

from ..utils.files import read_json_object, reraise_as_corrupt_file
from .base_weights import WeightSamples, decode_samples, local_folder, sample_files

WEIGHTS_FILE = "adapter_model.safetensors"
REWARD_FILE = "reward_model.json"  # metadata that RewardTrainer writes into a reward model's folder
OPTIONAL_FILES = (REWARD_FILE, "tokenizer_config.json", "value_head.safetensors", "value_head.bin")
PEFT_PREFIX = "base_model.model."  # of the names in an adapter's file
HEADS = ("score", "classifier")  # modules that PEFT saves with an adapter of a sequence classifier


def resolve_adapter_path(model: Any) -> Path | None:
    """Return the local folder of a PEFT adapter, downloaded from the Hub if necessary; None for other models.

    Raises:
        ValueError: neither a folder nor a name on the Hub, or a request to the Hub failed.
    """
    if not isinstance(model, str | Path):
        return None
    local = Path(model)
    if (local / CONFIG_NAME).is_file():
        if not (local / WEIGHTS_FILE).is_file():
            raise ValueError(f"{model} has an {CONFIG_NAME} but no {WEIGHTS_FILE}: no weights.")
        read_json_object(local / CONFIG_NAME)
        return local
    if local.exists():
        if local.is_dir() and (newest := get_last_checkpoint(local)) and not (local / MODEL_CONFIG).is_file():
            raise ValueError(
                f"{model} has checkpoints and no model: training has not finished, or save_model() was not called. "
                f"Pass one of its checkpoints (the newest is {newest}), or call trainer.save_model()."
            )
        if local.is_dir() and not any(local.iterdir()):
            raise ValueError(f"The folder {str(model)!r} is empty: it holds no model. Check the path.")
        return None
    config, weights = (download(str(model), file) for file in (CONFIG_NAME, WEIGHTS_FILE))
    if config is None or weights is None:
        return None
    read_json_object(config)
    for file in OPTIONAL_FILES:
        download(str(model), file)
    return config.parent


def download(name: str, file: str) -> Path | None:
    """Download a file of a model on the Hub; None if there is no such file or model.

    Raises:
        ValueError: the name cannot be on the Hub, or the request was refused or failed.
    """
    try:
        return Path(hf_hub_download(name, file))
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder {name!r}, and it cannot be a name on the Hub ({error}). Check the path, which is "
            f"relative to {Path.cwd()}."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name!r} is gated: accept its terms on the Hub, and log in with a token that may read it (hf auth login)."
        ) from error
    except (RepositoryNotFoundError, RemoteEntryNotFoundError):
        return None
    except LocalEntryNotFoundError as error:  # not in the cache, and the request to the Hub failed
        if not isinstance(error.__cause__, HfHubHTTPError):
            return None
        raise ValueError(_describe_hub_error(name, file, error.__cause__)) from error
    except HfHubHTTPError as error:
        raise ValueError(_describe_hub_error(name, file, error)) from error


def _describe_hub_error(name: str, file: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    fix = "Try again later, or pass a local folder."
    if status in (401, 403):
        fix = "Log in with a token that may read it (hf auth login), or pass a local folder."
    return f"The request to the Hub for {file} of {name!r} failed with status {status}. {fix}"


def load_reward_metadata(model: str | Path) -> dict[str, Any]:
    """Load the metadata that `RewardTrainer` wrote for a reward model, from a folder or the Hub; empty if none."""
    file: Path | None = Path(model) / REWARD_FILE
    if not Path(model).exists():
        file = download(str(model), REWARD_FILE) if is_hub_name(str(model)) else None
    return read_json_object(file) if file is not None and file.is_file() else {}


def is_hub_name(name: str) -> bool:
    """Return whether a model on the Hub could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_name(name: str) -> str | None:
    """Return a model's name on the Hub, also for a folder in the Hub's cache; None for other folders.

    A model card names a base by it: the path of a folder exists on one machine only.
    """
    if cached := re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name):
        return cached[1].replace("--", "/")
    return name if name and is_hub_name(name) and not Path(name).exists() else None


def display_name(name: str) -> str:
    """Return a model's name on the Hub, or the last part of a folder's path."""
    return hub_name(name) or Path(name).name


def base_samples(directory: Path) -> WeightSamples:
    """Return weight samples of an adapter's base, from the adapter's metadata or from local files of that base."""
    samples = load_reward_metadata(directory).get("base_weights")
    return decode_samples(samples) if samples else sample_files(local_base(directory))


def trained_on(directory: Path) -> str:
    """Return the name of the base that an adapter was trained on; empty if the adapter does not have it."""
    config = PeftConfig.from_pretrained(str(directory))
    return cast(str, load_reward_metadata(directory).get("base_model") or config.base_model_name_or_path or "")


def local_base(directory: Path) -> Path | None:
    """Return the folder of the base that an adapter was trained on, if that base is on this machine."""
    return local_folder(trained_on(directory), PeftConfig.from_pretrained(str(directory)).revision)


def weights_file(directory: Path) -> Path:
    """Return the file of an adapter's tensors; PEFT would request a missing one from the Hub."""
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {file.name}: it is no adapter, or saving was interrupted.")
    return file


def adapter_weights(directory: Path, names: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Load the tensors of an adapter on disk, renamed by `key_mapping` of PEFT."""
    with reraise_as_corrupt_file(weights_file(directory)):
        return load_peft_weights(str(directory), device="cpu", key_mapping=names)
