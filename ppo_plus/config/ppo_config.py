"""Hyperparameters of PPO, under TRL's names where TRL has one; validates values and combinations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments

from ..algo.kl import KL_ESTIMATORS
from .checks import PROBABILITY, Check, _field, above, at_least, at_most, below, check_fields, one_of, refuse_unless
from .critic_fields import CriticFields
from .sharding import _ShardsFrozenWeights, check_no_sharding, resolve_fsdp
from .shared import (
    _check_length,
    _RedactSecrets,
    _refuse_options,
    _resolve_direction,
    _resolve_precision,
    _schedule_follows_metric,
    _start_cpu_process_group,
)
from .trl_fields import TRLFields, ignore_derived_fields
from .vllm_fields import VLLMFields

if TYPE_CHECKING:
    TokenIds = int | list[int] | None
else:
    TokenIds = list[int] | None  # HfArgumentParser reads one type for each argument of the command line


NOT_GREEDY = Check("above 0 (PPO does not support greedy decoding)", lambda temperature: temperature > 0)


@ignore_derived_fields
@dataclass(repr=False)
class PPOConfig(CriticFields, VLLMFields, TRLFields, _ShardsFrozenWeights, _RedactSecrets, TrainingArguments):
    """Configuration of `PPOTrainer`.

    Sizes, per process: a micro-batch has `per_device_train_batch_size` responses, a minibatch (one optimizer step)
    `gradient_accumulation_steps` micro-batches, a rollout `num_mini_batches` minibatches; PPO makes `num_ppo_epochs`
    passes over each rollout. `rollout_batch_size`, `prompts_per_rollout` and `steps_per_rollout` are derived.
    """

    # Length of training
    total_episodes: int | None = _field(
        None, "Responses to train on, all processes; overrides num_train_epochs.", at_least(1)
    )
    num_ppo_epochs: int = _field(2, "PPO epochs: passes over each rollout.", at_least(1))
    num_mini_batches: int = _field(2, "Optimizer steps per PPO epoch.", at_least(1))
    num_generations: int = _field(
        1, "Responses per prompt in a rollout, all in one minibatch; an evaluation samples one.", at_least(1)
    )
    local_rollout_forward_batch_size: int = _field(
        64, "Responses per pass of reward scoring and evaluation; log-probabilities use micro-batches.", at_least(1)
    )
    generation_batch_size: int | None = _field(
        None, "Responses decoded in parallel per process; None means local_rollout_forward_batch_size.", at_least(1)
    )

    # Sampling
    response_length: int = _field(53, "Maximum response length, in tokens.", at_least(1))
    max_prompt_length: int | None = _field(
        None, "Maximum prompt length, tokens; longer ones keep BOS and last tokens. None means no limit.", at_least(1)
    )
    temperature: float = _field(
        0.7, "Sampling temperature; logits are divided by it for log-probabilities too.", NOT_GREEDY
    )
    top_p: float = _field(
        1.0, "Nucleus sampling; below 1, the sampling distribution differs from the scored one.", above(0) & at_most(1)
    )
    top_k: int = _field(0, "Sample from the k most likely tokens; 0 disables it.", at_least(0))
    min_p: float = _field(
        0.0, "Exclude tokens less likely than min_p times the most likely token; 0 disables it.", at_least(0) & below(1)
    )
    stop_token: Literal["eos"] | None = _field(None, "'eos': responses end at the tokenizer's EOS, as by default.")
    stop_token_id: TokenIds = _field(
        None, "A token id, or a list of token ids, that ends a response in addition to the EOS ids."
    )
    max_tool_calling_iterations: int | None = _field(
        None, "Maximum times that a response calls tools; None means as often as fit into response_length.", at_least(0)
    )
    missing_eos_penalty: float | None = _field(
        1.0, "Reward units subtracted from the score of a response without a stop token; None disables it.", at_least(0)
    )
    train_on_eos: bool = _field(True, "Include the stop token in the losses, as an action of the policy.")

    # Reward
    reward_weights: list[float] | None = _field(None, "Weight of each reward function; None means 1 for each.")
    reward_pessimism: float | None = _field(
        None, "Beta of -beta * log mean exp(-reward / beta) over rewards, reward units; None sums them.", above(0)
    )
    whiten_rewards: bool = _field(False, "Scale the shaped rewards of a rollout to variance 1, keeping their mean.")
    kl_coef: float = _field(0.05, "Initial coefficient of the KL penalty, reward units per nat.", at_least(0))
    kl_estimator: str = _field("k1", "Per-token KL estimator.", one_of(*KL_ESTIMATORS))
    kl_penalty_in: Literal["reward", "loss"] = _field(
        "reward", "Apply the KL penalty in the reward or as a term of the loss."
    )
    gamma: float = _field(1.0, "Discount per token.", PROBABILITY)
    lam: float = _field(0.95, "GAE lambda.", PROBABILITY)

    # Objective
    objective: Literal["clip", "kl_penalty", "unclipped", "masked"] = _field(
        "clip", "PPO2's clipped ratio, PPO1's KL penalty, no bound, or SAO's mask on ratios to the sampler."
    )
    cliprange: float = _field(0.2, "Range of the ratio, below 1 and (by default) above 1.", above(0) & below(1))
    cliprange_high: float | None = _field(None, "Clip range above 1; None means cliprange.", above(0))
    importance_sampling_cap: float | None = _field(
        2.0,
        "Cap of importance weights, which correct numerical differences of decoding; None disables it.",
        at_least(1),
    )
    dual_clip: float | None = _field(
        None, "Bound on the loss of negative advantages, as a multiple of the advantage; None disables it.", above(1)
    )
    old_policy_kl_coef: float = _field(1.0, "Weight of KL(old || new) in objective='kl_penalty', per nat.", at_least(0))
    positive_example_nll_weight: float = _field(
        0.0, "Weight of the negative log-likelihood of responses with a score above 0 (VAPO).", at_least(0)
    )
    entropy_coef: float = _field(0.0, "Weight of the entropy bonus, per nat.", at_least(0))
    cliprange_value: float | None = _field(0.2, "Clip range of the value, reward units; None disables it.", above(0))
    vf_coef: float | None = _field(
        None, "Weight of the value loss; None means 0.1 for critic='shared', else 1.", at_least(0)
    )

    # Model and data
    model_init_kwargs: dict[str, Any] | str | None = _field(
        None, "Keyword arguments of from_pretrained, for a model given by name."
    )
    disable_dropout: bool = _field(True, "Set the base model's dropout to 0; lora_dropout of LoRA is kept.")
    cache_frozen_layers: bool = _field(
        True, "Run the frozen layers below all adapters once per rollout and cache their hidden states."
    )
    use_ppo_plus_kernels: bool = _field(
        True, "Replace forwards of LoRA, norms, attention and score heads by faster or more exact ones."
    )
    chat_template_kwargs: dict[str, Any] | str | None = _field(None, "Keyword arguments of apply_chat_template.")
    skip_special_tokens: bool = _field(
        True, "Remove special tokens from completions; False keeps them for reward functions (except the final EOS)."
    )
    shuffle_dataset: bool = _field(True, "Reshuffle prompts each epoch; a streaming dataset keeps its order.")

    # Error handling
    on_reward_error: Literal["raise", "skip"] = _field(
        "raise", "If a reward function fails or returns invalid values: 'raise', or 'skip' it for that rollout."
    )
    reward_timeout: float | None = _field(
        None, "Maximum seconds per rollout for a reward function; None means no limit.", above(0)
    )
    tool_timeout: float | None = _field(
        None, "Maximum seconds per call of a tool, after which its answer is an error; None means no limit.", above(0)
    )
    on_save_error: Literal["raise", "skip"] = _field(
        "raise", "If a checkpoint cannot be written (disk full): 'raise', or 'skip' it and continue training."
    )
    max_skipped_steps: int = _field(
        5, "Consecutive steps with NaN or infinite gradients after which training stops with an error.", at_least(1)
    )

    # Logging and reports
    num_sample_generations: int = _field(10, "Sample tables printed during training; 0 disables them.", at_least(0))
    log_completions: bool = _field(False, "Print a sample table after every rollout.")
    num_completions_to_print: int = _field(5, "Responses per sample table.", at_least(1))
    html_report: bool = _field(
        True, "Write report.html to output_dir: curves, answers to fixed prompts, tokens of rollouts."
    )
    report_rewards: bool = _field(
        False, "Score the report's fixed prompts with reward functions too (11 more calls), not only reward models."
    )
    push_report: bool = _field(
        False, "Push report.html, which contains prompts and answers, to the Hub with the model."
    )
    eval_win_rate: bool = _field(
        False, "Log in evaluations how often an answer beats the reference's, which is sampled once per prompt."
    )

    # Defaults that differ from TrainingArguments
    learning_rate: float = _field(1e-5, "Learning rate of the actor.", at_least(0))
    adam_epsilon: float = _field(1e-5, "Epsilon of Adam.", at_least(0))
    bf16: bool | None = _field(
        None, "bf16 autocast; None enables it on GPUs with native bf16, and fp16 on older tensor cores (V100, T4)."
    )
    logging_steps: float | None = _field(None, "Optimizer steps between logs; None means once per rollout.", above(0))
    logging_nan_inf_filter: bool = _field(False, "Exclude NaN and infinite losses from the logged mean.")
    remove_unused_columns: bool = _field(False, "Must be False: reward functions receive every dataset column.")
    restore_callback_states_from_checkpoint: bool = _field(
        True, "Restore callback states on resume, such as the adaptive KL coefficient and reward statistics."
    )

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
        "critic_peft_config",
    ]

    def __post_init__(self) -> None:
        check_no_sharding(self)
        resolve_fsdp(self)
        _resolve_precision(self)
        batch = {name: at_least(1) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
        check_fields(self, PPOConfig, **batch)
        self._check_critic()
        self._check_vllm()
        self._check_combinations()
        self._check_trainer_options()
        _check_length(self)
        if self.logging_steps is None:
            self.logging_steps = self.steps_per_rollout
        self._apply_trl_fields()
        self._resolve_best_metric()
        if self.full_determinism:  # cuBLAS may read the variable only once, before Trainer sets it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        if self.train_sampling_strategy == "sequential":
            self.shuffle_dataset = False
        _start_cpu_process_group(self)
        super().__post_init__()
        _resolve_direction(self)

    @property
    def rollout_batch_size(self) -> int:
        """Responses per process and rollout, N."""
        return self.num_mini_batches * self.gradient_accumulation_steps * self.per_device_train_batch_size

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts per process and rollout, each with `num_generations` responses."""
        return self.rollout_batch_size // self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def requested_max_steps(self) -> int:
        """Optimizer steps set by `max_steps` or else `total_episodes`; -1 where `num_train_epochs` decides."""
        if self.total_episodes is None or self.max_steps > 0:
            return self.max_steps
        return -(-self.total_episodes // (self.rollout_batch_size * self.world_size)) * self.steps_per_rollout

    @property
    def tracks_best_metric(self) -> bool:
        """Whether saving, loading or the learning rate depends on `metric_for_best_model`."""
        return self.load_best_model_at_end or self.save_strategy == "best" or _schedule_follows_metric(self)

    @property
    def prompt_seed(self) -> int:
        """Seed of the prompt order: `data_seed`, or `seed` if None."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def extra_stop_ids(self) -> list[int]:
        """The token ids in `stop_token_id`, as a list."""
        if self.stop_token_id is None:
            return []
        return [self.stop_token_id] if isinstance(self.stop_token_id, int) else list(self.stop_token_id)

    @property
    def tokenize_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of prompt tokenization."""
        return {name: getattr(self, name) for name in ("max_prompt_length", "chat_template_kwargs")}

    @property
    def resolved_vf_coef(self) -> float:
        """Weight of the value loss, with the default of `critic` if `vf_coef` is None."""
        return self.vf_coef if self.vf_coef is not None else (0.1 if self.critic == "shared" else 1.0)

    def _check_combinations(self) -> None:
        rows, answers = self.per_device_train_batch_size, self.num_generations
        if rows % answers and (answers % rows or rows * self.gradient_accumulation_steps % answers):
            raise ValueError(
                f"PPOConfig: num_generations={answers} responses to a prompt share a minibatch, and as many of them as "
                f"fit share a micro-batch: per_device_train_batch_size={rows} must be a multiple of {answers}; or a "
                f"divisor of it, with gradient_accumulation_steps={self.gradient_accumulation_steps} such that "
                f"per_device_train_batch_size * gradient_accumulation_steps is a multiple of {answers}."
            )
        if self.stop_token == "eos" and self.stop_token_id is not None:
            raise ValueError("PPOConfig: stop_token and stop_token_id exclude each other: keep one of them.")
        if self.kl_penalty_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "PPOConfig: kl_penalty_in='loss' has no effect with kl_estimator='k1', whose gradient is zero in "
                "expectation. Set kl_estimator='k3' (or 'k2', 'abs'), or kl_penalty_in='reward'."
            )
        if self.vf_coef == 0 and (self.critic_warmup_steps or self.num_critic_updates > 1):
            name = "critic_warmup_steps" if self.critic_warmup_steps else "num_critic_updates"
            raise ValueError(
                f"PPOConfig: {name}={getattr(self, name)} trains the critic, and vf_coef=0.0 leaves it untrained: set "
                f"vf_coef above 0 or to None, or remove {name}."
            )
        if self.advantage_baseline == "rloo" and (answers == 1 or self.prefix_reward_baseline):
            conflict = f"num_generations={answers}" if answers == 1 else "prefix_reward_baseline=True"
            raise ValueError(
                f"PPOConfig: advantage_baseline='rloo' does not work with {conflict}: it is the mean return of the "
                "prompt's other responses, in place of prefix scores. Set num_generations to 2 or more, and "
                "prefix_reward_baseline to None or False."
            )
        weights = self.reward_weights
        refuse_unless(not weights or any(weights), self, "reward_weights", "above or below 0 for one of the rewards")
        if self.reward_pessimism is not None and weights is not None:
            shares = min(weights, default=0) >= 0 and sum(weights) > 0
            expected = "at least 0, and one above 0, with reward_pessimism: they are shares"
            refuse_unless(shares, self, "reward_weights", expected)
        high_has_effect = self.objective == "masked" or self.cliprange_high is None
        if self.objective != "clip" and not (self.dual_clip is None and high_has_effect):
            name = "cliprange_high" if self.dual_clip is None else "dual_clip"
            raise ValueError(f"PPOConfig: {name} has no effect with objective={self.objective!r}. Remove it.")

    def _resolve_best_metric(self) -> None:
        if not self.tracks_best_metric:
            return
        self.metric_for_best_model = self.metric_for_best_model or "eval_reward"
        refuse_unless(
            not self.metric_for_best_model.endswith("loss"), self, "metric_for_best_model",
            "an evaluation metric ('eval_reward', the default, or 'eval_kl'); evaluations compute no loss",
        )  # fmt: skip
        refuse_unless(
            self.eval_win_rate or self.metric_for_best_model.removeprefix("eval_") != "win_rate", self,
            "metric_for_best_model", "measured: set eval_win_rate=True, or choose 'eval_reward'",
        )  # fmt: skip
        if self.greater_is_better is None:  # Trainer maximizes every metric that is not a loss
            self.greater_is_better = self.metric_for_best_model.rpartition("_")[2] != "kl"

    def _check_trainer_options(self) -> None:
        refused = {
            "auto_find_batch_size": "it would change the rollout size; lower per_device_train_batch_size and raise "
            "gradient_accumulation_steps instead",
            "label_smoothing_factor": "PPO has no labels",
            "neftune_noise_alpha": "with noisy embeddings the scored policy would differ from the sampled policy",
            "ignore_data_skip": "prompts are a function of (seed, epoch), so skipping them takes no time",
            "remove_unused_columns": "reward functions receive every column of the dataset; remove columns with "
            "dataset.remove_columns",
            "group_by_length": "micro-batches are already sorted by length",
            "optim_target_modules": "GaLore and APOLLO would receive the parameter groups of actor and critic, in "
            "which they project no gradient",
        }
        if self.train_sampling_strategy not in ("random", "sequential"):
            refused["train_sampling_strategy"] = "micro-batches are already sorted by length"
        if self.optim in ("lomo", "adalomo"):
            refused["optim"] = (
                "it updates weights in the backward pass, so gradients cannot be accumulated, clipped or skipped"
            )
        _refuse_options(self, refused)
