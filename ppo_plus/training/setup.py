"""Check, tokenize and load before `Trainer.__init__`: cheap steps before expensive ones."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import DynamoBackend
from transformers import PreTrainedTokenizerBase

from ..callbacks.completions import CompletionsTableCallback
from ..callbacks.progress import PPOProgressCallback, install_progress_bar
from ..callbacks.training_health import TrainingHealthCallback
from ..config import PPOConfig
from ..data.padding import pad_id
from ..data.prompts import tokenize_datasets, validate_prompts
from ..data.seeding import derive_seed, isolated_rng
from ..data.tokenizers import check_embedded, check_tokenizer
from ..integrations.trl_legacy import rename_adapters
from ..models.actor_critic import ActorCritic
from ..models.backbone import check_decoding
from ..models.critic import resolve_critic
from ..models.loading import (
    build_actor_critic,
    count_embeddings,
    load_policy,
    load_tokenizer,
    quantization_in_fp16,
    runs_in_fp16,
    warn_of_bf16,
)
from ..models.precision import warn_of_slow_half_precision
from ..models.sharding import ShardedBase
from ..models.weight_checks import explain_offloading
from ..report import RunReportCallback, fixed_prompts
from ..rewards.checks import check_templates
from ..utils.contexts import set_attributes
from .agents import AgentSetup
from .validation import check_effects, check_enough_prompts, check_stop_token

if TYPE_CHECKING:
    from ..trainer import PPOTrainer


def prepare_tokenizer(
    args: PPOConfig, model: Any, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Return the passed tokenizer or the one saved with the model, with a padding token."""
    trusted = cast(dict, args.model_init_kwargs or {}).get("trust_remote_code", False)
    tokenizer = tokenizer or load_tokenizer(model, trusted)
    if getattr(tokenizer, "pad_token_id", 0) is None:
        tokenizer = copy.deepcopy(tokenizer)  # gets a padding token; the user's own stays unchanged
    check_tokenizer(tokenizer)
    check_stop_token(args, tokenizer)
    return tokenizer


def prepare_datasets(
    args: PPOConfig, datasets: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rewards: Any,
    reward_tokenizers: list, agent: AgentSetup,
) -> dict[str, Any]:  # fmt: skip
    """Tokenize the prompts by name of their dataset, and check the settings that depend on them."""
    datasets = agent.prepare(args, tokenizer, datasets)
    datasets = tokenize_datasets(datasets, agent.tokenizer or tokenizer, **agent.tokenize_kwargs(args))
    check_enough_prompts(args, datasets["train_dataset"])
    run_kwargs = cast(dict, args.chat_template_kwargs or {})
    check_templates(rewards, reward_tokenizers, tokenizer, datasets, run_kwargs, agent.schemas_of)
    check_effects(args, datasets["train_dataset"], evaluates=len(datasets) > 1)
    return datasets


def tokenize_and_validate(dataset: Any, name: str, trainer: PPOTrainer) -> Any:
    """Tokenize and validate prompts that are passed after the trainer was made."""
    args, agent, model = trainer.args, trainer.agent, trainer.model
    datasets = agent.prepare(args, trainer.processing_class, {name: dataset})
    tokenizer = agent.tokenizer or trainer.processing_class
    datasets = tokenize_datasets(datasets, tokenizer, **agent.tokenize_kwargs(args))
    return validate_datasets(args, model, datasets)[name]


def validate_datasets(args: PPOConfig, model: ActorCritic, datasets: dict[str, Any]) -> dict[str, Any]:
    """Validate tokenized prompts by name of their dataset: they fit into the model, and so do responses to them."""
    limits = (args.response_length, model.context, model.num_embeddings)
    return {name: validate_prompts(dataset, *limits, name) for name, dataset in datasets.items()}


def add_default_callbacks(trainer: PPOTrainer) -> None:
    """Add the callbacks that every run has, and those that its arguments select."""
    args = trainer.args
    for callback in (trainer._shutdown, TrainingHealthCallback()):
        trainer.add_callback(callback)
    install_progress_bar(trainer, PPOProgressCallback)
    if args.num_sample_generations or args.log_completions:
        trainer.add_callback(CompletionsTableCallback(lambda: trainer.callback_handler.callbacks))
    if args.html_report:
        prompts = fixed_prompts(trainer.train_dataset, trainer.eval_dataset)
        generate = trainer._evaluator.generate_on_main_process
        trainer.add_callback(RunReportCallback(generate, prompts, lambda: trainer._shutdown.interrupted))


def configure_forward(trainer: PPOTrainer) -> None:
    """Apply the options of forward passes to the model, on its device."""
    args, model = trainer.args, trainer.model
    model.move_auxiliary_modules(args.device)
    with trainer.accelerator.autocast():
        model.runner.check_in_autocast()
    for reference in model.frozen_models[1:] if args.eval_win_rate else []:  # it decodes, too
        check_decoding(reference)
    if args.cache_frozen_layers and args.disable_dropout:
        model.enable_frozen_layer_cache()
    if args.torch_compile:
        trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # accelerate would compile the whole model
        model.compile_layers(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    model.runner.enable_shared_prompts(args.num_generations)
    model.add_model_tags(trainer._tag_names)


def shard_base(trainer: PPOTrainer) -> None:
    """Shard the frozen base over processes if `fsdp` is set."""
    args = trainer.args
    if args.fsdp:
        base = ShardedBase(trainer.model, args.device, gather_all=args.ds3_gather_for_generation)
        trainer.collector.uneven_passes = base.uneven_passes


def load_actor_critic(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, model: Any, peft_config: Any, quantization_config: Any,
    ref_model: Any, value_model: Any, reward_funcs: Any,
) -> tuple[ActorCritic, PreTrainedTokenizerBase]:  # fmt: skip
    """Load policy, critic and reference; return them with a tokenizer whose padding token is embedded."""
    if (embedded := count_embeddings(model, cast(dict, args.model_init_kwargs or {}))) is not None:
        tokenizer = with_embedded_padding(tokenizer, embedded)
    critic = resolve_critic(args, value_model, reward_funcs)
    policy = load_policy_from_args(model, args, quantization_config, peft_config)
    options = {"disable_dropout": args.disable_dropout, "use_kernels": args.use_ppo_plus_kernels}
    actor_critic = build_actor_critic(policy, critic=critic, ref_model=ref_model, **options)
    return actor_critic, with_embedded_padding(tokenizer, actor_critic.num_embeddings)


def load_policy_from_args(model: Any, args: PPOConfig, quantization_config: Any, peft_config: Any) -> Any:
    """Load the policy; a new adapter is initialized from the seed of the run alone."""
    fp16 = runs_in_fp16(args)
    options = {
        "peft_config": peft_config,
        "quantization_config": quantization_in_fp16(quantization_config) if fp16 else quantization_config,
        "model_init_kwargs": args.model_init_kwargs,
        # 4-bit layers return their compute dtype, and bf16 must not be mixed with fp16.
        "frozen_dtype": torch.float16 if fp16 else "auto",
    }
    with isolated_rng(derive_seed(args.seed, "adapter")), explain_offloading():
        policy = load_policy(rename_adapters(model, args.model_adapter_name, args.ref_adapter_name), **options)
    if fp16:
        warn_of_bf16(policy)
    if args.device.type == "cpu":
        warn_of_slow_half_precision(policy, bool(args.bf16))
    return policy


def with_embedded_padding(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy that pads with EOS where the model does not embed its padding token."""
    if pad_id(tokenizer) >= num_embeddings:
        tokenizer = copy.deepcopy(tokenizer)  # the user's own stays unchanged
    check_embedded(tokenizer, num_embeddings)
    return tokenizer


def override_max_steps(args: PPOConfig) -> AbstractContextManager:
    """Context manager: set `max_steps` from `total_episodes`; restored on exit so that the args can be reused."""
    return set_attributes(args, max_steps=args.requested_max_steps)
