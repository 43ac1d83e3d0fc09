"""State of PPO in a checkpoint, in addition to Trainer's, and the manifest of a complete checkpoint.

A checkpoint is whole once it has a manifest: the sizes and hashes of all other files, written to a temporary name and
renamed after all other files have reached the disk. The previous checkpoint is deleted only after that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..algo.prefix_reward_baseline import RewardBaseline
from ..models.weight_checks import is_packed
from ..rollout.buffer import Rollout
from ..utils.files import read_json_object
from .metrics import Meter

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
# Error codes of systems that cannot flush: Windows opens no folders and flushes no read-only descriptor; some network
# file systems flush no folders. A full or broken disk has other codes.
CANNOT_FLUSH = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF, errno.EINVAL, errno.ENOTSUP}
MUTABLE_BETWEEN_ROLLOUTS = ("temperature",)  # fingerprint fields that may differ when resuming at a rollout boundary
STATE_FIELDS = (
    "kl_coef",
    "num_tokens",
    "skipped",
    "generator",
    "evaluation_pending",
    "actor_started",
)  # of `PPOState`, as JSON


@dataclass
class PPOState:
    """The state of PPO training that Trainer does not have.

    Attributes:
        kl_coef: KL coefficient of the current rollout, reward units per nat.
        rollout: the current rollout; None before the first.
        num_tokens: prompt and response tokens of all rollouts so far, over all ranks.
        skipped: consecutive steps that were skipped because their gradients were not finite.
        generator: state of the accelerator's generator when it was saved, as `generator_state` returns it.
        evaluation_pending: whether the evaluation after the last step is not complete.
        actor_started: whether the critic's explained variance has ended its pretraining.
        baseline: the regression of returns on prefix scores over the rollouts so far.
        meter: metrics since the last log.
    """

    kl_coef: float
    rollout: Rollout | None = None
    num_tokens: int = 0
    skipped: int = 0
    generator: str | None = None
    evaluation_pending: bool = False
    actor_started: bool = False
    baseline: RewardBaseline = field(default_factory=RewardBaseline)
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class Rank:
    """Which share of a run a process has."""

    index: int
    count: int  # processes of the run


def save_progress(
    directory: str | Path, rank: Rank, progress: PPOState, fingerprint: dict[str, Any], inside_rollout: bool
) -> None:
    """Write this rank's state; the rollout only if later steps learn from it."""
    state = {"format_version": FORMAT_VERSION, "num_processes": rank.count, "fingerprint": fingerprint}
    state |= {name: getattr(progress, name) for name in STATE_FIELDS} | {"baseline": asdict(progress.baseline)}
    state["meter"] = progress.meter.state_dict()
    state_file, rollout_file = _state_files(directory, rank.index)
    state_file.write_text(json.dumps(state, indent=2), encoding="utf-8")
    if inside_rollout and progress.rollout is not None:
        progress.rollout.save(rollout_file)


def load_progress(directory: str | Path, rank: Rank, fingerprint: dict[str, Any], pad_token_id: int) -> PPOState:
    """Read what the ranks of a run wrote by `save_progress`, as many as now or another number.

    Rows, prompts and seeds belong to a position among all ranks, so another number of ranks continues the same run if
    the responses of a rollout are as many in total: each takes its share of the rows. Metrics since the last log, of
    which only sums over ranks are used, go to rank 0.

    Args:
        directory: the checkpoint.
        rank: this process.
        fingerprint: values that must be equal in the checkpoint.
        pad_token_id: pads rows of other ranks.

    Raises:
        ValueError: there is nothing to resume from, or the fingerprints differ.
    """
    states, rollout_files = _read_states(directory, rank)
    state, inside_rollout = states[0], rollout_files[0].is_file()
    _check_fingerprint(directory, state, fingerprint, inside_rollout, rank)
    progress = PPOState(**{name: state[name] for name in STATE_FIELDS}, baseline=RewardBaseline(**state["baseline"]))
    if state["num_processes"] == rank.count:
        progress.meter.load_state_dict(state["meter"])
        progress.rollout = Rollout.load(rollout_files[0]) if inside_rollout else None
        return progress
    progress.generator = None  # of one rank's device
    for each in states if rank.index == 0 else ():
        for name, (total, count) in each["meter"].items():
            progress.meter.add(name, total, count)
    if inside_rollout:
        rollout = Rollout.concatenate([Rollout.load(file) for file in rollout_files], pad_token_id)
        rows = len(rollout) // rank.count
        progress.rollout = rollout.select(slice(rank.index * rows, (rank.index + 1) * rows))
    return progress


def _read_states(directory: str | Path, rank: Rank) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return the states that a rank needs, and the files of their rollouts: its own, or all of another number."""
    rank_file, first = (_state_files(directory, index)[0] for index in (rank.index, 0))
    file = rank_file if rank_file.is_file() else first
    if not file.is_file():
        raise ValueError(
            f"{directory} has no {file.name}, so training cannot resume from it: it was saved with save_only_model, "
            "or not by ppo_plus."
        )
    state = _read_state(file)
    if (count := state["num_processes"]) == rank.count:
        if file != rank_file:
            raise ValueError(
                f"{directory} has no {rank_file.name}: a node has the files of its own processes. Copy it there."
            )
        return [state], [_state_files(directory, rank.index)[1]]
    files = [_state_files(directory, index) for index in range(count)]
    if missing := [each.name for each, _ in files if not each.is_file()]:
        raise ValueError(
            f"{directory} was saved by {count} processes, and {rank.count} resume, which need the files of all: it "
            f"has no {', '.join(missing)}. Copy them there from the other nodes, or start {count} processes."
        )
    return [_read_state(each) for each, _ in files], [rollout for _, rollout in files]


def _read_state(file: Path) -> dict[str, Any]:
    """Read the state of one rank; an error if it has another format than this ppo_plus writes."""
    state = read_json_object(file)
    version = state.get("format_version")
    if version == FORMAT_VERSION:
        return state
    if type(version) is not int:
        raise ValueError(f"{file} was not written by ppo_plus: its format_version is {version!r}, and not a number.")
    newer = version > FORMAT_VERSION
    age, fix = ("a newer", "Upgrade ppo_plus") if newer else ("an older", "Start from its adapter")
    raise ValueError(
        f"{file.parent} was written by {age} ppo_plus (format {version}, this one reads {FORMAT_VERSION}). {fix}."
    )


def _check_fingerprint(
    directory: str | Path, state: dict[str, Any], fingerprint: dict[str, Any], inside_rollout: bool, rank: Rank
) -> None:
    saved, advice = state["fingerprint"], "Use the checkpoint's values"
    differing = {
        name: f"{name} {saved.get(name)} there, {value} here"
        for name, value in fingerprint.items()
        if saved.get(name) != value and (inside_rollout or name not in MUTABLE_BETWEEN_ROLLOUTS)
    }
    if "responses_per_rollout" in differing:
        rows, rest = divmod(saved["responses_per_rollout"], saved["num_mini_batches"] * rank.count)
        sizes = "per_device_train_batch_size * gradient_accumulation_steps"
        advice += f": with {rank.count} processes, {sizes} must be {rows}"
        if rest:
            advice = f"Use a number of processes that divides {saved['responses_per_rollout']}"
    if differing:
        raise ValueError(
            f"{directory} cannot be resumed with these arguments: {'; '.join(differing.values())}. {advice}; or start "
            "a new run from its adapter."
        )


def weights_digest(models: Iterable[nn.Module]) -> str:
    """Return a hash of frozen weights, equal for equal models in any precision that represents them.

    A few numbers of each tensor suffice, because models that differ in training or version differ in nearly all.
    Adapters are left out, and so are packed tensors (bitsandbytes' 4 bits, torchao's tensor subclasses), whose storage
    differs between machines.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and not is_packed(parameter) and "lora_" not in name:
                digest.update(parameter.detach().flatten()[:32].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _state_files(directory: str | Path, process_index: int) -> tuple[Path, Path]:
    folder = Path(directory)
    return folder / f"ppo_state_{process_index}.json", folder / f"rollout_{process_index}.safetensors"


def write_atomically(
    directory: str | Path, steps: Sequence[Callable[[], None]], on_error: str, any_rank_failed: Callable[[bool], bool]
) -> bool:
    """Write a checkpoint, or remove it, because a partial one also fills the disk; return whether it was written.

    All ranks complete one of `steps` before the next begins; `any_rank_failed` reduces whether one failed over ranks.

    Raises:
        OSError: a file could not be written, and `on_error` is "raise"; "skip" warns and continues without it.
    """
    directory = Path(directory)
    for step in steps:
        error: Exception | None = None
        try:
            step()
        except (OSError, RuntimeError, SafetensorError) as failure:  # of Python, torch and safetensors
            error = failure
        if not any_rank_failed(error is not None):
            continue
        shutil.rmtree(directory, ignore_errors=True)
        message = _write_error_message(directory, error)
        if on_error == "raise":
            raise OSError(f"{message} Free some space, or set save_total_limit or on_save_error='skip'.") from error
        warnings.warn(f"{message} Training continues without it.", stacklevel=4)
        return False
    return True


def _write_error_message(directory: Path, error: Exception | None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = find_last_valid_checkpoint(directory.parent)
    free = shutil.disk_usage(directory.parent).free / 2**20
    reason = "another process failed" if error is None else (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"{directory} could not be written ({reason}) and was removed; {free:.0f} MiB are free there. The last whole "
        f"checkpoint is {last}."
    )


def write_manifest(directory: str | Path) -> None:
    """Flush a checkpoint's files to the disk, then write its manifest, which completes it."""
    directory = Path(directory)
    tmp_path = directory / f".{MANIFEST}"
    paths = [p for p in sorted(directory.rglob("*")) if p.is_file() and p not in (directory / MANIFEST, tmp_path)]
    files = {path.relative_to(directory).as_posix(): _size_and_sha256(path, flush=True) for path in paths}
    tmp_path.write_text(json.dumps(files, indent=1), encoding="utf-8")
    _fsync(tmp_path)
    tmp_path.replace(directory / MANIFEST)
    _fsync(directory)
    _fsync(directory.parent)


def integrity_error(directory: str | Path) -> str | None:
    """Return why a checkpoint is not whole; None if it is."""
    directory = Path(directory)
    try:
        manifest = read_json_object(directory / MANIFEST)
        for name, expected in manifest.items():
            if _size_and_sha256(directory / name) != expected:
                return f"{name} was changed or truncated"
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return "saving was interrupted" if name == MANIFEST else f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def check_checkpoint(directory: str) -> None:
    """Refuse to resume from a folder that is not a whole checkpoint."""
    if not Path(directory).is_dir():
        raise ValueError(f"resume_from_checkpoint={directory!r}: there is no such folder.")
    if newest := find_last_valid_checkpoint(directory):
        raise ValueError(
            f"resume_from_checkpoint={directory!r} holds checkpoints and is none. Pass the newest whole one, {newest}, "
            "or True with this output_dir."
        )
    if not (Path(directory) / MANIFEST).exists() and not (Path(directory) / TRAINER_STATE_NAME).exists():
        raise ValueError(
            f"resume_from_checkpoint={directory!r} is no checkpoint of a run: it has no {TRAINER_STATE_NAME}. A saved "
            "adapter or model is where a new run starts: pass it as `model`."
        )
    if error := integrity_error(directory):
        raise ValueError(f"{directory} cannot be resumed: {error}. Use the checkpoint before it.")


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder with their steps, in ascending order; folders of other names are ignored."""
    named = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(output_dir).glob("*")]
    return sorted((int(name[1]), path) for name, path in named if name and path.is_dir())


def find_last_valid_checkpoint(output_dir: str | Path) -> str | None:
    """Return the whole checkpoint with the highest step; warn of damaged newer ones."""
    for _, directory in reversed(checkpoints(output_dir)):
        error = integrity_error(directory)
        if error is None:
            return str(directory)
        warnings.warn(f"{directory} is skipped: {error}. The checkpoint before it is used.", stacklevel=2)
    return None


def stale_checkpoints(output_dir: str | Path, step: int) -> list[Path]:
    """Return whole checkpoints of later steps, which another run left in this folder."""
    return [path for at, path in checkpoints(output_dir) if at > step and integrity_error(path) is None]


def rotate(newest: Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints, and keep `limit` of them, with the newest and the best.

    Checkpoints of later steps belong to another run: they are neither deleted nor counted.
    """
    of_this_run = [path for at, path in checkpoints(newest.parent) if at <= step]
    kept = {newest} | ({Path(best)} if best else set())
    surplus = len(of_this_run) - max(limit, len(kept)) if limit else 0
    for directory in [path for path in of_this_run if path not in kept][: max(surplus, 0)]:
        shutil.rmtree(directory, ignore_errors=True)


def _size_and_sha256(path: Path, flush: bool = False) -> list:
    if flush:
        _fsync(path)
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, where the system supports it."""
    descriptor = None
    try:
        # Windows flushes only what is open for writing.
        descriptor = os.open(path, os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
