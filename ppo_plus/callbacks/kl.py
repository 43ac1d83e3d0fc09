"""Callbacks that steer by the KL divergence to the reference policy."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ..algo.kl import MAX_KL_ERROR, band_kl_coef, proportional_kl_coef
from ..config import PPOConfig, is_number
from .base import PPOCallback, RolloutSettings


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
