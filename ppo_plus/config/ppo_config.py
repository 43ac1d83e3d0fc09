"""Hyper-parameters: TRL's names where TRL has one, a unit in every help text, wrong combinations refused here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from transformers import TrainingArguments

from ..algo.kl import KL_ESTIMATORS
from .shared import (
    _check_length,
    _is_int,
    _RedactSecrets,
    _resolve_direction,
    _resolve_precision,
    _schedule_follows_metric,
    check_no_sharding,
    is_number,
)
from .trl_fields import TRLFields, ignore_derived_fields

if TYPE_CHECKING:
    TokenIds = int | list[int] | None
else:
    TokenIds = list[int] | None  # HfArgumentParser reads one type for each argument of the command line


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@ignore_derived_fields
@dataclass(repr=False)
class PPOConfig(TRLFields, _RedactSecrets, TrainingArguments):
    """Configuration of `PPOTrainer`.

    Sizes, per process: a micro-batch has `per_device_train_batch_size` responses, a minibatch (one optimizer step)
    `gradient_accumulation_steps` micro-batches, a rollout `num_mini_batches` minibatches, and each rollout is
    learned from `num_ppo_epochs` times. `rollout_batch_size` and `steps_per_rollout` are derived.
    """

    # Length of training
    total_episodes: int | None = _field(None, "Responses to train on, over all processes; overrides num_train_epochs.")
    num_ppo_epochs: int = _field(2, "Passes over each rollout.")
    num_mini_batches: int = _field(2, "Optimizer steps per pass over a rollout.")
    local_rollout_forward_batch_size: int = _field(
        64, "Responses per forward pass of rewards and evaluations; what is learned from goes in micro-batches."
    )
    generation_batch_size: int | None = _field(
        None, "Responses decoded side by side; None means local_rollout_forward_batch_size."
    )

    # Sampling
    response_length: int = _field(53, "Longest response, in tokens.")
    max_prompt_length: int | None = _field(
        None, "Longest prompt, in tokens: of a longer one its BOS and its last tokens are kept; None keeps all."
    )
    temperature: float = _field(0.7, "Sampling temperature; divides the scored logits too.")
    top_p: float = _field(1.0, "Nucleus sampling; below 1 the sampled distribution is not the scored one.")
    top_k: int = _field(0, "Sample among the k likeliest tokens; 0 turns it off.")
    min_p: float = _field(0.0, "Drop tokens less likely than min_p times the likeliest; 0 turns it off.")
    stop_token: Literal["eos"] | None = _field(None, "'eos': responses end at the tokenizer's EOS, as by default.")
    stop_token_id: TokenIds = _field(None, "A token id, or a list of them, that ends a response besides the EOS ids.")
    missing_eos_penalty: float | None = _field(1.0, "Subtracted from the score of a response without a stop token.")
    train_on_eos: bool = _field(True, "Whether the stop token is an action that is learned.")

    # Reward
    reward_weights: list[float] | None = _field(None, "Weight of each reward function; None means 1 each.")
    whiten_rewards: bool = _field(False, "Scale the shaped rewards of a rollout to variance 1, keeping their mean.")
    kl_coef: float = _field(0.05, "Initial coefficient of the KL penalty, reward units per nat.")
    kl_estimator: str = _field("k1", f"Per-token KL estimator, one of {', '.join(KL_ESTIMATORS)}.")
    kl_penalty_in: Literal["reward", "loss"] = _field("reward", "Where the KL to the reference is penalized.")
    gamma: float = _field(1.0, "Discount per token.")
    lam: float = _field(0.95, "GAE lambda.")

    # Objective
    objective: Literal["clip", "kl_penalty", "unclipped"] = _field(
        "clip", "PPO2's clipped ratio, PPO1's KL penalty, or the plain importance-weighted policy gradient."
    )
    cliprange: float = _field(0.2, "Clip range of the probability ratio, below 1 and (by default) above.")
    cliprange_high: float | None = _field(None, "Clip range above 1; None means cliprange.")
    importance_sampling_cap: float | None = _field(
        2.0, "Bound on the weight that corrects for decoding's numerics; None means no correction."
    )
    dual_clip: float | None = _field(None, "Bound on the loss of negative advantages, above 1; None turns it off.")
    old_policy_kl_coef: float = _field(1.0, "Weight of KL(old || new) in objective='kl_penalty', per nat.")
    entropy_coef: float = _field(0.0, "Weight of the entropy bonus, per nat.")
    cliprange_value: float | None = _field(0.2, "Clip range of the value, reward units; None turns it off.")
    vf_coef: float | None = _field(None, "Weight of the value loss; None means 0.1 for critic='shared', else 1.")

    # Critic
    critic: Literal["shared", "detached", "adapter", "separate"] = _field(
        "shared", "Where the value head reads: the actor, without gradient, an own adapter, or value_model."
    )
    value_head: Literal["linear", "mlp"] = _field("linear", "Shape of the value head.")
    value_head_activation: Literal["silu", "gelu"] = _field("silu", "Activation of value_head='mlp'.")
    prefix_reward_baseline: bool | None = _field(
        None, "Let values start from the reward adapter's scores of prefixes; None: if the head reads the actor."
    )
    value_head_learning_rate: float = _field(1e-4, "Learning rate of the value head.")
    critic_backbone_learning_rate: float = _field(2e-5, "Learning rate of a critic's own adapter or model.")
    critic_warmup_steps: int = _field(0, "First optimizer steps, in which only the critic learns.")

    # Model and data
    model_init_kwargs: dict[str, Any] | str | None = _field(None, "Arguments of from_pretrained, for a model by name.")
    disable_dropout: bool = _field(True, "Zero the base model's dropout; LoRA's own lora_dropout stays.")
    cache_frozen_layers: bool = _field(True, "Run the layers below all adapters once per rollout, if there are any.")
    chat_template_kwargs: dict[str, Any] | str | None = _field(None, "Arguments of apply_chat_template.")
    skip_special_tokens: bool = _field(
        True, "Leave special tokens out of completions; False keeps those that rewards look for (not the final EOS)."
    )
    shuffle_dataset: bool = _field(True, "Draw prompts in a new order each epoch; a stream keeps its own.")

    # When something goes wrong
    on_reward_error: Literal["raise", "skip"] = _field(
        "raise", "A reward function that fails or returns nonsense: 'raise', or 'skip' it for that rollout."
    )
    reward_timeout: float | None = _field(
        None, "Seconds that a reward function may take for one rollout; None waits for ever."
    )
    on_save_error: Literal["raise", "skip"] = _field(
        "raise", "A checkpoint that cannot be written (disk full): 'raise', or 'skip' it and train on."
    )
    max_skipped_steps: int = _field(5, "Steps in a row with NaN or infinite gradients before training stops.")

    # Looking at it
    num_sample_generations: int = _field(10, "How many times over training to show sampled responses; 0 is never.")
    log_completions: bool = _field(False, "Show sampled responses after every rollout.")
    num_completions_to_print: int = _field(5, "Responses per table of samples.")
    html_report: bool = _field(True, "Keep report.html in output_dir: curves, fixed prompts, tokens of rollouts.")
    report_rewards: bool = _field(
        False, "Score the report's fixed prompts too: calls reward functions 11 more times. Reward models always do."
    )
    push_report: bool = _field(False, "Push report.html, which shows prompts and answers, to the Hub with the model.")
    eval_win_rate: bool = _field(
        False, "Evaluations report how often an answer beats the reference's, which is sampled once for it."
    )

    # Defaults that differ from TrainingArguments
    learning_rate: float = _field(1e-5, "Learning rate of the actor.")
    adam_epsilon: float = _field(1e-5, "Epsilon of Adam.")
    bf16: bool | None = _field(
        None, "bf16 autocast; None means: where the GPU has it in hardware, and fp16 on V100, T4 and the like."
    )
    logging_steps: float | None = _field(None, "Optimizer steps between logs; None means once per rollout.")
    logging_nan_inf_filter: bool = _field(False, "Hide NaN losses in the log.")
    remove_unused_columns: bool = _field(False, "Always off: reward functions get every column.")
    restore_callback_states_from_checkpoint: bool = _field(True, "Resume adaptive KL and reward statistics.")

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs"]

    def __post_init__(self) -> None:
        check_no_sharding(self)
        _resolve_precision(self)
        self._check_sizes()
        self._check_numbers()
        self._check_choices()
        self._check_combinations()
        self._check_trainer_options()
        _check_length(self)
        if self.logging_steps is None:
            self.logging_steps = self.steps_per_rollout
        self._apply_trl_fields()
        for name in ("model_init_kwargs", "chat_template_kwargs"):
            _check(_is_dict(getattr(self, name)), self, name, "a dict, one as JSON text, or None")
        self._resolve_best_metric()
        if self.full_determinism:  # cuBLAS may read it once, and the model is looked at before Trainer sets it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        if self.train_sampling_strategy == "sequential":
            self.shuffle_dataset = False
        super().__post_init__()
        _resolve_direction(self)

    @property
    def rollout_batch_size(self) -> int:
        """N: responses per process and rollout."""
        return self.num_mini_batches * self.gradient_accumulation_steps * self.per_device_train_batch_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two generations."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def requested_max_steps(self) -> int:
        """Optimizer steps that `max_steps` or else `total_episodes` ask for; -1 where `num_train_epochs` decides."""
        if self.total_episodes is None or self.max_steps > 0:
            return self.max_steps
        return -(-self.total_episodes // (self.rollout_batch_size * self.world_size)) * self.steps_per_rollout

    @property
    def tracks_best_metric(self) -> bool:
        """Whether something is decided by `metric_for_best_model`."""
        return self.load_best_model_at_end or self.save_strategy == "best" or _schedule_follows_metric(self)

    @property
    def prompt_seed(self) -> int:
        """Of the order of the prompts."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def extra_stop_ids(self) -> list[int]:
        """The ids in `stop_token_id`, as a list."""
        if self.stop_token_id is None:
            return []
        return [self.stop_token_id] if isinstance(self.stop_token_id, int) else list(self.stop_token_id)

    @property
    def tokenize_kwargs(self) -> dict[str, Any]:
        """How prompts become token ids."""
        return {name: getattr(self, name) for name in ("max_prompt_length", "chat_template_kwargs")}

    @property
    def resolved_vf_coef(self) -> float:
        """The weight of the value loss that is used."""
        return self.vf_coef if self.vf_coef is not None else (0.1 if self.critic == "shared" else 1.0)

    @property
    def uses_prefix_reward_baseline(self) -> bool:
        """Whether values start from what reward adapters say of prefixes."""
        return (
            self.critic in ("shared", "detached")
            if self.prefix_reward_baseline is None
            else self.prefix_reward_baseline
        )

    def _check_sizes(self) -> None:
        at_least_one = (
            "num_ppo_epochs", "num_mini_batches", "per_device_train_batch_size", "gradient_accumulation_steps",
            "response_length", "local_rollout_forward_batch_size", "num_completions_to_print",
            "max_skipped_steps",
        )  # fmt: skip
        for name in at_least_one:
            _check(_is_int(getattr(self, name)) and getattr(self, name) >= 1, self, name, "a whole number, 1 or more")
        for name in ("total_episodes", "generation_batch_size", "max_prompt_length", "dataset_num_proc"):
            value = getattr(self, name)
            _check(value is None or (_is_int(value) and value >= 1), self, name, "a whole number of 1 or more, or None")
        stop = self.stop_token_id
        _check(
            stop is None or _is_token_id(stop) or (isinstance(stop, list | tuple) and all(map(_is_token_id, stop))),
            self, "stop_token_id",
            "a token id, a list of them, or None (the id of a token's text is tokenizer.convert_tokens_to_ids(text))",
        )  # fmt: skip
        _check(_is_int(self.top_k) and self.top_k >= 0, self, "top_k", "a whole number, 0 (off) or more")
        for name, zero in (("num_sample_generations", "never"), ("critic_warmup_steps", "none")):
            value = getattr(self, name)
            _check(_is_int(value) and value >= 0, self, name, f"a whole number, 0 ({zero}) or more")

    def _check_numbers(self) -> None:
        rates = ("learning_rate", "value_head_learning_rate", "critic_backbone_learning_rate", "adam_epsilon")
        not_negative = ("kl_coef", "entropy_coef", "old_policy_kl_coef", *rates)
        for name in (*not_negative, "temperature", "top_p", "min_p", "gamma", "lam", "cliprange"):
            _check(is_number(getattr(self, name)), self, name, "a number (YAML takes 3e-5 as text: write 3.0e-5)")
        for name in (
            "cliprange_high", "cliprange_value", "vf_coef", "dual_clip", "missing_eos_penalty",
            "importance_sampling_cap",
        ):  # fmt: skip
            _check(getattr(self, name) is None or is_number(getattr(self, name)), self, name, "a number or None")
        for name in ("reward_timeout", "logging_steps"):
            value = getattr(self, name)
            _check(value is None or (is_number(value) and value > 0), self, name, "a number above 0, or None")
        weights = self.reward_weights
        numbers = isinstance(weights, list | tuple) and all(map(is_number, weights))
        _check(weights is None or numbers, self, "reward_weights", "a list of numbers, or None")
        for name in not_negative:
            _check(getattr(self, name) >= 0, self, name, "0 or more")
        _check(self.temperature > 0, self, "temperature", "above 0 (there is no PPO of greedy decoding)")
        _check(0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1")
        _check(0 <= self.min_p < 1, self, "min_p", "at least 0 and below 1")
        _check(0 <= self.gamma <= 1, self, "gamma", "between 0 and 1")
        _check(0 <= self.lam <= 1, self, "lam", "between 0 and 1")
        _check(0 < self.cliprange < 1, self, "cliprange", "between 0 and 1")
        for name in ("cliprange_high", "cliprange_value"):
            value = getattr(self, name)
            _check(value is None or value > 0, self, name, "above 0, or None")
        _check(self.vf_coef is None or self.vf_coef >= 0, self, "vf_coef", "0 or more, or None")
        _check(self.dual_clip is None or self.dual_clip > 1, self, "dual_clip", "above 1, or None")
        cap = self.importance_sampling_cap
        _check(cap is None or cap >= 1, self, "importance_sampling_cap", "1 or more, or None")
        penalty = self.missing_eos_penalty
        _check(penalty is None or penalty >= 0, self, "missing_eos_penalty", "0 or more, or None: it is subtracted")

    def _check_choices(self) -> None:
        choices: dict[str, tuple] = {
            "kl_estimator": KL_ESTIMATORS,
            "kl_penalty_in": ("reward", "loss"),
            "objective": ("clip", "kl_penalty", "unclipped"),
            "critic": ("shared", "detached", "adapter", "separate"),
            "value_head": ("linear", "mlp"),
            "value_head_activation": ("silu", "gelu"),
            "stop_token": ("eos", None),
            "prefix_reward_baseline": (True, False, None),
            "on_reward_error": ("raise", "skip"),
            "on_save_error": ("raise", "skip"),
        }
        switches = (
            "train_on_eos", "skip_special_tokens", "whiten_rewards", "disable_dropout", "cache_frozen_layers",
            "shuffle_dataset", "log_completions", "html_report", "report_rewards", "push_report", "eval_win_rate",
            "bf16", "logging_nan_inf_filter", "restore_callback_states_from_checkpoint", "ds3_gather_for_generation",
        )  # fmt: skip
        choices |= dict.fromkeys(switches, (True, False))
        for name, allowed in choices.items():
            _check(getattr(self, name) in allowed, self, name, f"one of {', '.join(map(repr, allowed))}")
        for name in ("sft_model_path", "reward_model_path", "exp_name", "model_adapter_name", "ref_adapter_name"):
            _check(isinstance(getattr(self, name), str | os.PathLike | None), self, name, "text or None")

    def _check_combinations(self) -> None:
        if self.stop_token == "eos" and self.stop_token_id is not None:
            raise ValueError("PPOConfig: stop_token and stop_token_id exclude each other: keep one of them.")
        if self.kl_penalty_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "PPOConfig: kl_penalty_in='loss' does nothing with kl_estimator='k1', whose gradient is zero in "
                "expectation. Set kl_estimator='k3' (or 'k2', 'abs'), or kl_penalty_in='reward'."
            )
        if self.objective != "clip" and (self.dual_clip is not None or self.cliprange_high is not None):
            name = "cliprange_high" if self.dual_clip is None else "dual_clip"
            raise ValueError(f"PPOConfig: {name} has no effect with objective={self.objective!r}. Remove it.")

    def _resolve_best_metric(self) -> None:
        if not self.tracks_best_metric:
            return
        self.metric_for_best_model = self.metric_for_best_model or "eval_reward"
        _check(
            not self.metric_for_best_model.endswith("loss"), self, "metric_for_best_model",
            "a metric of evaluations ('eval_reward', the default here, or 'eval_kl'), which have no loss",
        )  # fmt: skip
        if self.greater_is_better is None:  # Trainer takes every metric but a loss for one that should rise
            self.greater_is_better = self.metric_for_best_model.rpartition("_")[2] != "kl"

    def _check_trainer_options(self) -> None:
        refused = {
            "auto_find_batch_size": "it would change the rollout size behind PPO's back; lower "
            "per_device_train_batch_size and raise gradient_accumulation_steps instead",
            "label_smoothing_factor": "PPO has no labels",
            "neftune_noise_alpha": "noisy embeddings would make the scored policy another one than the sampled",
            "ignore_data_skip": "prompts are a function of (seed, epoch), skipping them costs nothing",
            "remove_unused_columns": "reward functions get every column of the dataset; drop columns of yours with "
            "dataset.remove_columns",
            "group_by_length": "micro-batches are already sorted by length",
            "fp16_full_eval": "an evaluation looks at the policy as training does",
            "bf16_full_eval": "an evaluation looks at the policy as training does",
            "optim_target_modules": "GaLore and APOLLO would get the parameter groups of actor and critic, in which "
            "they project no gradient",
        }
        if self.train_sampling_strategy not in ("random", "sequential"):
            refused["train_sampling_strategy"] = "micro-batches are already sorted by length"
        if self.optim in ("lomo", "adalomo"):
            refused["optim"] = "it moves weights in the backward pass, where no step can be summed, clipped or skipped"
        for name, why in refused.items():
            if getattr(self, name, None):
                raise ValueError(f"PPOConfig: {name}={getattr(self, name)!r} is not supported: {why}. Remove it.")


def _is_token_id(value: object) -> bool:
    return _is_int(value) and cast(int, value) >= 0


def _is_dict(value: object) -> bool:
    if isinstance(value, str):  # Trainer parses it
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return value is None or isinstance(value, dict)


def _check(holds: bool, config: PPOConfig, name: str, what: str) -> None:
    if not holds:
        raise ValueError(f"PPOConfig: {name} must be {what}; got {getattr(config, name)!r}.")
