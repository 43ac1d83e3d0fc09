"""What a checkpoint of PPO holds beyond Trainer's, and how a half-written one is never taken for a whole one.

A checkpoint is whole once its manifest stands in it: the sizes and hashes of all other files, written aside and
renamed after everything else has reached the disk. The checkpoint before is deleted only after that.
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..algo.prefix_reward_baseline import RewardBaseline
from ..rollout.buffer import Rollout
from ..utils.files import read_json_object
from .metrics import Meter

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# How a system says that a file or folder cannot be flushed: Windows opens no folders and flushes no descriptor that
# only reads; some network file systems flush no folders. A disk that is full or broken says something else.
CANNOT_FLUSH = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF, errno.EINVAL, errno.ENOTSUP}
MUTABLE_BETWEEN_ROLLOUTS = ("temperature",)  # of what must be equal, what may change between two rollouts


@dataclass
class PPOState:
    """Where training stands within a rollout.

    Attributes:
        kl_coef: KL coefficient of the rollout in use, reward units per nat.
        rollout: the one that is being learned from; None before the first.
        num_tokens: prompt and response tokens of all rollouts so far, over all processes.
        skipped: steps in a row that were skipped for gradients that are not finite.
        generator: the accelerator's random numbers when it was saved, as `generator_state` returns them.
        evaluation_pending: whether the evaluation after the last step has not been made to its end.
        baseline: what rollouts so far say of the next one's returns.
        meter: measurements since the last log.
    """

    kl_coef: float
    rollout: Rollout | None = None
    num_tokens: int = 0
    skipped: int = 0
    generator: str | None = None
    evaluation_pending: bool = False
    baseline: RewardBaseline = field(default_factory=RewardBaseline)
    meter: Meter = field(default_factory=Meter)


def save_progress(
    directory: str | Path, process_index: int, progress: PPOState, fingerprint: dict[str, Any], inside_rollout: bool
) -> None:
    """Write this process's progress; the rollout only if steps are left that learn from it."""
    directory = Path(directory)
    state = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "kl_coef": progress.kl_coef,
        "num_tokens": progress.num_tokens,
        "skipped": progress.skipped,
        "generator": progress.generator,
        "evaluation_pending": progress.evaluation_pending,
        "baseline": asdict(progress.baseline),
        "meter": progress.meter.state_dict(),
    }
    _state_file(directory, process_index).write_text(json.dumps(state, indent=2), encoding="utf-8")
    if inside_rollout and progress.rollout is not None:
        progress.rollout.save(_rollout_file(directory, process_index))


def load_progress(directory: str | Path, process_index: int, fingerprint: dict[str, Any]) -> PPOState:
    """Read what `save_progress` wrote.

    Raises:
        ValueError: there is nothing to resume from, or its steps meant something else than they would here.
    """
    directory = Path(directory)
    file = _state_file(directory, process_index)
    if not file.is_file():
        raise ValueError(
            f"{directory} has no {file.name}, so training cannot resume from it: it was saved with save_only_model, "
            "by another number of processes, or not by ppo_plus."
        )
    state = read_json_object(file)
    if state["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{directory} was written by a newer ppo_plus (format {state['format_version']}, this one reads "
            f"{FORMAT_VERSION}). Upgrade ppo_plus."
        )
    saved = state["fingerprint"]
    differing = [
        f"{name} {saved.get(name)} there, {value} here"
        for name, value in fingerprint.items()
        if saved.get(name) != value
        and (name not in MUTABLE_BETWEEN_ROLLOUTS or _rollout_file(directory, process_index).is_file())
    ]
    if differing:
        raise ValueError(
            f"{directory} cannot be resumed with these arguments: {'; '.join(differing)}. Use the checkpoint's "
            "values, or start a new run from its adapter."
        )
    progress = PPOState(kl_coef=state["kl_coef"], num_tokens=state["num_tokens"], skipped=state["skipped"])
    progress.generator = state.get("generator")
    progress.evaluation_pending = state.get("evaluation_pending", False)
    progress.baseline = RewardBaseline(**state.get("baseline", {}))
    progress.meter.load_state_dict(state["meter"])
    if _rollout_file(directory, process_index).is_file():
        progress.rollout = Rollout.load(_rollout_file(directory, process_index))
    return progress


def weights_digest(models: Iterable[nn.Module]) -> str:
    """A name for frozen weights, equal for equal models in any precision that holds their numbers.

    A few numbers of each tensor do: two models that differ in training or version differ in nearly all. Adapters
    are left out, and so is what is packed (bitsandbytes' 4 bits, torchao's tensors of several tensors), which is not
    stored the same way everywhere.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, parameter in model.named_parameters():
            packed = not parameter.is_floating_point() or hasattr(parameter, "__tensor_flatten__")
            if not parameter.requires_grad and not packed and "lora_" not in name:
                digest.update(parameter.detach().flatten()[:32].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _state_file(directory: Path, process_index: int) -> Path:
    return directory / f"ppo_state_{process_index}.json"


def _rollout_file(directory: Path, process_index: int) -> Path:
    return directory / f"rollout_{process_index}.safetensors"


def write_atomically(
    directory: str | Path, steps: Sequence[Callable[[], None]], on_error: str, agree: Callable[[bool], bool]
) -> bool:
    """Write a checkpoint, or leave nothing of it behind: what is half written also fills the disk.

    Args:
        directory: of the checkpoint.
        steps: what writes it; all processes are through with one before the next begins.
        on_error: "raise", or "skip" to warn and go on without it.
        agree: whether a step failed on any process, given whether it failed on this one.

    Returns:
        whether the checkpoint is there.

    Raises:
        OSError: a file could not be written, and `on_error` is "raise".
    """
    directory = Path(directory)
    for step in steps:
        error: Exception | None = None
        try:
            step()
        except (OSError, RuntimeError, SafetensorError) as failure:  # as Python, torch and safetensors say it
            error = failure
        if not agree(error is not None):
            continue
        shutil.rmtree(directory, ignore_errors=True)
        what = _write_error_message(directory, error)
        if on_error == "raise":
            raise OSError(f"{what} Free some space, or set save_total_limit or on_save_error='skip'.") from error
        warnings.warn(f"{what} Training goes on without it.", stacklevel=3)
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
    """Flush a checkpoint's files to the disk, then write its manifest; from then on it is whole."""
    directory = Path(directory)
    aside = directory / f".{MANIFEST}"
    others = [p for p in sorted(directory.rglob("*")) if p.is_file() and p not in (directory / MANIFEST, aside)]
    files = {path.relative_to(directory).as_posix(): _describe(path, flush=True) for path in others}
    aside.write_text(json.dumps(files, indent=1), encoding="utf-8")
    _flush(aside)
    aside.replace(directory / MANIFEST)
    _flush(directory)
    _flush(directory.parent)


def integrity_error(directory: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    directory = Path(directory)
    try:
        manifest = read_json_object(directory / MANIFEST)
        for name, expected in manifest.items():
            if _describe(directory / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return "it was not finished" if name == MANIFEST else f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def check_checkpoint(directory: str) -> None:
    """Refuse to resume from what is no whole checkpoint."""
    if not Path(directory).is_dir():
        raise ValueError(f"resume_from_checkpoint={directory!r}: there is no such folder.")
    if newest := find_last_valid_checkpoint(directory):
        raise ValueError(
            f"resume_from_checkpoint={directory!r} holds checkpoints and is none. Pass the newest whole one, {newest}, "
            "or True with this output_dir."
        )
    if found := integrity_error(directory):
        raise ValueError(f"{directory} cannot be resumed: {found}. Use the checkpoint before it.")


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder with their steps, the first one first; whatever has another name is none."""
    named = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(output_dir).glob("*")]
    return sorted((int(name[1]), path) for name, path in named if name and path.is_dir())


def find_last_valid_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that is whole, by its step; damaged newer ones are named in a warning."""
    for _, directory in reversed(checkpoints(output_dir)):
        found = integrity_error(directory)
        if found is None:
            return str(directory)
        warnings.warn(f"{directory} is skipped: {found}. The checkpoint before it is used.", stacklevel=2)
    return None


def stale_checkpoints(output_dir: str | Path, step: int) -> list[Path]:
    """Whole checkpoints of later steps than that: of another run, which had this folder before."""
    return [path for at, path in checkpoints(output_dir) if at > step and integrity_error(path) is None]


def rotate(newest: Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beside the one just written, and keep `limit`, that one and the best among them.

    Those of later steps are another run's: they are left alone, and push out none of this one's.
    """
    own = [path for at, path in checkpoints(newest.parent) if at <= step]
    kept = {newest} | ({Path(best)} if best else set())
    surplus = len(own) - max(limit, len(kept)) if limit else 0
    for directory in [path for path in own if path not in kept][: max(surplus, 0)]:
        shutil.rmtree(directory, ignore_errors=True)


def _describe(path: Path, flush: bool = False) -> list:
    if flush:
        _flush(path)
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _flush(path: Path) -> None:
    """Write a file, or the names in a folder, from the system's cache to the disk, where the system can do that."""
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
