"""PPO inside `Trainer.train()`.

Trainer's loop is kept whole: schedules, clipping, logging, checkpoints, evaluation and callbacks are inherited. It
asks for the micro-batches of each optimizer step in one place, `get_batch_samples`, and there PPO happens:

    1. generate            responses to the next N prompts          |
    2. score               by the reward functions                  |  when `global_step` is a multiple of
    3. look                log-probabilities and values, one pass   |  `steps_per_rollout`; see rollout/collector.py
    4. look again          as the reference                         |
    5. advantages          KL penalty, score at the last token, GAE |
    6. learn               one minibatch per optimizer step; the loss is in `compute_loss`

The clock is `state.global_step`, which is in every checkpoint; every seed is a function of it. Checkpoints are in
resume.py, evaluation in evaluation.py, the Hub in hub.py.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import DistributedType, DynamoBackend
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from . import algo
from .callbacks.base import PPOCallback, RolloutSettings, hears_scores
from .callbacks.completions import CompletionsTableCallback
from .callbacks.progress import install_progress_bar
from .callbacks.training_health import TrainingHealthCallback
from .config import PPOConfig, copy_arguments
from .data.batching import micro_batch_indices, minibatch_indices
from .data.padding import pad_id
from .data.prompt_loader import prompt_loader
from .data.prompts import Row, column_names, tokenize_datasets, validate_prompts
from .data.seeding import derive_seed, isolated_rng, sampling_uniforms
from .data.tokenizers import check_embedded, check_tokenizer, stop_token_ids
from .integrations.trl_legacy import rename_adapters
from .kernels.batch_backoff import PATIENCE, BatchSize, annotate_oom
from .kernels.liger import LigerMixin, apply_liger
from .models.actor_critic import ActorCritic, ActorCriticOutput
from .models.loading import (
    build_actor_critic,
    count_embeddings,
    load_policy,
    load_tokenizer,
    quantization_in_fp16,
    resolve_critic,
    runs_in_fp16,
    warn_of_bf16,
)
from .report import RunReportCallback, fixed_prompts
from .rewards import CheapAnswers, build_rewards, usable_scores
from .rewards.checks import check_templates
from .rollout.buffer import Rollout
from .rollout.collector import BatchingFn, Experience, RolloutCollector
from .rollout.phases import PhaseTimer
from .training.checkpoint import PPOState, find_last_valid_checkpoint
from .training.evaluation import EvaluationMixin, WinRate
from .training.metrics import Meter
from .training.model_card import CardMixin
from .training.resume import ResumeMixin
from .training.shutdown import DeferredControlCallback, GracefulShutdownCallback
from .training.validation import (
    check_adapters,
    check_arguments,
    check_callbacks,
    check_effects,
    check_enough_prompts,
    check_metric_name,
    check_models,
    check_optimizers,
    check_precision,
    check_quantized_device,
    check_rewards,
    check_stop_token,
    named_datasets,
)
from .utils.interrupt import raise_if_interrupted


class PPOTrainer(LigerMixin, CardMixin, ResumeMixin, EvaluationMixin, Trainer):
    """Proximal policy optimization (Schulman et al. 2017) of a language model against a reward.

    Args:
        model: the policy: the name of a causal language model, or such a model; or the name of an adapter, or a
            `PeftModel`, whose adapter is trained further and is the reference as it came. The trained weights of an
            instance are cast to fp32, in place.
        reward_funcs: a reward function, a sequence classifier (instance or name), the folder of a reward adapter
            on the same base, or a list of these.
        args: hyper-parameters; the trainer has a copy of them.
        train_dataset: prompts, in a column `prompt` as text or messages; other columns go to reward functions. A
            stream (`IterableDataset`) is read in its own order and needs `max_steps` or `total_episodes`.
        eval_dataset: prompts for `evaluate`, or a dict of them.
        processing_class: the policy's tokenizer; loaded by the model's name if not given.
        reward_processing_classes: tokenizers of reward models, in the order of `reward_funcs`.
        callbacks: `PPOCallback`s also get the events of rollouts.
        optimizers: there because Trainer and TRL have it. Only the default is taken, since adapter and value head do
            not exist yet: `args` describe the optimizer, or set `trainer.optimizer` once the trainer is made.
        quantization_config: for a model loaded by name.
        peft_config: the adapter to train; without it, the whole model is trained.
        reward_model: another name for `reward_funcs`, as TRL's PPOTrainer had it.
        ref_model: a reference model of its own; by default it is the model without its adapter.
        value_model: a critic of its own, trained too: a sequence classifier with one label (instance or name) that
            reads the policy's tokens. Or, with `critic="adapter"`, the reward adapter from which the critic starts.
        data_collator: taken for scripts of TRL, and not used: a rollout pads its prompts itself.
    """

    args: PPOConfig
    model: ActorCritic
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    loss_is_scaled_for_ga = True
    _tag_names: ClassVar[list[str]] = ["ppo_plus", "ppo"]

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        reward_model: Any = None,
        ref_model: PreTrainedModel | None = None,
        value_model: str | Path | PreTrainedModel | PeftModel | None = None,
        data_collator: Any = None,
    ) -> None:
        model = str(model) if isinstance(model, Path) else model
        args = args if args is not None else PPOConfig(output_dir="ppo_output")
        check_arguments(args, train_dataset, eval_dataset, reward_funcs, reward_model)
        args = copy_arguments(args)
        check_optimizers(optimizers)
        check_callbacks(args, callbacks)
        if data_collator is not None:
            warnings.warn("data_collator is not used: a rollout pads its prompts itself. Leave it out.", stacklevel=2)
        reward_funcs = reward_funcs if reward_funcs is not None else reward_model
        datasets = {"train_dataset": train_dataset, **named_datasets(eval_dataset)}
        columns = {name: column_names(dataset) for name, dataset in datasets.items()}
        reward_tokenizers = check_rewards(args, reward_funcs, reward_processing_classes, columns)
        trusted = cast(dict, args.model_init_kwargs or {}).get("trust_remote_code", False)
        tokenizer = processing_class or load_tokenizer(model, trusted)
        if getattr(tokenizer, "pad_token_id", 0) is None:
            tokenizer = copy.deepcopy(tokenizer)  # which then gets a padding token; the user's own stays as it is
        check_tokenizer(tokenizer)
        check_stop_token(args, tokenizer)
        check_models(model, ref_model, value_model, tokenizer)
        check_adapters(args, model, peft_config, reward_funcs, value_model)
        check_precision(args, model, peft_config)
        check_quantized_device(args, model, quantization_config)
        datasets = tokenize_datasets(datasets, tokenizer, **args.tokenize_kwargs)
        check_enough_prompts(args, datasets["train_dataset"])
        check_templates(
            reward_funcs, reward_tokenizers, tokenizer, datasets, cast(dict, args.chat_template_kwargs or {})
        )
        check_effects(args, datasets["train_dataset"], evaluates=eval_dataset is not None)
        if (embedded := count_embeddings(model, cast(dict, args.model_init_kwargs or {}))) is not None:
            tokenizer = with_embedded_padding(tokenizer, embedded)
        critic = resolve_critic(args, value_model, reward_funcs)
        policy = load_policy_from_args(model, args, quantization_config, peft_config)
        actor_critic = build_actor_critic(
            policy, critic=critic, ref_model=ref_model, disable_dropout=args.disable_dropout
        )
        tokenizer = with_embedded_padding(tokenizer, actor_critic.num_embeddings)
        limits = (args.response_length, actor_critic.context, actor_critic.num_embeddings)
        datasets = {name: validate_prompts(dataset, *limits, name) for name, dataset in datasets.items()}

        with override_max_steps(args):  # Trainer wants to know how long a stream is trained on
            super().__init__(
                model=actor_critic,
                args=args,
                data_collator=list,
                train_dataset=datasets.pop("train_dataset"),
                eval_dataset=datasets.get("eval_dataset") or datasets or None,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        actor_critic.move_auxiliary_modules(args.device)
        self._configure_forward()
        actor_critic.add_model_tags(self._tag_names)
        self.stop_ids = stop_token_ids(actor_critic.generation_config, tokenizer, args.extra_stop_ids)
        self.collector = self._build_collector(reward_funcs, reward_tokenizers)
        actor_critic.uses_prefix_reward_baseline = (
            args.uses_prefix_reward_baseline and self.collector.rewards.scores_prefixes
        )
        if args.use_liger_kernel:  # last: weights are probed on the CPU before, where its kernels do not run
            apply_liger(actor_critic.transformers_models, args)
        self._add_callbacks()
        self._progress = PPOState(kl_coef=args.kl_coef)
        self._critic_grad_norm: Tensor | float = 0.0
        micro_batches = args.steps_per_rollout * args.gradient_accumulation_steps
        self._max_rows_per_pass = BatchSize(args.rollout_batch_size, PATIENCE * micro_batches)
        self._accumulated: list[dict[str, Any]] = []  # micro-batches whose gradients there are
        self._win_rate = WinRate(self.collector)

    def _configure_forward(self) -> None:
        if self.args.cache_frozen_layers and self.args.disable_dropout:
            self.model.enable_frozen_layer_cache()
        if self.args.torch_compile:
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # accelerate would compile the whole
            self.model.compile_layers(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    def _build_collector(self, reward_funcs: Any, reward_tokenizers: list) -> RolloutCollector:
        args, tokenizer = self.args, self.processing_class
        rewards = build_rewards(
            reward_funcs,
            reward_tokenizers,
            self.model,
            tokenizer,
            weights=args.reward_weights,
            batch_size=args.local_rollout_forward_batch_size,
            chat_template_kwargs=cast(dict, args.chat_template_kwargs or {}),
            on_error=args.on_reward_error,
            timeout=args.reward_timeout,
        )
        return RolloutCollector(
            self.model, rewards, tokenizer, args, self.accelerator, self.stop_ids, self._on_progress
        )

    def _add_callbacks(self) -> None:
        self._interrupt = GracefulShutdownCallback(self._all_reduce_max)
        self.add_callback(self._interrupt)
        self._wishes = DeferredControlCallback()
        self.add_callback(self._wishes)
        self.add_callback(TrainingHealthCallback())
        install_progress_bar(self)
        if self.args.num_sample_generations or self.args.log_completions:
            self.add_callback(CompletionsTableCallback(lambda: self.callback_handler.callbacks))
        if self.args.html_report:
            prompts = fixed_prompts(self.train_dataset, self.eval_dataset)
            self.add_callback(RunReportCallback(self._generate_on_main_process, prompts, lambda: self._interrupt.came))

    # Serving minibatches

    def get_train_dataloader(self) -> DataLoader:
        """Prompts for each rollout; as long as training has micro-batches, so Trainer's arithmetic holds.

        Prompts that were put into `train_dataset` later are tokenized first.
        """
        if "input_ids" not in column_names(self.train_dataset):
            self.train_dataset = self._tokenize_prompts(self.train_dataset, "train_dataset")
            check_enough_prompts(self.args, self.train_dataset)
        return prompt_loader(self.train_dataset, self.args, self.accelerator)

    def set_initial_training_values(self, args: PPOConfig, dataloader: DataLoader) -> tuple:
        """Trainer's sizes, with `total_episodes` turned into steps."""
        with override_max_steps(args):
            return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """The micro-batches of one optimizer step and their response tokens over all processes."""
        self._accumulated.clear()
        if due := self._progress.evaluation_pending:
            self._run_pending_evaluation()
        finished = self.state.global_step >= self.state.max_steps
        if finished or (due and self.control.should_training_stop):  # resumed; Trainer would go on for a step
            self.control.should_training_stop = True
            return [], torch.zeros((), device=device)
        prompts = list(islice(epoch_iterator, num_batches))
        rollout_index, step = divmod(self.state.global_step, self.args.steps_per_rollout)
        if step == 0:
            if not prompts[0]:
                raise RuntimeError(
                    "An epoch was ended inside a rollout (control.should_epoch_stop), and the next one's first prompts "
                    "were passed over. End it at a step that is a multiple of num_ppo_epochs * num_mini_batches = "
                    f"{self.args.steps_per_rollout}, or training as a whole: control.should_training_stop."
                )
            self._progress.rollout = self._collect(prompts[0], rollout_index)
        rollout = self._progress.rollout
        if rollout is None:
            raise RuntimeError(
                f"Training resumes at step {self.state.global_step}, inside rollout {rollout_index}, but the "
                "checkpoint holds no rollout (was it saved with save_only_model?). Resume from a checkpoint whose "
                f"step is a multiple of {self.args.steps_per_rollout}."
            )
        if rollout.frozen_hidden_states is None and self.model.num_cached_layers:  # from a checkpoint
            passes = self._scoring_micro_batches(rollout_index, rollout.lengths())
            with self._allow_interrupt():
                rollout = self._progress.rollout = self.collector.recompute_frozen_states(rollout, passes)
        ppo_epoch, minibatch = divmod(step, self.args.num_mini_batches)
        self._rows = rows = self._minibatches(len(rollout), rollout_index, ppo_epoch)[minibatch]
        micro_batches = micro_batch_indices(rows, rollout.lengths(), self.args.per_device_train_batch_size)
        tokens = self.collector.reduce(rollout.action_mask[rows].sum()).clamp(min=1)
        return [rollout.micro_batch(micro_batch) for micro_batch in micro_batches], tokens.to(device)

    def _minibatches(self, n: int, rollout_index: int, ppo_epoch: int) -> list[Tensor]:
        return minibatch_indices(
            n,
            self.args.num_mini_batches,
            seed=self.args.seed,
            rollout_index=rollout_index,
            ppo_epoch=ppo_epoch,
            process_index=self.accelerator.process_index,
        )

    def _scoring_micro_batches(self, rollout_index: int, lengths: Tensor) -> list[Tensor]:
        """The micro-batches of the first PPO epoch."""
        size, minibatches = self.args.per_device_train_batch_size, self._minibatches(len(lengths), rollout_index, 0)
        return [part for rows in minibatches for part in micro_batch_indices(rows, lengths, size)]

    def _collect(self, prompts: list[Row], rollout_index: int) -> Rollout:
        asks = rollout_index == 0 and self.collector.rewards.calls_functions
        cheap = self._ask_about_cheap_answers(prompts) if asks else None
        settings = RolloutSettings(kl_coef=self.args.kl_coef)
        self._call_event("on_rollout_begin", settings=settings)
        first = self.accelerator.process_index * len(prompts)
        rows = range(first, first + len(prompts))
        cut = partial(self._scoring_micro_batches, rollout_index)
        # A rollout that is given up is made again: what reward functions logged of it must not count twice.
        with self._allow_interrupt(), self._progress.meter.rollback_on_error():
            samples = self._generate_and_score(prompts, rows, ("rollout", rollout_index), cut=cut)
        if cheap is not None:
            self._warn_of_cheap_answers(cheap, samples.rewards)
        watch = PhaseTimer()
        scores = samples.scores.clone()
        self._fire_on_scores(scores, samples.token_rewards)
        scores = usable_scores(scores, samples.completions.prompts)
        rollout = self.collector.rollout(samples, scores, settings.kl_coef, self._progress.baseline)
        self.model.reward_line = None if samples.prefix_scores is None else self._progress.baseline.line()
        metrics = self.collector.metrics(samples)
        watch.record("advantages")
        self._progress.num_tokens += int(self.collector.reduce(samples.attention_mask.sum()))
        metrics |= {
            **({} if cheap is None else cheap.metrics()),
            "num_tokens": self._progress.num_tokens,
            "ppo/kl_coef": settings.kl_coef,
            "critic/explained_variance": self.collector.explained_variance(rollout),
            **{f"time/{phase}": seconds for phase, seconds in (samples.seconds | watch.seconds).items()},
        }
        self._call_event("on_rollout_end", rollout=rollout, samples=samples, metrics=metrics)
        for name, value in metrics.items():
            if not math.isnan(value):  # of what nobody scored there is no mean
                self._progress.meter.add(name, value)
        self._progress.kl_coef = settings.kl_coef
        self._wishes.note(self.control)
        return rollout

    def _ask_about_cheap_answers(self, prompts: list[Row]) -> CheapAnswers:
        """Ask reward functions about answers that take no work, without a trace in metrics or generators."""
        context = {"trainer_state": self.state, "log_metric": lambda name, value: check_metric_name(name)}
        seed = derive_seed(self.args.seed, "cheap answers", self.accelerator.process_index)
        with self._allow_interrupt(), isolated_rng(seed):
            return self.collector.ask_about_cheap_answers(prompts, context)

    def _warn_of_cheap_answers(self, cheap: CheapAnswers, first: Tensor) -> None:
        warning = cheap.warning(self._gather_scores(first))
        if warning is not None and self.is_world_process_zero():
            warnings.warn(warning, stacklevel=2)

    def _generate_and_score(
        self,
        prompts: list[Row],
        rows: range,
        position: tuple,
        meter: Meter | None = None,
        cut: BatchingFn | None = None,
        score: bool = True,
    ) -> Experience:
        noise, seed = self._sampling_uniforms(rows, position)
        meter = meter or self._progress.meter

        def log_metric(name: str, value: Any) -> None:
            check_metric_name(name)
            meter.add(name, float(value))

        context = {"trainer_state": self.state, "log_metric": log_metric}
        with isolated_rng(seed):
            return self.collector.sample(prompts, noise, context, cut, score)

    def _sampling_uniforms(self, rows: range, position: tuple) -> tuple[Tensor, int]:
        # Noise belongs to a row among those of all processes, so how many they are does not change what is sampled.
        noise = sampling_uniforms(derive_seed(self.args.seed, *position, 0), rows.stop, self.args.response_length)
        return noise[list(rows)], derive_seed(self.args.seed, *position, self.accelerator.process_index)

    def _on_progress(self, phase: str, done: int, total: int, tokens: int) -> None:
        self._call_event("on_rollout_progress", phase=phase, done=done, total=total, tokens=tokens)
        raise_if_interrupted()

    def _call_event(self, event: str, **kwargs: Any) -> None:
        # Looked up each time: Trainer replaces stateful callbacks when it resumes.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PPOCallback):
                self._call(callback, event, **kwargs)

    def _call(self, callback: PPOCallback, event: str, **kwargs: Any) -> None:
        getattr(callback, event)(
            self.args, self.state, self.control, model=self.model, processing_class=self.processing_class, **kwargs
        )

    def _fire_on_scores(self, scores: Tensor, token_rewards: Tensor) -> None:
        # Processes may have different callbacks, and a gather waits for all: there is one before the first callback,
        # and one after each that all of them have.
        listening = [c for c in self.callback_handler.callbacks if isinstance(c, PPOCallback) and hears_scores(c)]
        shared = self.collector.shared([type(callback).__name__ for callback in listening])
        gathered_scores = self._gather_scores(scores)
        for callback in listening:
            self._call(
                callback,
                "on_rewards_computed",
                scores=scores,
                token_rewards=token_rewards,
                gathered_scores=gathered_scores.clone(),
            )
            name = type(callback).__name__
            if shared[name]:
                shared[name] -= 1
                gathered_scores = self._gather_scores(scores)

    def _gather_scores(self, scores: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.gather(scores.to(self.args.device))).cpu()

    # Learning

    def _prepare_input(self, data: Any) -> Any:
        # From pageable memory each copy would wait for all that a GPU has still to do.
        gpu = self.args.device.type == "cuda" and self.args.dataloader_pin_memory
        if gpu and isinstance(data, Tensor) and data.device.type == "cpu":
            return data.pin_memory().to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's, over fewer rows at a time where memory does not suffice for a whole micro-batch.

        The loss divides by the tokens of the minibatch, so the parts add up to the same gradient. A backward pass that
        ran out of memory has added gradients to some parameters and not to others. Keeping a copy of the gradients
        before it would take as much memory again, so they are dropped and the step's micro-batches are run once more.
        The size is not in checkpoints: a resumed run may have more memory.
        """
        if self.accelerator.distributed_type != DistributedType.NO:
            with annotate_oom():
                return super().training_step(model, inputs, num_items_in_batch)
        tokens = num_items_in_batch if num_items_in_batch is not None else inputs["action_mask"].sum().clamp(min=1)
        first = True

        def attempt(size: int) -> Tensor:
            nonlocal first
            if not first:
                self._accumulate_again(model, tokens, size)
            first = False
            with self._progress.meter.rollback_on_error():
                return self._accumulate(model, inputs, tokens, size)

        loss = self._max_rows_per_pass.retry(len(inputs["action_mask"]), attempt)
        self._accumulated.append(inputs)
        return loss

    def _accumulate(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor | int, size: int) -> Tensor:
        """Add the gradients of a micro-batch, `size` rows per pass; return its loss."""
        parts = torch.arange(len(inputs["action_mask"])).split(size)
        cut = [inputs] if len(parts) == 1 else (index_batch(inputs, rows) for rows in parts)
        return torch.stack([super(PPOTrainer, self).training_step(model, part, tokens) for part in cut]).sum()

    def _accumulate_again(self, model: nn.Module, tokens: Tensor | int, size: int) -> None:
        """Begin the step's gradients anew, up to the micro-batch that ran out of memory; metrics count once."""
        model.zero_grad(set_to_none=True)
        meter, self._progress.meter = self._progress.meter, Meter()
        try:
            for inputs in self._accumulated:
                self._accumulate(model, inputs, tokens, size)
        finally:
            self._progress.meter = meter

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """PPO's loss of one micro-batch, as its share of the whole minibatch.

        Per-token losses are summed and divided by the response tokens of the minibatch over all processes, so how
        it is cut into micro-batches does not change the gradient.
        """
        train_actor = self.state.global_step >= self.args.critic_warmup_steps
        output = model(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["action_mask"].shape[1],
            self.args.temperature,
            with_logprobs=train_actor,
            with_entropy=train_actor and self.args.entropy_coef > 0,
            frozen_hidden_states=inputs.get("frozen_hidden_states"),
            response_mask=inputs.get("response_mask"),
            seq_lens=inputs.get("seq_lens"),
        )
        per_token = self._per_token_loss(output, inputs)
        tokens = num_items_in_batch if num_items_in_batch is not None else inputs["action_mask"].sum().clamp(min=1)
        # DDP averages gradients over processes, the division is by the tokens of all of them.
        loss = per_token.masked_fill(~inputs["action_mask"], 0.0).sum() / tokens * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _per_token_loss(self, output: ActorCriticOutput, inputs: dict[str, Tensor]) -> Tensor:
        # Elsewhere the old numbers belong to no token, and an infinite ratio would survive being masked later.
        values = torch.where(inputs["action_mask"], output.values + inputs["value_baselines"], inputs["values"])
        value, clipped = algo.clipped_value_loss(
            values, inputs["values"], inputs["returns"], cliprange=self.args.cliprange_value
        )
        self._log_token_means(inputs["action_mask"], {"ppo/value_loss": value, "clip_ratio/value": clipped})
        loss = self.args.resolved_vf_coef * value
        return loss if output.logprobs is None else loss + self._actor_loss(output, inputs)

    def _actor_loss(self, output: ActorCriticOutput, inputs: dict[str, Tensor]) -> Tensor:
        args, old = self.args, inputs["logprobs"]
        new = torch.where(inputs["action_mask"], output.logprobs, old)
        loss, clipped = policy_loss(args, new, old, inputs["advantages"])
        log_ratio = (new - old).detach()
        ratio = log_ratio.exp()
        measured = {"ppo/policy_loss": loss, "clip_ratio/policy": clipped, "ppo/ratio": ratio}
        measured["ppo/approx_kl"] = ratio - 1 - log_ratio  # k3 of Schulman 2020
        if self.state.global_step % args.steps_per_rollout == 0:
            # Nothing was learned from this rollout yet: any distance from 1 is numerical noise or LoRA dropout.
            measured["ppo/initial_ratio_error"] = (ratio - 1).abs()
        self._log_token_means(inputs["action_mask"], measured)
        if args.entropy_coef:
            loss = loss - args.entropy_coef * output.entropy
        if args.kl_penalty_in == "loss":
            loss = loss + self._progress.kl_coef * algo.kl_estimate(new, inputs["ref_logprobs"], args.kl_estimator)
        return loss

    @torch.no_grad()
    def _log_token_means(self, mask: Tensor, per_token: dict[str, Tensor]) -> None:
        for name, numbers in per_token.items():
            self._progress.meter.add(name, (numbers * mask).sum(), mask.sum())

    def get_optimizer_cls_and_kwargs(self, args: PPOConfig, model: Any = None) -> tuple[Any, Any]:
        """Trainer's optimizer, over groups for the actor, the value head, and a critic's own weights below it."""
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
        # Of actor and critic; with adapters there are thousands of names to go through, too many for each step.
        return self.model.actor_parameters(), [*self.model.value_head.parameters(), *self.model.critic_parameters()]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        # Apart: an early critic's large gradients would shrink the actor's step under one common norm.
        actor, critic = self._trainable_parameters
        norm = self.accelerator.clip_grad_norm_(actor, self.args.max_grad_norm)
        self._critic_grad_norm = nn.utils.clip_grad_norm_(critic, self.args.max_grad_norm)
        self._progress.meter.add("critic/grad_norm", self._critic_grad_norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called once per optimizer step, whether gradients are clipped or not, just before the optimizer.
        norm = super()._get_grad_norm(model, grad_norm)
        if math.isfinite(float(norm)) and math.isfinite(float(self._critic_grad_norm)):
            self._progress.skipped = 0
        else:
            model.zero_grad(set_to_none=True)  # an optimizer leaves parameters without gradients alone
            self._on_nonfinite_gradients()
        return norm

    def _on_nonfinite_gradients(self) -> None:
        self._progress.meter.add("ppo/skipped_steps", 1.0)
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1:
            return  # fp16: most likely the loss was scaled too high; the scaler halves it and Trainer goes on
        self._progress.skipped += 1
        rollout = cast(Rollout, self._progress.rollout)
        rows = [
            row for row in self._rows.tolist() if not self._has_finite_gradient(rollout, row)
        ] or self._rows.tolist()
        texts = self.processing_class.batch_decode(rollout.input_ids[rows[:2]], skip_special_tokens=True)
        what = (
            f"Step {self.state.global_step} has gradients that are not finite and is skipped; its responses: {texts!r}"
        )
        if self._progress.skipped >= self.args.max_skipped_steps:
            last = find_last_valid_checkpoint(cast(str, self.args.output_dir))
            raise RuntimeError(
                f"{what}. That makes {self._progress.skipped} steps in a row (max_skipped_steps): lower the learning "
                f"rate or look at the rewards. The last whole checkpoint is {last}."
            )
        warnings.warn(what, stacklevel=2)

    def _has_finite_gradient(self, rollout: Rollout, row: int) -> bool:
        # By itself, and without a trace in gradients, metrics or generators.
        inputs = self._prepare_inputs(rollout.micro_batch(torch.tensor([row])))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        meter, self._progress.meter = self._progress.meter, Meter()
        with isolated_rng(0), self.compute_loss_context_manager():
            gradients = torch.autograd.grad(self.compute_loss(self.model, inputs), trained, allow_unused=True)
        self._progress.meter = meter
        return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with what was measured since the last one."""
        if "loss" in logs:
            logs = {**logs, **self._progress.meter.flush(self.collector.reduce, self.collector.union)}
        super().log(logs, start_time)


def with_embedded_padding(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy that pads with EOS where the model does not embed its padding token."""
    if pad_id(tokenizer) >= num_embeddings:
        tokenizer = copy.deepcopy(tokenizer)  # the user's own stays as it is
    check_embedded(tokenizer, num_embeddings)
    return tokenizer


@contextlib.contextmanager
def override_max_steps(args: PPOConfig) -> Iterator[None]:
    """`total_episodes` as steps inside the block; they stay a wish in episodes, for the next run of these arguments."""
    given, args.max_steps = args.max_steps, args.requested_max_steps
    try:
        yield
    finally:
        args.max_steps = given


def load_policy_from_args(model: Any, args: PPOConfig, quantization_config: Any, peft_config: Any) -> Any:
    """The policy that `args` describes; an adapter's first weights are drawn here, from the seed alone."""
    fp16 = runs_in_fp16(args)
    with isolated_rng(derive_seed(args.seed, "adapter")):
        policy = load_policy(
            rename_adapters(model, args.model_adapter_name, args.ref_adapter_name),
            peft_config=peft_config,
            quantization_config=quantization_in_fp16(quantization_config) if fp16 else quantization_config,
            model_init_kwargs=cast(dict | None, args.model_init_kwargs),  # TrainingArguments has parsed JSON
            # What 4-bit layers give has their own dtype, and nothing is done in bf16 and fp16 at once.
            frozen_dtype=torch.float16 if fp16 else "auto",
        )
    if fp16:
        warn_of_bf16(policy)
    return policy


def index_batch(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The part of a micro-batch that belongs to these rows."""
    return {
        name: values[rows] if isinstance(values, Tensor) else [values[row] for row in rows.tolist()]
        for name, values in inputs.items()
    }


def policy_loss(args: PPOConfig, new: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """The objective that `args` names, per token, and where it was clipped; each `(B, R)`."""
    if args.objective == "clip":
        return algo.clipped_policy_loss(
            new, old, advantages,
            cliprange=args.cliprange, cliprange_high=args.cliprange_high, dual_clip=args.dual_clip,
        )  # fmt: skip
    if args.objective == "kl_penalty":
        loss = algo.kl_penalty_policy_loss(new, old, advantages, beta=args.old_policy_kl_coef)
    else:
        loss = algo.unclipped_policy_loss(new, old, advantages)
    return loss, torch.zeros_like(loss, dtype=torch.bool)
