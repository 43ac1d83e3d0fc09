"""PPO inside `Trainer.train()`.

`PPOTrainer` keeps Trainer's loop unmodified: schedules, clipping, logging, checkpoints, evaluation and callbacks are
inherited. The loop gets the micro-batches of each optimizer step from `get_batch_samples`, where PPO is implemented:

    1. generate            responses to the next N prompts              |
    2. score               by the reward functions                      |  at the first step of a rollout: when
    3. actor and critic    log-probabilities and values                 |  `global_step` is a multiple of
    4. reference           log-probabilities                            |  `steps_per_rollout`
    5. advantages          KL penalty, score at the last token, GAE     |
    6. learn               one minibatch per step; `compute_loss` is its loss

Steps 1 to 4 are in rollout/collector.py, 5 is in rollout/advantages.py. All seeds are functions of `state.global_step`,
which is in every checkpoint. Collaborators in training/ do what surrounds the algorithm: `Checkpointer`, `Evaluator`,
`RolloutPhase`, `GradientAccumulator`, `NonfiniteGradientGuard`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput

from . import algo
from .config import PPOConfig, copy_arguments
from .data.prompt_loader import prompt_loader
from .data.prompts import column_names
from .data.tokenizers import stop_token_ids
from .kernels.batch_backoff import annotate_oom
from .kernels.liger import LigerMixin, apply_liger
from .models.actor_critic import ActorCritic, ActorCriticOutput
from .models.sharding import wrap_in_ddp
from .rewards import build_rewards
from .rollout.collector import RolloutCollector
from .rollout.experience import Experience
from .training.agents import AgentSetup
from .training.checkpoint import PPOState
from .training.control import ControlMixin
from .training.critic_training import CriticTraining
from .training.engine import build_engine, check_engine, verify_engine
from .training.evaluation import Evaluator
from .training.gradients import GradientAccumulator, NonfiniteGradientGuard
from .training.hub import HubMixin, save_training_args_json
from .training.losses import count_tokens, policy_loss
from .training.metrics import Meter
from .training.ppo_card import PPOModelCard
from .training.resume import Checkpointer
from .training.rollouts import RolloutPhase
from .training.setup import (
    add_default_callbacks,
    configure_forward,
    load_actor_critic,
    override_max_steps,
    prepare_datasets,
    prepare_tokenizer,
    shard_base,
    tokenize_and_validate,
    validate_datasets,
)
from .training.shutdown import GracefulShutdownCallback
from .training.validation import (
    check_adapters,
    check_arguments,
    check_enough_prompts,
    check_models,
    check_options,
    check_precision,
    check_rewards,
    named_datasets,
)


class PPOTrainer(
    LigerMixin, HubMixin, ControlMixin, Trainer
):  # mixins: they override hooks of Trainer for RewardTrainer, too
    """Proximal policy optimization (Schulman et al. 2017) of a language model against a reward.

    Args:
        model: the policy: the name of a causal language model, or such a model; or the name of an adapter, or a
            `PeftModel`, whose adapter is trained further while a frozen copy serves as the reference. The trained
            weights of an instance are cast to fp32, in place.
        reward_funcs: a reward function, a sequence classifier (instance or name), the folder of a reward adapter
            on the same base, or a list of these.
        args: hyperparameters, which are copied.
        train_dataset: prompts, in a column `prompt` as text or messages; other columns go to reward functions. A
            stream (`IterableDataset`) is read in its own order and needs `max_steps` or `total_episodes`.
        eval_dataset: prompts for `evaluate`, or a dict of them.
        processing_class: the policy's tokenizer; by default the one saved with the model.
        reward_processing_classes: tokenizers of reward models, in the order of `reward_funcs`.
        callbacks: `PPOCallback`s also receive the events of rollouts.
        optimizers: must be the default, because the adapter and the value head do not exist yet: set the optimizer in
            `args`, or `trainer.optimizer` later.
        quantization_config: for a model loaded by name.
        peft_config: the adapter to train; without it, the whole model is trained.
        tools: functions, sync or async, that the model may call while it answers; type hints and a Google docstring
            describe them to it.
        rollout_func: generates responses in place of the trainer: `rollout_func(prompts, trainer)` returns a dict of
            `prompt_ids`, `completion_ids`, `logprobs` and, optionally, `env_mask`; other keys go to reward functions.
        environment_factory: makes environments: a class, or a dict of them, of which the column `environment` selects
            one. `reset(**row)` may return text for the prompt, other methods are tools, and `get_reward()`, if there is
            one, is a reward. See docs/agents.md.
        reward_model: alias of `reward_funcs`, for scripts of TRL's PPOTrainer.
        ref_model: a separate reference model; by default the model without its adapter.
        value_model: a separate critic, which is trained: a sequence classifier with one label (instance or name) that
            reads the policy's tokens; or, with `critic="adapter"`, the reward adapter that initializes the critic.
        data_collator: not used, because a rollout pads its prompts itself; accepted for scripts of TRL.
    """

    args: PPOConfig
    model: ActorCritic
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    loss_is_scaled_for_ga = True
    card_class = PPOModelCard
    _tag_names: ClassVar[list[str]] = ["ppo_plus", "ppo"]

    def __init__(
        self, model: str | Path | PreTrainedModel | PeftModel, reward_funcs: Any = None, args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None, reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None, optimizers: tuple = (None, None),
        quantization_config: Any = None, peft_config: PeftConfig | None = None, tools: list[Callable] | None = None,
        rollout_func: Callable | None = None, environment_factory: Any = None, *, reward_model: Any = None,
        ref_model: PreTrainedModel | None = None,
        value_model: str | Path | PreTrainedModel | PeftModel | None = None, data_collator: Any = None,
    ) -> None:  # fmt: skip
        model = str(model) if isinstance(model, Path) else model
        args = args if args is not None else PPOConfig(output_dir="ppo_output")
        self.agent = AgentSetup(tools, rollout_func, environment_factory)
        train_dataset = self.agent.default_dataset(args, train_dataset)
        rewards = self.agent.add_rewards(reward_funcs, reward_model, reward_processing_classes)
        reward_funcs, reward_model, reward_processing_classes = rewards
        check_arguments(args, train_dataset, eval_dataset, reward_funcs, reward_model)
        check_options(args, optimizers, callbacks, data_collator)
        args = self.agent.add_weights(copy_arguments(args))
        reward_funcs = reward_funcs if reward_funcs is not None else reward_model
        datasets = {"train_dataset": train_dataset, **named_datasets(eval_dataset)}
        extra = self.agent.reward_arguments
        reward_tokenizers = check_rewards(args, reward_funcs, reward_processing_classes, datasets, extra)
        tokenizer = prepare_tokenizer(args, model, processing_class)
        check_models(model, ref_model, value_model, tokenizer)
        adapter = check_adapters(args, model, peft_config, reward_funcs, value_model)
        check_engine(args, model, adapter, rollout_func)
        check_precision(args, model, peft_config, quantization_config)
        datasets = prepare_datasets(args, datasets, tokenizer, reward_funcs, reward_tokenizers, self.agent)
        actor_critic, tokenizer = load_actor_critic(
            args, tokenizer, model, peft_config, quantization_config, ref_model, value_model, reward_funcs
        )
        datasets = validate_datasets(args, actor_critic, datasets)
        with override_max_steps(args):  # Trainer needs the length of training on a stream
            super().__init__(
                actor_critic, args, list, datasets.pop("train_dataset"),
                datasets.get("eval_dataset") or datasets or None, tokenizer, callbacks=callbacks,
            )  # fmt: skip
        configure_forward(self)
        self._build_collector(reward_funcs, reward_tokenizers)
        self._build_collaborators()
        add_default_callbacks(self)
        shard_base(self)  # weights are probed and compared before, while they are whole
        verify_engine(self)

    def _build_collector(self, reward_funcs: Any, reward_tokenizers: list) -> None:
        self._rollouts = RolloutPhase(self)
        args, model, tokenizer = self.args, self.model, self.processing_class
        with self.accelerator.autocast():  # in which classifiers score
            rewards = build_rewards(
                reward_funcs, reward_tokenizers, model, tokenizer, weights=args.reward_weights,
                batch_size=args.local_rollout_forward_batch_size, on_error=args.on_reward_error,
                chat_template_kwargs=cast(dict, args.chat_template_kwargs or {}), timeout=args.reward_timeout,
                pessimism=args.reward_pessimism,
            )  # fmt: skip
        self.stop_ids = stop_token_ids(model.generation_config, tokenizer, model.num_embeddings, args.extra_stop_ids)
        runtime = (self.accelerator, self.stop_ids, self._rollouts.on_progress)
        generators = (self.agent.responder(self), build_engine(self))
        self.collector = RolloutCollector(model, rewards, tokenizer, args, *runtime, *generators)
        model.uses_prefix_reward_baseline = args.uses_prefix_reward_baseline and rewards.scores_prefixes
        if args.use_liger_kernel:  # last: weights are probed on the CPU before, where its kernels do not run
            apply_liger(model.transformers_models, args)

    def _build_collaborators(self) -> None:
        self._shutdown = GracefulShutdownCallback(self.collectives)
        self._progress = PPOState(kl_coef=self.args.kl_coef)
        self._evaluator, self._checkpointer = Evaluator(self), Checkpointer(self)
        self._accumulator = GradientAccumulator(self, super().training_step)
        self._gradient_guard = NonfiniteGradientGuard(self)
        self._critic_grad_norm: Tensor | float = 0.0
        self._critic_training = CriticTraining(self)

    # Rollouts

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader with one item per micro-batch; the first item of each rollout has all its prompts."""
        if "input_ids" not in column_names(self.train_dataset):  # assigned after the trainer was made
            self.train_dataset = tokenize_and_validate(self.train_dataset, "train_dataset", self)
            check_enough_prompts(self.args, self.train_dataset)
        return prompt_loader(self.train_dataset, self.args, self.accelerator)

    def set_initial_training_values(self, args: PPOConfig, dataloader: DataLoader) -> tuple:
        """Return Trainer's values, with `total_episodes` converted to steps."""
        with override_max_steps(args):
            return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Return the micro-batches of one optimizer step and the number of their response tokens over all ranks."""
        self._accumulator.start_step()
        if self._rollouts.are_finished():
            return [], torch.zeros((), device=device)
        prompts = list(islice(epoch_iterator, num_batches))
        rollout_index, step = divmod(self.state.global_step, self.args.steps_per_rollout)
        if step == 0:
            samples = self._rollouts.generate_and_score(prompts[0], rollout_index)  # 1 to 4
            self._progress.rollout = self._rollouts.compute_advantages(samples)  # 5
        micro_batches, tokens = self._rollouts.micro_batches(rollout_index, step)  # 6
        self._critic_training.update_alone(micro_batches, tokens.to(device))
        self._defer_control()
        return micro_batches, tokens.to(device)

    # Learning

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        wrapped = super()._wrap_model(model, training, dataloader)
        return wrap_in_ddp(wrapped, self.accelerator) if self.args.fsdp and training and wrapped is model else wrapped

    def _prepare_input(self, data: Any) -> Any:
        # A copy from pageable memory would wait for all work of the GPU.
        pin = self.args.device.type == "cuda" and self.args.dataloader_pin_memory
        if pin and isinstance(data, Tensor) and data.device.type == "cpu":
            return data.pin_memory().to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run Trainer's step, over fewer rows per pass if memory does not suffice for a whole micro-batch."""
        if self.accelerator.distributed_type != DistributedType.NO:
            with annotate_oom():
                return super().training_step(model, inputs, num_items_in_batch)
        return self._accumulator.add(model, inputs, count_tokens(inputs, num_items_in_batch))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """Return PPO's loss of one micro-batch, as its share of the whole minibatch.

        Per-token losses are summed and divided by the response tokens of the minibatch over all ranks, so the division
        into micro-batches does not change the gradient.
        """
        args, mask = self.args, inputs["action_mask"]
        output = self._forward(model, inputs)
        loss = args.resolved_vf_coef * self._value_loss(output.values, inputs)
        if output.logprobs is not None:
            # Log-probabilities outside the mask belong to no token; an infinite ratio would survive the mask below.
            logprobs = torch.where(mask, output.logprobs, inputs["logprobs"])
            actor_loss = self._policy_loss(logprobs, inputs)
            if args.positive_example_nll_weight:
                weights = inputs["nll_weights"]
                actor_loss = actor_loss - weights * logprobs
                self._progress.meter.add_token_means(mask & (weights > 0), {"ppo/positive_nll": -logprobs})
            if args.entropy_coef:
                actor_loss = actor_loss - args.entropy_coef * output.entropy
            if args.kl_penalty_in == "loss":
                kl = algo.kl_estimate(logprobs, inputs["ref_logprobs"], args.kl_estimator)
                actor_loss = actor_loss + self._progress.kl_coef * kl
            loss = loss + actor_loss
        # DDP averages gradients over ranks, and the division is by the tokens of all ranks.
        loss = loss.masked_fill(~mask, 0.0).sum() / count_tokens(inputs, num_items_in_batch)
        loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> ActorCriticOutput:
        train_actor = not self._critic_training.is_alone
        optional = {
            name: inputs.get(name) for name in ("frozen_hidden_states", "response_mask", "seq_lens", "prefixes")
        }
        return model(
            inputs["input_ids"], inputs["attention_mask"], inputs["action_mask"].shape[1], self.args.temperature,
            with_logprobs=train_actor, with_entropy=train_actor and self.args.entropy_coef > 0, **optional,
        )  # fmt: skip

    def _value_loss(self, values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        mask, old_values, returns = inputs["action_mask"], inputs["values"], inputs["returns"]
        values = torch.where(mask, values + inputs["value_baselines"], old_values)
        loss, clipped = algo.clipped_value_loss(values, old_values, returns, cliprange=self.args.cliprange_value)
        self._progress.meter.add_token_means(mask, {"ppo/value_loss": loss, "clip_ratio/value": clipped})
        return loss

    def _policy_loss(self, logprobs: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        old_logprobs = inputs["logprobs"]
        loss, clipped = policy_loss(self.args, logprobs, old_logprobs, inputs["advantages"])
        log_ratio = (logprobs - old_logprobs).detach()
        ratio = log_ratio.exp()
        metrics = {"ppo/policy_loss": loss, "clip_ratio/policy": clipped, "ppo/ratio": ratio}
        metrics["ppo/approx_kl"] = ratio - 1 - log_ratio  # k3 of Schulman 2020
        if self.state.global_step % self.args.steps_per_rollout == 0:
            # The policy is still the one that sampled: any distance from 1 is numerical noise or LoRA dropout.
            metrics["ppo/initial_ratio_error"] = (ratio - 1).abs()
        self._progress.meter.add_token_means(inputs["action_mask"], metrics)
        return loss

    def get_optimizer_cls_and_kwargs(self, args: PPOConfig, model: Any = None) -> tuple[Any, Any]:
        """Return Trainer's optimizer, with groups for the actor, the value head, and a critic's own backbone."""
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        groups = (
            (self.model.actor_parameters(), args.learning_rate, args.weight_decay),
            (list(self.model.value_head.parameters()), args.value_head_learning_rate, 0.0),
            (self.model.critic_parameters(), args.critic_backbone_learning_rate, args.weight_decay),
        )
        kwargs["params"] = [{"params": p, "lr": rate, "weight_decay": decay} for p, rate, decay in groups if p]
        return cls, kwargs

    @cached_property
    def _trainable_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        # Cached lists of actor and critic: adapters have thousands of names, too many to search at each step.
        return self.model.actor_parameters(), [*self.model.value_head.parameters(), *self.model.critic_parameters()]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        # Separately: an untrained critic's large gradients would shrink the actor's step under one common norm.
        actor, critic = self._trainable_parameters
        norm = self.accelerator.clip_grad_norm_(actor, self.args.max_grad_norm)
        self._critic_grad_norm = nn.utils.clip_grad_norm_(critic, self.args.max_grad_norm)
        self._progress.meter.add("critic/grad_norm", self._critic_grad_norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called once per optimizer step, with clipping or without, just before the optimizer.
        norm = super()._get_grad_norm(model, grad_norm)
        self._gradient_guard.check(model, norm, self._critic_grad_norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with Trainer, and add the means since the last log."""
        if "loss" in logs:
            collectives = self.collectives
            logs = {**logs, **self._progress.meter.flush(collectives.sum, collectives.all_gather_names)}
        super().log(logs, start_time)

    # Evaluation

    def evaluate(
        self, eval_dataset: Dataset | dict[str, Dataset] | str | None = None, ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:  # fmt: skip
        """Sample responses to the evaluation prompts, and log reward, KL to the reference and lengths.

        The seed is the same every time, and training is not affected. If a reward function failed
        (`on_reward_error="skip"`), the reward is NaN, and best-model selection ignores the evaluation.
        """
        return self._evaluator.evaluate(eval_dataset, metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Sample responses to prompts, and return the metrics of `evaluate` without logging them.

        `predictions` are token ids in the order of the prompts, `(N, R)` int64, right-padded with -100.
        """
        return self._evaluator.predict(test_dataset, metric_key_prefix)

    def generate_completions(self, dataset: Dataset | None = None) -> Experience | None:
        """Sample and score responses to this rank's share of prompts (`eval_dataset` by default), without logging.

        The same policy gives the same responses every time. Without prompts, warn and return None.
        """
        return self._evaluator.generate(dataset, Meter())

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        with self._evaluator.pending(on_start=skip_scheduler):
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    # Checkpoints

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:  # fmt: skip
        """Train, from a checkpoint if one is passed; True means the newest valid checkpoint.

        With True, damaged checkpoints are skipped with a warning, and training starts at the beginning if there is
        none, so a script that a supervisor restarts needs no special case.
        """
        checkpoint = self._checkpointer.start(resume_from_checkpoint)
        output = self._checkpointer.run(partial(super().train, checkpoint, trial, ignore_keys_for_eval), trial)
        self.write_model_card(self._get_output_dir(trial))
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = cast(str, output_dir or self.args.output_dir)
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(directory)
            self.processing_class.save_pretrained(directory)
            save_training_args_json(self.args, directory)
            self.write_model_card(directory)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._checkpointer.save(partial(super()._save_checkpoint, model, trial), trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # where Trainer saves the rest of what a resumed run needs
        self._checkpointer.save_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._checkpointer.restore_generator(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._checkpointer.load(resume_from_checkpoint)

    def _load_callback_state(self) -> None:
        self._checkpointer.restore_callbacks(super()._load_callback_state)

    def _load_best_model(self) -> None:
        self.model.load_weights(self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy="best" this alone decides what is saved, and a signal requests a checkpoint.
        return super()._determine_best_metric(metrics, trial) or self._shutdown.agreed_signal is not None
