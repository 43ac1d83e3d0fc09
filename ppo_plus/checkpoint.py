"""What a checkpoint of PPO holds beyond Trainer's: the rollout in use, and what was measured but not yet logged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .metrics import Meter
from .rollout import Rollout, readable

FORMAT_VERSION = 1


@dataclass
class Progress:
    """Where training stands within a rollout.

    Attributes:
        kl_coef: KL coefficient of the rollout in use, reward units per nat.
        rollout: the one that is being learned from; None before the first.
        num_tokens: prompt and response tokens of all rollouts so far, over all processes.
        meter: measurements since the last log.
    """

    kl_coef: float
    rollout: Rollout | None = None
    num_tokens: int = 0
    meter: Meter = field(default_factory=Meter)


def save_progress(
    directory: str | Path, process_index: int, progress: Progress, fingerprint: dict[str, Any], inside_rollout: bool
) -> None:
    """Write this process's progress; the rollout only if steps are left that learn from it."""
    directory = Path(directory)
    state = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "kl_coef": progress.kl_coef,
        "num_tokens": progress.num_tokens,
        "meter": progress.meter.state_dict(),
    }
    _state_file(directory, process_index).write_text(json.dumps(state, indent=2))
    if inside_rollout and progress.rollout is not None:
        progress.rollout.save(_rollout_file(directory, process_index))


def load_progress(directory: str | Path, process_index: int, fingerprint: dict[str, Any]) -> Progress:
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
    with readable(file):
        state = json.loads(file.read_text())
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
    ]
    if differing:
        raise ValueError(
            f"{directory} cannot be resumed with these arguments: {'; '.join(differing)}. Use the checkpoint's "
            "values, or start a new run from its adapter."
        )
    progress = Progress(kl_coef=state["kl_coef"], num_tokens=state["num_tokens"])
    progress.meter.load_state_dict(state["meter"])
    if _rollout_file(directory, process_index).is_file():
        progress.rollout = Rollout.load(_rollout_file(directory, process_index))
    return progress


def _state_file(directory: Path, process_index: int) -> Path:
    return directory / f"ppo_state_{process_index}.json"


def _rollout_file(directory: Path, process_index: int) -> Path:
    return directory / f"rollout_{process_index}.safetensors"
