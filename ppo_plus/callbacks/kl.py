"""Callbacks that adapt the KL coefficient or stop training by the KL to the reference policy."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ..algo.kl import MAX_KL_ERROR, band_kl_coef, log_kl_error, pi_kl_coef, proportional_kl_coef
from ..config import PPOConfig, is_number
from .base import PPOCallback, RolloutSettings


class AdaptiveKLCallback(PPOCallback, ExportableState):
    """Adapt the KL coefficient to keep the KL to the reference near a target.

    Args:
        target: target KL per response, nats (proportional controller of Ziegler et al. 2019, section 2.2).
        horizon: episodes over which the controller acts; smaller is faster. None means a tenth of the run's episodes,
            at least one rollout and at most 10,000 (Ziegler's): the coefficient can then change sevenfold in a run.
        band: `(low, high)` in nats; if set, the coefficient is halved below and doubled above, and `target` and
            `horizon` have no effect (adaptive KL penalty of PPO, Schulman et al. 2017, section 4).
        gains: `(proportional, integral)` per rollout; if set, a proportional-integral controller in log space keeps the
            KL near `target` (after Stooke et al. 2020, see `algo.pi_kl_coef`). `(1.0, 0.2)` reaches it in about 16
            rollouts on a simulated policy.
    """

    def __init__(
        self, target: float = 6.0, horizon: int | None = None, band: tuple[float, float] | list[float] | None = None,
        gains: tuple[float, float] | list[float] | None = None,
    ) -> None:  # fmt: skip
        if not (is_number(target) and target > 0 and (horizon is None or (is_number(horizon) and horizon > 0))):
            raise ValueError(f"AdaptiveKLCallback: target={target!r} and horizon={horizon!r} must be above 0.")
        if band is not None and not (len(band) == 2 and all(map(is_number, band)) and 0 <= band[0] < band[1]):
            raise ValueError(f"AdaptiveKLCallback: band={band} must be (low, high) with 0 <= low < high.")
        if gains is not None and not (len(gains) == 2 and all(map(is_number, gains)) and gains[0] >= 0 < gains[1]):
            raise ValueError(f"AdaptiveKLCallback: gains={gains} must be (proportional >= 0, integral > 0).")
        if gains is not None and (horizon is not None or band is not None):
            raise ValueError("AdaptiveKLCallback: horizon and band have no effect with gains. Remove them, or gains.")
        self.target, self.horizon, self.band = target, horizon, None if band is None else tuple(band)
        self.gains = None if gains is None else tuple(gains)
        self.kl_coef: float | None = None
        self.kl_error: float | None = None  # of the last rollout, for gains

    def check_arguments(self, args: PPOConfig) -> None:
        """Refuse kl_coef=0, and a horizon so short that one rollout could change the coefficient's sign."""
        if args.kl_coef == 0:
            raise ValueError(
                "AdaptiveKLCallback multiplies the KL coefficient, which stays 0 with kl_coef=0: set kl_coef above 0 "
                "(the default is 0.05), or remove the callback."
            )
        episodes = args.rollout_batch_size * args.world_size
        if self.band is None and self.horizon is not None and MAX_KL_ERROR * episodes >= self.horizon:
            raise ValueError(
                f"AdaptiveKLCallback: horizon={self.horizon} episodes is too short for rollouts of {episodes}, each of "
                f"which may change the coefficient by {MAX_KL_ERROR * episodes / self.horizon:.0%}: set horizon above "
                f"{MAX_KL_ERROR * episodes:g}."
            )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reset the coefficient when training starts; a resumed run continues with the one in its checkpoint."""
        self.check_arguments(args)
        if state.global_step == 0:
            self.kl_coef = self.kl_error = None
        if self.band is None and self.horizon is not None:
            rollout, run = _episodes(args, state)
            if MAX_KL_ERROR * run < 0.1 * self.horizon:
                warnings.warn(
                    f"AdaptiveKLCallback: with horizon={self.horizon} the KL coefficient changes by at most "
                    f"{MAX_KL_ERROR * run / self.horizon:.1%} over the {run} episodes of this run. Remove horizon: "
                    f"its default is then {default_horizon(rollout, run)}.",
                    stacklevel=2,
                )

    def on_rollout_begin(self, args: Any, state: Any, control: Any, settings: RolloutSettings, **kwargs: Any) -> None:
        """Set the coefficient of this rollout."""
        if self.kl_coef is None:
            self.kl_coef = settings.kl_coef
        settings.kl_coef = self.kl_coef

    def on_rollout_end(
        self, args: Any, state: Any, control: Any, rollout: Any, samples: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Compute the coefficient of the next rollout from the KL of this one."""
        assert self.kl_coef is not None, "on_rollout_begin must be called first"
        if self.band is not None:
            self.kl_coef = band_kl_coef(self.kl_coef, metrics["kl"], low=self.band[0], high=self.band[1])
        elif self.gains is not None:
            previous, self.kl_error = self.kl_error, log_kl_error(metrics["kl"], self.target)
            previous = self.kl_error if previous is None else previous
            proportional, integral = self.gains
            self.kl_coef = pi_kl_coef(
                self.kl_coef, self.kl_error, previous, proportional=proportional, integral=integral
            )
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
        """Return arguments and attributes for `trainer_state.json`."""
        band, gains = (None if pair is None else list(pair) for pair in (self.band, self.gains))
        return {
            "args": {"target": self.target, "horizon": self.horizon, "band": band, "gains": gains},
            "attributes": {"kl_coef": self.kl_coef, "kl_error": self.kl_error},
        }


def _episodes(args: PPOConfig, state: TrainerState) -> tuple[int, int]:
    """Return the episodes of one rollout and of the whole run, over all processes."""
    rollout = args.rollout_batch_size * args.world_size
    return rollout, rollout * -(-state.max_steps // args.steps_per_rollout)


def default_horizon(rollout: int, run: int) -> int:
    """Choose the horizon of the KL controller, in episodes, from the episodes per rollout and per run."""
    return max(rollout, min(run // 10, 10_000))


class EarlyStoppingOnKLCallback(PPOCallback, ExportableState):
    """Stop training when the KL to the reference exceeds a bound.

    Args:
        max_kl: bound on the mean KL per response of a rollout, nats.
        patience: number of consecutive rollouts above the bound after which training stops.
    """

    def __init__(self, max_kl: float = 30.0, patience: int = 1) -> None:
        if not (is_number(max_kl) and is_number(patience) and max_kl > 0 and patience >= 1):
            raise ValueError(
                f"EarlyStoppingOnKLCallback: max_kl={max_kl!r} must be above 0, patience={patience!r} 1 or more."
            )
        self.max_kl, self.patience, self.num_exceeded = max_kl, patience, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reset the count when training starts; a resumed run continues it."""
        if state.global_step == 0:
            self.num_exceeded = 0

    def on_rollout_end(
        self, args: Any, state: Any, control: TrainerControl, rollout: Any, samples: Any, metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Count consecutive rollouts above the bound; a NaN counts as above it."""
        self.num_exceeded = 0 if metrics["kl"] <= self.max_kl else self.num_exceeded + 1
        if self.num_exceeded >= self.patience:
            warnings.warn(
                f"Training stops after this step ({state.global_step + 1}): KL to the reference is "
                f"{metrics['kl']:.1f} nats per response, above {self.max_kl} for {self.num_exceeded} consecutive "
                "rollouts. Raise kl_coef or max_kl, or lower the learning rate.",
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stop training after the step."""
        if self.num_exceeded >= self.patience:
            control.should_training_stop = True

    def state(self) -> dict:
        """Return arguments and attributes for `trainer_state.json`."""
        return {
            "args": {"max_kl": self.max_kl, "patience": self.patience},
            "attributes": {"num_exceeded": self.num_exceeded},
        }
