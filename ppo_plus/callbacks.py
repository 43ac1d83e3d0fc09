"""Callbacks: rollout events beside Trainer's own, and what listens to them. They look and steer; they never train.

A callback that keeps a state exports it (`ExportableState`), so it is in every checkpoint. Trainer rebuilds such
callbacks when it resumes: constructor arguments must be JSON, and nobody may hold on to an instance.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from .config import PPOConfig, is_number
from .functional import MAX_KL_ERROR, band_kl_coef, ema, proportional_kl_coef
from .interrupt import Interrupt
from .trackers import send_table

if TYPE_CHECKING:
    from .collector import Samples
    from .rollout import Rollout


# A service manager on Windows ends a process by SIGBREAK, which other systems do not have.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name))


@dataclass
class RolloutSettings:
    """What a callback may set before a rollout.

    Attributes:
        kl_coef: coefficient of the KL penalty, reward units per nat; `PPOConfig.kl_coef` unless a callback sets it.
    """

    kl_coef: float


class PPOCallback(TrainerCallback):
    """A `TrainerCallback` with the events of a rollout; override what you need.

    All events also get `model`, `processing_class` and further keyword arguments: end the signature in `**kwargs`.
    """

    def check_arguments(self, args: PPOConfig) -> None:
        """Raise a ValueError where the callback cannot work with these arguments; called before weights are loaded."""

    def on_rollout_begin(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, settings: RolloutSettings, **kwargs: Any
    ) -> None:
        """Before prompts are answered; `settings` may be changed."""

    def on_rollout_progress(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, phase: str, done: int, total: int,
        tokens: int, **kwargs: Any,
    ) -> None:  # fmt: skip
        """While prompts are answered and answers looked at, in evaluations too; called at every decoded token.

        `phase` is "generating", "scoring", "lower layers" (where `cache_lower_layers` finds some), "log-probabilities"
        or "reference"; `done` of `total` responses have left it, and `tokens` tokens have gone through the model in it.
        """

    def on_scores(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, scores: Tensor, all_scores: Tensor,
        token_rewards: Tensor, **kwargs: Any,
    ) -> None:  # fmt: skip
        """After scoring: `scores` `(N,)`, reward units, may be changed in place; `all_scores` of all processes.

        `all_scores` are the scores as the callback before left them. A callback that only some processes have gets
        them as the last one left them that all processes have.

        NaN marks a response that no reward function scored. A score is what a response earns in all; the part of it
        in `token_rewards`, `(N, R)`, is paid at single tokens, and may be changed in place too.
        """

    def on_rollout_end(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, rollout: Rollout, samples: Samples,
        metrics: dict[str, float], **kwargs: Any,
    ) -> None:  # fmt: skip
        """When advantages are known; `metrics` (of all processes) will be logged and may be added to."""


def hears_scores(callback: PPOCallback) -> bool:
    """Tell whether a callback overrides `on_scores`."""
    return getattr(callback.on_scores, "__func__", None) is not PPOCallback.on_scores


class AdaptiveKLCallback(PPOCallback, ExportableState):
    """Steers the KL coefficient so that the policy stays about so far from the reference.

    Args:
        target: wished KL per response, nats (proportional controller of Ziegler et al. 2019, section 2.2).
        horizon: episodes over which the controller acts; smaller is faster. None means a tenth of the run's episodes,
            at least one rollout and at most 10,000 (Ziegler's): the coefficient can then change sevenfold in the run.
        band: `(low, high)` in nats; if given, the coefficient is halved below and doubled above, and `target` and
            `horizon` play no part (adaptive KL penalty of PPO, Schulman et al. 2017, section 4).
    """

    def __init__(
        self, target: float = 6.0, horizon: int | None = None, band: tuple[float, float] | list[float] | None = None
    ) -> None:
        if not (is_number(target) and target > 0 and (horizon is None or (is_number(horizon) and horizon > 0))):
            raise ValueError(f"AdaptiveKLCallback: target={target!r} and horizon={horizon!r} must be above 0.")
        if band is not None and not (len(band) == 2 and all(map(is_number, band)) and 0 <= band[0] < band[1]):
            raise ValueError(f"AdaptiveKLCallback: band={band} must be (low, high) with 0 <= low < high.")
        self.target, self.horizon, self.band = target, horizon, None if band is None else tuple(band)
        self.kl_coef: float | None = None

    def check_arguments(self, args: PPOConfig) -> None:
        """Refuse a coefficient that stays 0, and a horizon so short that one rollout could turn its sign."""
        if args.kl_coef == 0:
            raise ValueError(
                "AdaptiveKLCallback multiplies the KL coefficient, which stays 0 where kl_coef=0: set kl_coef above 0 "
                "(0.05 is the default), or leave the callback out."
            )
        episodes = args.rollout_batch_size * args.world_size
        if self.band is None and self.horizon is not None and MAX_KL_ERROR * episodes >= self.horizon:
            raise ValueError(
                f"AdaptiveKLCallback: horizon={self.horizon} episodes is too short for rollouts of {episodes}, each of "
                f"which may change the coefficient by {MAX_KL_ERROR * episodes / self.horizon:.0%}: set horizon above "
                f"{MAX_KL_ERROR * episodes:g}."
            )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start over when training does; a resumed run goes on from the coefficient in its checkpoint."""
        self.check_arguments(args)
        if state.global_step == 0:
            self.kl_coef = None
        if self.band is None and self.horizon is not None:
            rollout, run = _episodes(args, state)
            if MAX_KL_ERROR * run < 0.1 * self.horizon:
                warnings.warn(
                    f"AdaptiveKLCallback: with horizon={self.horizon} the KL coefficient changes by at most "
                    f"{MAX_KL_ERROR * run / self.horizon:.1%} in all of this run's {run} episodes. Leave horizon out: "
                    f"it is then {default_horizon(rollout, run)}.",
                    stacklevel=2,
                )

    def on_rollout_begin(self, args: Any, state: Any, control: Any, settings: RolloutSettings, **kwargs: Any) -> None:
        """Put the current coefficient to work."""
        if self.kl_coef is None:
            self.kl_coef = settings.kl_coef
        settings.kl_coef = self.kl_coef

    def on_rollout_end(
        self, args: Any, state: Any, control: Any, rollout: Any, samples: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Set the coefficient of the next rollout by the KL of this one."""
        assert self.kl_coef is not None, "on_rollout_begin comes first"
        if self.band is not None:
            self.kl_coef = band_kl_coef(self.kl_coef, metrics["kl"], low=self.band[0], high=self.band[1])
        else:
            self.kl_coef = proportional_kl_coef(
                self.kl_coef,
                metrics["kl"],
                target=self.target,
                horizon=self.horizon or default_horizon(*_episodes(args, state)),
                episodes=args.rollout_batch_size * args.world_size,
                max_error=MAX_KL_ERROR,
            )

    def state(self) -> dict:
        """For `trainer_state.json`."""
        band = None if self.band is None else list(self.band)
        return {
            "args": {"target": self.target, "horizon": self.horizon, "band": band},
            "attributes": {"kl_coef": self.kl_coef},
        }


def _episodes(args: PPOConfig, state: TrainerState) -> tuple[int, int]:
    """Episodes of one rollout and of the whole run, over all processes."""
    rollout = args.rollout_batch_size * args.world_size
    return rollout, rollout * -(-state.max_steps // args.steps_per_rollout)


def default_horizon(rollout: int, run: int) -> int:
    """Choose the horizon of the KL controller, in episodes, for a run of so many."""
    return max(rollout, min(run // 10, 10_000))


class RewardNormalizationCallback(PPOCallback, ExportableState):
    """Centres and scales scores by exponential moving averages of their mean and variance, then clips them.

    Args:
        decay: how much of the old average stays per rollout.
        clip: bound on the normalized score, in standard deviations; None turns it off.
    """

    def __init__(self, decay: float = 0.9, clip: float | None = 5.0) -> None:
        if not (is_number(decay) and 0 <= decay < 1):
            raise ValueError(f"RewardNormalizationCallback: decay={decay!r} must be at least 0 and below 1.")
        if clip is not None and not (is_number(clip) and clip > 0):
            raise ValueError(f"RewardNormalizationCallback: clip={clip!r} must be a number above 0, or None.")
        self.decay, self.clip = decay, clip
        self.mean: float | None = None
        self.var: float | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start over when training does."""
        if state.global_step == 0:
            self.mean = self.var = None

    def on_scores(
        self, args: Any, state: Any, control: Any, scores: Tensor, all_scores: Tensor, token_rewards: Tensor,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Update the averages with this rollout, then normalize it, the rewards of single tokens by the same scale."""
        known = all_scores[~all_scores.isnan()]
        if len(known) == 0:
            return
        mean, var = known.mean().item(), known.var(unbiased=False).item()
        if self.mean is not None and self.var is not None:
            mean, var = ema(self.mean, mean, self.decay), ema(self.var, var, self.decay)
        self.mean, self.var = mean, var
        scores.sub_(mean).div_(math.sqrt(var) + 1e-6)
        token_rewards.div_(math.sqrt(var) + 1e-6)
        if self.clip is not None:
            scores.clamp_(-self.clip, self.clip)

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {
            "args": {"decay": self.decay, "clip": self.clip},
            "attributes": {"mean": self.mean, "var": self.var},
        }


class EarlyStoppingOnKLCallback(PPOCallback, ExportableState):
    """Ends training when the policy has left the reference too far behind.

    Args:
        max_kl: KL per response that a rollout may have, nats.
        patience: rollouts in a row above it that end training.
    """

    def __init__(self, max_kl: float = 30.0, patience: int = 1) -> None:
        if not (is_number(max_kl) and is_number(patience) and max_kl > 0 and patience >= 1):
            raise ValueError(
                f"EarlyStoppingOnKLCallback: max_kl={max_kl!r} must be above 0, patience={patience!r} 1 or more."
            )
        self.max_kl, self.patience, self.above = max_kl, patience, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start over when training does; a resumed run goes on counting."""
        if state.global_step == 0:
            self.above = 0

    def on_rollout_end(
        self, args: Any, state: Any, control: TrainerControl, rollout: Any, samples: Any, metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Count. A KL that is no number is not below the bound."""
        self.above = 0 if metrics["kl"] <= self.max_kl else self.above + 1
        if self.above >= self.patience:
            warnings.warn(
                f"Training ends after this step ({state.global_step + 1}): KL to the reference is "
                f"{metrics['kl']:.1f} nats per response, above {self.max_kl} for {self.above} rollouts in a row.",
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here: in the middle of a step Trainer would drop what was accumulated."""
        if self.above >= self.patience:
            control.should_training_stop = True

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {"args": {"max_kl": self.max_kl, "patience": self.patience}, "attributes": {"above": self.above}}


def _leave_processes() -> None:
    # Threads of a process group that nobody leaves may abort the interpreter at its end, and that is its exit status.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class InterruptCallback(TrainerCallback):
    """SIGTERM or SIGINT once: finish the optimizer step, write a checkpoint, and end as the signal would have.

    A second one ends the process at once. A step is finished rather than a micro-batch, because only between steps
    is the state one that a run can resume from to the same bits. A rollout or an evaluation is not waited for, nor is
    a reward function in it (`interrupt.py`): a resumed run makes the same once more. Signals are listened to inside the
    `with` block.

    Processes that train together stop together, after the same step, whichever of them the signal reached. One that
    only heard of it has not received it: a launcher that sends it to one after the other sends it once to each.

    Args:
        highest: of a number on each process the highest, called on all of them at the same step.
    """

    def __init__(self, highest: Callable[[int], int] = int) -> None:
        self.highest = highest
        self.interrupt = Interrupt()
        self.stops_for: int | None = None
        self.began_at = 0
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> int | None:
        """The signal that came to this process."""
        return self.interrupt.received

    def __enter__(self) -> InterruptCallback:
        self.interrupt.received = self.stops_for = None
        if threading.current_thread() is threading.main_thread():  # only there can one listen to signals
            self._before = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        self._put_back()
        number = self.received or self.stops_for
        self.interrupt.received = self.stops_for = None
        if number is not None:
            atexit.register(_leave_processes)
            signal.raise_signal(number)  # what was put off happens now, with the conventional exit status

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step that is resumed from: of it there is a checkpoint."""
        self.began_at = state.global_step

    @property
    def came(self) -> bool:
        """Whether a signal ends the run."""
        return self.received is not None or self.stops_for is not None

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if a signal came to any process."""
        self.agree()
        if self.stops_for is not None:
            control.should_save = control.should_training_stop = True

    def agree(self) -> None:
        """Tell the other processes of a signal, and hear of theirs; all wait for all."""
        self.stops_for = self.highest(self.received or 0) or None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            self._put_back()
            signal.raise_signal(number)
        name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # it came while stderr was written to, which cannot be entered twice
            print(
                f"{name}: finishing this step and saving; send it again to stop at once.", file=sys.stderr, flush=True
            )
        self.interrupt.receive(number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class WishesCallback(TrainerCallback):
    """Keeps what callbacks wished for during a rollout (`control.should_save` and the like) until the step after it.

    A rollout comes before its first step begins, and there Trainer forgets what was wished for.
    """

    NAMES = ("should_save", "should_evaluate", "should_log")

    def __init__(self) -> None:
        self._wished: set[str] = set()

    def note(self, control: TrainerControl) -> None:
        """Remember what is wished for now."""
        self._wished |= {name for name in self.NAMES if getattr(control, name)}

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Wish for it again."""
        for name in self._wished:
            setattr(control, name, True)
        self._wished.clear()


class NumericsWatchCallback(PPOCallback):
    """Warns, once each and in words, of what usually means that a run is not doing what it seems to.

    Args:
        max_kl: KL per response beyond which text tends to break, nats.
    """

    def __init__(self, max_kl: float = 50.0) -> None:
        self.max_kl = max_kl
        self._said: set[str] = set()

    def on_rollout_end(
        self, args: Any, state: Any, control: Any, rollout: Rollout, samples: Samples, metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Look at the figures of a rollout."""
        kl, entropy = metrics["kl"], metrics["entropy"]
        truncated = args.top_p < 1 or args.top_k or args.min_p
        # The mean of a log-ratio over few responses scatters around its expectation, which is never negative.
        spread = float(rollout.kl.std(unbiased=False)) / max(1, len(rollout)) ** 0.5
        self._warn_if(
            "negative KL",
            kl < -0.5 - 4 * spread,
            f"KL to the reference is {kl:.2f} nats per response, and a KL cannot be negative. "
            + (
                "top_p, top_k or min_p sample from another distribution than the one that is scored: turn them off."
                if truncated
                else "Look for a model or reference that changes outside of training, or dropout in one of them."
            ),
        )
        self._warn_if(
            "high KL",
            kl > self.max_kl,
            f"KL to the reference is {kl:.0f} nats per response; beyond {self.max_kl:.0f} text tends to break. Raise "
            "kl_coef, use AdaptiveKLCallback, or lower the learning rate.",
        )
        self._warn_if(
            "entropy",
            entropy < 0.02,
            f"Entropy is {entropy:.3f} nats per token: the policy hardly samples any more. Raise kl_coef or "
            "entropy_coef, or lower the learning rate.",
        )
        texts = {as_text(text) for text in samples.completions.completions}
        self._warn_if(
            "one answer",
            len(texts) == 1 and len(rollout) > 1,
            f"All {len(rollout)} prompts of a rollout got the same answer: the policy has collapsed. Look at what the "
            "reward pays for, and raise kl_coef.",
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Look at the first ratio of a rollout, which only learning may move away from 1, and at the gradient."""
        logs = logs or {}
        error = logs.get("ppo/first_ratio_error", 0.0)
        self._warn_if(
            "first ratio",
            error > 0.1,
            f"Before anything was learned from a rollout the ratio was off 1 by {error:.2f} on average: old and new "
            "log-probabilities do not come from the same computation. LoRA dropout does this, and very low precision.",
        )
        self._warn_if(
            "no gradient",
            logs.get("grad_norm") == 0 and state.global_step > args.critic_warmup_steps,
            "The gradient of the actor is exactly 0, so nothing is learned: all answers score alike (reward_std), none "
            "has a score, or the weights that are trained take no part in the forward pass (look at peft_config).",
        )

    def _warn_if(self, kind: str, holds: bool, text: str) -> None:
        if holds and kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, stacklevel=2)


class SamplesTableCallback(PPOCallback):
    """Shows a table of sampled responses with their scores as training goes, and at each evaluation.

    Args:
        trackers: gives Trainer's callbacks, among them those of `report_to`: wandb and trackio get the table as
            `completions` and `eval/completions`, TensorBoard as text. By default it is printed only.
    """

    def __init__(self, trackers: Callable[[], Iterable[TrainerCallback]] = tuple) -> None:
        self.trackers = trackers

    def on_rollout_end(
        self, args: Any, state: TrainerState, control: Any, rollout: Rollout, samples: Samples, metrics: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Show at `num_sample_generations` rollouts spread over training, or at all with `log_completions`."""
        due = args.log_completions or is_due(args, state, args.num_sample_generations)
        if state.is_world_process_zero and due:
            self._show("completions", f"Samples at step {state.global_step}", args, state, samples)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, samples: Samples | None = None, **kwargs: Any
    ) -> None:
        """Show the first answers of an evaluation: the same prompts each time."""
        if state.is_world_process_zero and samples is not None:
            self._show("eval/completions", f"Evaluation at step {state.global_step}", args, state, samples)

    def _show(self, name: str, title: str, args: Any, state: TrainerState, samples: Samples) -> None:
        columns = sample_table(samples, args.num_completions_to_print)
        print_samples(title, columns)
        send_table(self.trackers(), name, columns, state.global_step)


def sample_table(samples: Samples, rows: int) -> dict[str, list[Any]]:
    """The first rows of samples in columns: prompt, completion, reward, KL in nats, and what was logged, as text."""
    shown, completions = range(min(rows, len(samples))), samples.completions
    kl = ((samples.logprobs - samples.ref_logprobs) * samples.mask).sum(1)
    return {
        "prompt": [as_text(completions.prompts[i]) for i in shown],
        "completion": [as_text(completions.completions[i]) for i in shown],
        "reward": [float(samples.scores[i]) for i in shown],
        "kl": [float(kl[i]) for i in shown],
        **{name: [str(values[i]) for i in shown] for name, values in samples.extra.items()},
    }


def is_due(args: PPOConfig, state: TrainerState, times: int) -> bool:
    """Whether the rollout at this step is the first, or one of `times` that are spread evenly over training."""
    rollouts, index = -(-state.max_steps // args.steps_per_rollout), state.global_step // args.steps_per_rollout
    before, due = ((i * times) // max(1, rollouts) for i in (index - 1, index))
    return index == 0 or due > before


def as_text(prompt: Any) -> str:
    """A prompt or completion for people: messages become lines."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey.

    Control characters, what turns the direction of writing, and what the encoding of stdout lacks become escapes.
    """
    # A log or pipe on Windows is in a code page, and a character that it lacks would end training.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    turning = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "".join(
        c.encode("unicode_escape").decode()
        if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in turning
        else c
        for c in text
    )


def print_samples(title: str, columns: dict[str, list[Any]]) -> None:
    """Print a table, fractions with two digits: with rich where it is installed, as plain lines otherwise."""
    title = printable(title)
    columns = {
        printable(name): [f"{v:.2f}" if isinstance(v, float) else printable(str(v)) for v in values]
        for name, values in columns.items()
    }
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(title)
        for row in zip(*columns.values(), strict=True):
            print(" | ".join(f"{name}: {value}" for name, value in zip(columns, row, strict=True)))
        return
    table = Table(title=Text(title), show_lines=True)  # Text: what people and models write is not markup
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(value) for value in row))
    Console().print(table)
