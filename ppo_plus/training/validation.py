"""Refuse arguments before any weight is loaded; each error is one sentence with the fix."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PeftConfig, TaskType
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..callbacks.base import PPOCallback
from ..config import PPOConfig, check_no_sharding
from ..config.sharding import FSDP_VARIABLE
from ..data.prompts import column_names
from ..kernels.liger import check_liger, check_liger_model
from ..models.adapter_checks import check_no_adapter, check_preserves_base, check_reward_adapter, check_trained_tokens
from ..models.adapter_files import resolve_adapter_path
from ..models.base_weights import WeightSamples, local_folder, sample_files, sample_model
from ..models.critic import critic_peft_config
from ..models.loading import base_name, check_adapter_kind, count_embeddings, load_config
from ..models.precision import check_trained_dtype
from ..models.weight_checks import check_init_kwargs
from ..rewards.adapters import check_same_base
from ..rewards.build import check_signature, normalize_rewards
from ..rewards.checks import check_reward_module, check_reward_task, load_reward_tokenizers
from ..rewards.reward_set import check_weights
from .critic_training import check_critic_training

if TYPE_CHECKING:
    from ..config.reward_config import RewardConfig  # imports TRL


def named_datasets(eval_dataset: Any) -> dict[str, Dataset]:
    """Return evaluation datasets by name: one under its argument's name, several under their own."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}


def check_arguments(args: Any, train_dataset: Any, eval_dataset: Any, reward_funcs: Any, reward_model: Any) -> None:
    """Refuse arguments of the wrong kind, and settings that this machine cannot run."""
    if not isinstance(args, PPOConfig):
        raise TypeError(f"args must be a ppo_plus.PPOConfig; got {type(args).__name__}.")
    check_no_sharding(args)
    check_fsdp(args)
    if (reward_funcs is None) == (reward_model is None):
        both = "both" if reward_funcs is not None else "neither"
        raise ValueError(f"Pass reward_funcs or its other name reward_model; got {both}.")
    if isinstance(eval_dataset, dict) and {"train_dataset", "eval_dataset"} & set(eval_dataset):
        raise ValueError("eval_dataset: the names 'train_dataset' and 'eval_dataset' are taken; choose others.")
    for name, dataset in {"train_dataset": train_dataset, **named_datasets(eval_dataset)}.items():
        check_dataset(name, dataset, allow_streaming=name == "train_dataset" and args.requested_max_steps > 0)
    if args.eval_strategy != "no" and not named_datasets(eval_dataset):
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} needs prompts to evaluate on: pass eval_dataset, or set "
            "eval_strategy='no'."
        )
    if args.tracks_best_metric and isinstance(eval_dataset, dict):
        check_best_metric(cast(str, args.metric_for_best_model), list(eval_dataset))
    if args.n_gpu > 1:
        raise ValueError("PPOTrainer does not run under DataParallel: use accelerate launch, or show it one GPU.")
    check_liger(args)
    check_init_kwargs(cast(dict, args.model_init_kwargs))
    check_output_dir(cast(str, args.output_dir))


def check_fsdp(args: PPOConfig | RewardConfig) -> None:
    """Refuse to shard over one process, and under an `Accelerator` that would shard trained weights too."""
    kind, command = type(args).__name__, "ppo" if isinstance(args, PPOConfig) else "reward"
    if args.fsdp and args.world_size == 1:
        raise ValueError(
            f"{kind}: fsdp=True shards the base over processes, and there is one: start several with `ppo-plus "
            f"{command} --accelerate_config fsdp2 --num_processes N` or `accelerate launch`, or remove it."
        )
    shards_all = AcceleratorState._shared_state.get("distributed_type") == DistributedType.FSDP
    if shards_all or parse_flag_from_env(FSDP_VARIABLE):
        raise ValueError(
            "The script made an Accelerator that shards all weights (FSDP), and ppo_plus shards the frozen ones "
            f"alone: make {kind} before it, or no Accelerator."
        )


def check_fsdp_adapter(args: PPOConfig | RewardConfig, has_adapter: bool) -> None:
    """Refuse to shard a model that is trained as a whole."""
    if args.fsdp and not has_adapter:
        raise ValueError(
            f"{type(args).__name__}: fsdp=True shards the frozen base of an adapter, and here the whole model is "
            "trained: pass peft_config, or remove fsdp and train whole copies by DDP (`accelerate launch --multi_gpu`)."
        )


def check_options(args: PPOConfig, optimizers: tuple, callbacks: Any, data_collator: Any) -> None:
    """Refuse an optimizer that lacks the trained weights, and callbacks that do not work with these arguments."""
    kinds = [type(each).__name__ for each in optimizers if each is not None]
    if kinds:
        raise ValueError(
            f"optimizers: the {' and the '.join(kinds)} came before adapter and value head, so they would not train "
            "them. Leave the argument out: set optim, learning_rate, value_head_learning_rate and lr_scheduler_type in "
            "PPOConfig, or trainer.optimizer once the trainer is made."
        )
    for callback in callbacks or []:
        if isinstance(callback, PPOCallback):
            callback.check_arguments(args)
    if data_collator is not None:
        warnings.warn("data_collator is not used: a rollout pads its prompts itself. Leave it out.", stacklevel=3)


def check_dataset(name: str, dataset: Any, allow_streaming: bool) -> None:
    """Refuse an object that is no dataset, and a stream if no argument limits how much of it is used."""
    if isinstance(dataset, IterableDataset):
        if allow_streaming:
            return
        if name == "train_dataset":
            raise ValueError(f"{name} is a stream, which has no length: set max_steps or total_episodes.")
        raise ValueError(
            f"{name} is a stream, but each evaluation answers the same prompts: pass "
            "Dataset.from_list(list(stream.take(n)))."
        )
    if not isinstance(dataset, Dataset):
        fixes: dict[type, str] = {list: " Pass Dataset.from_list(rows)."}
        if isinstance(dataset, DatasetDict):
            fixes[DatasetDict] = f" Choose one of its splits: {', '.join(f'[{split!r}]' for split in dataset)}."
        kind = type(dataset)
        raise ValueError(f"{name} must be a datasets.Dataset of prompts; got {kind.__name__}.{fixes.get(kind, '')}")


def check_best_metric(metric: str, datasets: list[str]) -> None:
    """Refuse a metric that none of several evaluation datasets reports."""
    if not any(metric.removeprefix("eval_").startswith(f"{name}_") for name in datasets):
        raise ValueError(
            f"metric_for_best_model={metric!r} is reported for none of the datasets in eval_dataset: there it is "
            f"{' or '.join(repr(f'eval_{name}_reward') for name in datasets)}. Set one of these."
        )


def check_output_dir(output_dir: str | Path) -> None:
    """Refuse a folder in which the first checkpoint could not be written, hours later."""
    folder = Path(output_dir).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir {str(output_dir)!r} cannot be used: {existing} is not a folder. Choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {str(output_dir)!r} is not writable: no permission in {existing}.")


def check_models(model: Any, ref_model: Any, value_model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a policy that is no language model, and an unusable reference or critic."""
    if not isinstance(model, str | PreTrainedModel) and not hasattr(model, "peft_config"):
        raise TypeError(f"model must be a name, a causal language model or a PeftModel; got {type(model).__name__}.")
    if ref_model is not None and not isinstance(ref_model, nn.Module):
        raise TypeError(f"ref_model must be a model that is loaded already; got {type(ref_model).__name__}.")
    if ref_model is not None and ref_model is model:
        raise ValueError("ref_model is the model that is trained, so no KL could be seen: leave ref_model out.")
    if not isinstance(value_model, str | Path | nn.Module | None):
        raise TypeError(f"value_model must be a sequence classifier or its name; got {type(value_model).__name__}.")
    labels = getattr(getattr(value_model, "config", None), "num_labels", 1)
    if hasattr(value_model, "score") and labels != 1:
        raise ValueError(f"value_model has num_labels={labels}; a critic gives one number: use num_labels=1.")
    for name, other in (("ref_model", ref_model), ("value_model", value_model)):
        if isinstance(other, str | Path) and resolve_adapter_path(other) is None:
            check_vocab_size(name, load_config(str(other), {}), tokenizer)
        elif isinstance(other, nn.Module):
            check_vocab_size(name, cast(Any, other).config, tokenizer)


def check_vocab_size(name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a second model that has no embeddings for some of the policy's tokens."""
    vocabulary = config.get_text_config().vocab_size
    padding_alone = tokenizer.pad_token_id == len(tokenizer) - 1  # added to the tokenizer and not to the model
    if vocabulary < len(tokenizer) - padding_alone:
        raise ValueError(
            f"{name} has a vocabulary of {vocabulary}, the tokenizer one of {len(tokenizer)}: it must read the "
            "policy's tokens. Pass one with the same tokenizer."
        )


def check_adapters(
    args: PPOConfig, model: Any, peft_config: Any, reward_funcs: Any, value_model: Any
) -> PeftConfig | None:
    """Refuse adapters that train their base, or that were not trained as reward models of this base.

    Returns the configuration of the trained adapter; None without one.
    """
    check_adapter_kind(peft_config)
    actors = resolve_actor_peft_config(model, peft_config)
    if args.use_liger_kernel:
        named = not isinstance(model, nn.Module)
        init_kwargs = cast(dict, args.model_init_kwargs or {})
        check_liger_model(load_config(base_name(model), init_kwargs) if named else model.config, args)
    sources = [*(reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]), value_model]
    adapters = [folder for folder in map(resolve_adapter_path, sources) if folder is not None]
    if adapters:
        init_kwargs = cast(dict, args.model_init_kwargs or {})
        config, samples = actors_base(model, init_kwargs)
        embeddings = count_embeddings(model, init_kwargs)
        for folder in adapters:
            check_reward_adapter(folder, config.get_text_config().hidden_size)
            if embeddings is not None:
                check_trained_tokens(folder, embeddings)
            check_same_base(folder, config._name_or_path, samples)
            check_same_peft_type(folder, actors)
    if args.critic_peft_config and actors is not None:
        if resolve_adapter_path(value_model) is not None:
            raise ValueError(
                f"critic_peft_config and value_model={str(value_model)!r} exclude each other: that adapter has a "
                "configuration of its own. Remove one."
            )
        config = critic_peft_config(actors, cast(dict, args.critic_peft_config))
        check_preserves_base(config, "critic_peft_config")
    own_model = value_model is not None and resolve_adapter_path(value_model) is None
    check_critic_training(args, "separate" if own_model else args.critic)
    check_fsdp_adapter(args, actors is not None)
    if args.critic == "adapter" and actors is None:
        raise ValueError("critic='adapter' puts an adapter on a frozen base: pass peft_config, or take another critic.")
    return actors


def check_quantized_device(args: Any, model: Any, quantization_config: Any) -> None:
    """Refuse a quantized base on an Apple GPU, because transformers leaves it on the CPU."""
    init_kwargs = cast(dict, args.model_init_kwargs or {})
    if args.device.type != "mps" or "device_map" in init_kwargs:
        return
    if isinstance(model, nn.Module):
        left_on_cpu = getattr(model, "is_quantized", False) and cast(Any, model).device.type != "mps"
    else:
        quantization = quantization_config or init_kwargs.get("quantization_config")
        left_on_cpu = quantization or getattr(load_config(base_name(model), init_kwargs), "quantization_config", None)
    if left_on_cpu:
        raise ValueError(
            "The model is quantized, training is on 'mps', and transformers leaves quantized weights on the CPU there: "
            f"load it in bf16 without quantization_config, or set use_cpu=True in {type(args).__name__}."
        )


def actors_base(model: Any, init_kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, WeightSamples]:
    """Return the config of the actor's base, and samples of its weights, empty if they are not on this machine."""
    if isinstance(model, nn.Module):
        return model.config, sample_model(model)
    name = base_name(model)
    folder = local_folder(name, init_kwargs.get("revision"))
    return load_config(name, init_kwargs), sample_files(folder)


def check_precision(
    args: PPOConfig, model: Any, peft_config: PeftConfig | None, quantization_config: Any
) -> None:  # fmt: skip
    """Refuse a quantized base where it cannot be, and a dtype that is unsuitable for training a whole model."""
    check_quantized_device(args, model, quantization_config)
    options = cast(dict, args.model_init_kwargs or {})
    dtype = options.get("dtype", options.get("torch_dtype"))
    if dtype is None or peft_config is not None or not isinstance(model, str) or resolve_adapter_path(model):
        return
    dtype = load_config(model, options).dtype if dtype == "auto" else dtype
    check_trained_dtype(dtype, args.fp16, args.learning_rate)


def resolve_actor_peft_config(model: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    """Return the configuration of the trained adapter, from `peft_config` or the model; None without an adapter."""
    folder = resolve_adapter_path(model)
    if folder is None or peft_config is not None:
        config = getattr(model, "peft_config", {}).get("default")
        if peft_config is None and config is not None:
            check_task(config, "The adapter of model")
        check_no_adapter(
            model,
            "Leave peft_config out and pass the adapter, by its name or as PeftModel.from_pretrained(base, name, "
            "is_trainable=True), to continue its training with its present weights as the reference; or merge it into "
            "its base (merge_and_unload), save that, and train a new one on it.",
        )
        check_preserves_base(peft_config, "peft_config")
        return peft_config or config
    config = PeftConfig.from_pretrained(str(folder))
    check_preserves_base(config, f"The adapter in {folder}")
    check_task(config, f"model={model!r}")
    return config


def check_task(config: PeftConfig, label: str) -> None:
    """Refuse an adapter that was made for another task than language modeling."""
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(f"{label} is an adapter for {config.task_type}; a policy needs one for CAUSAL_LM.")


def check_same_peft_type(folder: Path, actors: PeftConfig | None) -> None:
    """Refuse a reward adapter of another PEFT type than the actor's, because a base carries one type only."""
    kind = PeftConfig.from_pretrained(str(folder)).peft_type
    if actors is not None and actors.peft_type != kind:
        raise ValueError(
            f"The reward adapter in {folder} is of kind {kind.value}, the actor's of {actors.peft_type.value}, and "
            "a base carries adapters of one kind only: train the actor with that kind, or the reward model with this."
        )


def check_rewards(
    args: PPOConfig, reward_funcs: Any, tokenizers: Any, datasets: dict[str, Any], extra: Sequence[str] | None = ()
) -> list:
    """Refuse rewards that could not be called with the columns of a dataset; return the tokenizers of reward models.

    `extra` are the names of further arguments of reward functions; None if they are not known before a rollout.
    """
    columns = {name: column_names(dataset) for name, dataset in datasets.items()}
    funcs, _ = normalize_rewards(reward_funcs, tokenizers)
    check_weights(args.reward_weights, len(funcs))
    if args.reward_pessimism is not None and len(funcs) == 1:
        raise ValueError(
            f"reward_pessimism={args.reward_pessimism} lowers the reward by the disagreement of several reward "
            "functions, and there is one: pass more of them, or remove it."
        )
    if args.prefix_reward_baseline and not any(map(resolve_adapter_path, funcs)):
        raise ValueError(
            "prefix_reward_baseline=True reads the scores of a reward adapter on the actor's backbone, and no reward "
            "function is one: pass the folder of one, or leave the option out."
        )
    for func in funcs:
        if not isinstance(func, str | Path | nn.Module):
            for name, names in columns.items() if extra is not None else ():
                arguments = [c for c in names if c not in ("prompt", "input_ids", "attention_mask")]
                check_signature(func, [*arguments, *(extra or ())], name)
        elif isinstance(func, nn.Module):
            check_reward_module(func)
        elif resolve_adapter_path(func) is None:
            check_reward_task(str(func))
    return load_reward_tokenizers(reward_funcs, tokenizers)


def check_stop_token(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a stop token that no response could contain."""
    unknown = [stop for stop in args.extra_stop_ids if stop >= len(tokenizer)]
    if unknown:
        raise ValueError(
            f"stop_token_id={unknown[0]}, but the vocabulary has {len(tokenizer)} tokens, so it would never be seen. "
            "Choose an id below, or leave it out: responses end at EOS."
        )


def check_effects(args: PPOConfig, train_dataset: Dataset | IterableDataset, evaluates: bool) -> None:
    """Warn of options without an effect in this run; `evaluates` is whether it has evaluation prompts."""
    steps = args.requested_max_steps
    if steps <= 0:
        rollouts = len(train_dataset) // (args.prompts_per_rollout * args.world_size)
        steps = math.ceil(args.num_train_epochs * rollouts * args.steps_per_rollout)
    if args.critic_warmup_steps >= steps and args.critic_warmup_explained_variance is None:
        warnings.warn(
            f"critic_warmup_steps={args.critic_warmup_steps} covers all {steps} optimizer steps of training, so only "
            "the critic is trained and the policy stays unchanged. Lower it, or train longer.",
            stacklevel=4,
        )
    warn_of_long_warmup(args, steps)
    if args.eval_win_rate and not evaluates:
        warnings.warn(
            "eval_win_rate=True is measured in evaluations, and this run has no prompts for one: pass eval_dataset, or "
            "call evaluate(prompts).",
            stacklevel=4,
        )


def warn_of_long_warmup(args: TrainingArguments, steps: int) -> None:
    """Warn if the learning rate still rises when training ends, after `steps` optimizer steps."""
    warmup = args.get_warmup_steps(steps)
    if warmup >= steps and args.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy"):
        warnings.warn(
            f"warmup_steps={args.warmup_steps} covers all {steps} optimizer steps of training, so the learning rate "
            f"reaches at most {(steps - 1) / warmup:.1%} of learning_rate={args.learning_rate}. Lower warmup_steps (a "
            "number below 1 is a share of training), or train longer.",
            stacklevel=5,
        )


def check_enough_prompts(args: PPOConfig, dataset: Dataset | IterableDataset) -> None:
    """Refuse a training set with fewer prompts than one rollout takes."""
    needed = args.prompts_per_rollout * args.world_size
    stream = isinstance(dataset, IterableDataset)
    num_prompts = sum(1 for _ in dataset.take(needed)) if stream else len(dataset)
    if num_prompts < needed:
        raise ValueError(
            f"train_dataset has {num_prompts} prompts, but one rollout takes {needed} (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x gradient_accumulation_steps {args.gradient_accumulation_steps} x "
            f"num_mini_batches {args.num_mini_batches} x processes {args.world_size} / num_generations "
            f"{args.num_generations}). Add prompts, or change one."
        )
