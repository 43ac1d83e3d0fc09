"""Reward model training from preference pairs: TRL's RewardTrainer, with metadata saved next to the adapter.

The loss is InstructGPT's pairwise loss (eq. 1), with TRL's margin and center coefficient. In addition, the score head
is always trained and saved with the LoRA weights, and `reward_model.json` next to them stores the base, its
quantization, the hash of the chat template, and the calibration on held-out pairs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput
from trl import RewardTrainer as TRLRewardTrainer

from .algo.statistics import pairwise_calibration_error
from .callbacks.progress import RewardProgressCallback, install_progress_bar
from .config import check_no_sharding, copy_arguments
from .config.reward_config import RewardConfig
from .data.preferences import tokenize_pairs
from .data.tokenizers import check_embedded
from .kernels.fp32_heads import compute_heads_in_fp32
from .kernels.liger import LigerMixin, apply_liger, check_liger, check_liger_model
from .kernels.switch import kernels_enabled, replace_forwards
from .models.adapter_checks import check_no_adapter, check_preserves_base, warn_of_skipped_layers
from .models.adapter_files import HEADS, REWARD_FILE
from .models.adapters import keep_model_card, train_adapter
from .models.backbone import unwrap_peft
from .models.base_weights import encode_samples, local_folder, sample_model, weight_files
from .models.classifier import depends_on_padding, register_sequence_classifier
from .models.gguf_files import check_rope_scaling
from .models.loading import (
    clone_mmapped_tensors,
    config_to_train,
    count_embeddings,
    load_config,
    log_int8_casts_once,
    quantization_in_fp16,
    runs_in_fp16,
    warn_of_bf16,
)
from .models.pair_sharing import PairSharing
from .models.precision import check_trained_dtype, hold_trained_in_fp32, warn_of_slow_half_precision
from .models.saving import without_generation_parameters
from .models.sharding import shard_frozen_weights, wrap_in_ddp
from .models.weight_checks import check_init_kwargs, check_model_weights, explain_offloading
from .rewards.adapters import template_hash
from .training.control import ControlMixin
from .training.hub import HubMixin, save_training_args_json
from .training.reward_card import RewardModelCard
from .training.validation import check_fsdp, check_fsdp_adapter, check_quantized_device, warn_of_long_warmup
from .utils.contexts import evaluation_mode

ADAPTER_HINT = (
    "Pass the name of its base to train a new reward adapter; to start from the adapter's weights, merge them into the "
    "base (merge_and_unload) and save the result; to continue training the adapter, pass "
    "PeftModel.from_pretrained(base, name, is_trainable=True)."
)


class RewardTrainer(LigerMixin, HubMixin, ControlMixin, TRLRewardTrainer):
    """Train a reward model with the pairwise loss; the arguments are those of `trl.RewardTrainer`.

    Args:
        model: name of a model, or a sequence classifier with one label.
        args: hyperparameters; the trainer keeps a copy.
        peft_config: configuration of the adapter to train; `score` is added to its `modules_to_save`.
        **kwargs: arguments of `trl.RewardTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, ...
    """

    args: RewardConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase
    card_class = RewardModelCard
    _tag_names = ["ppo_plus", "reward-trainer"]

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = copy_arguments(args) if args is not None else RewardConfig(output_dir="reward_model")
        check_machine(args, has_adapter=peft_config is not None or isinstance(model, PeftModel))
        model = str(model) if isinstance(model, Path) else model
        check_preserves_base(peft_config, "peft_config")
        check_no_adapter(model, ADAPTER_HINT)
        peft_config = train_score_head(peft_config)
        if isinstance(model, str):
            if peft_config is not None:
                set_frozen_dtype(args)
            check_named_model(model, args, is_fully_trained=peft_config is None)
        check_init_kwargs(cast(dict, args.model_init_kwargs))
        check_quantized_device(args, model, kwargs.get("quantization_config"))
        if runs_in_fp16(args) and kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantization_in_fp16(kwargs["quantization_config"])
        if (tokenizer := kwargs.get("processing_class")) is not None:
            kwargs["processing_class"] = copy.deepcopy(tokenizer)  # TRL changes its EOS, padding and chat template
        self._calibration: dict[str, Any] = {}
        kwargs["processing_class"], self._num_embeddings = resolve_tokenizer(
            model, args, kwargs.get("processing_class")
        )
        if peft_config is not None:
            check_template_tokens(args, kwargs["processing_class"])
        if isinstance(model, PeftModel):
            train_adapter(model)
            check_head_is_trained(model)
        with explain_offloading():  # TRL's default device_map is "auto", which offloads what the GPU cannot hold
            super().__init__(model=model, args=args, peft_config=peft_config, **kwargs)
        install_progress_bar(self, RewardProgressCallback)
        warn_of_skipped_layers(self.model, peft_config)
        self._check_trainable()
        check_model_weights(self.model, "model")
        # Sampled before the first forward pass, in which bitsandbytes may reorder 4-bit weights.
        self._base_weights = encode_samples(sample_model(self.model)) if isinstance(self.model, PeftModel) else None
        if isinstance(self.model, PeftModel) or not isinstance(model, str):
            hold_trained_in_fp32(self.model)  # TRL casts adapters of a quantized model to bf16
        keep_model_card(self.model)
        self._configure_forward()
        self._warn_of_padding()
        self._shard_base()

    def _check_trainable(self) -> None:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "All weights of the model are frozen, so nothing would be learned: pass peft_config=LoraConfig(...) to "
                "train an adapter, or call model.requires_grad_(True) to train the whole."
            )

    def _warn_of_padding(self) -> None:
        with self.accelerator.autocast():
            depends = depends_on_padding(self.model, cast(int, self.processing_class.pad_token_id))
        if depends:
            warnings.warn(
                f"The scores of {type(self.accelerator.unwrap_model(self.model)).__name__} depend on the padding of "
                "their batch, so training learns from the lengths of the pairs in a batch too. Set "
                "per_device_train_batch_size=1 and raise gradient_accumulation_steps, or choose a model whose "
                "attention mask covers padding.",
                stacklevel=3,
            )

    def _configure_forward(self) -> None:
        """Replace the forwards of adapters, norms and score head with faster ones, or with Liger's, after loading."""
        clone_mmapped_tensors(self.model)
        log_int8_casts_once()
        if runs_in_fp16(self.args):
            warn_of_bf16(self.model)
        warn_of_slow_half_precision(self.model, bool(self.args.bf16))
        enabled = kernels_enabled(self.args.use_ppo_plus_kernels)
        replace_forwards(self.model, enabled)
        if enabled:
            compute_heads_in_fp32(self.model)
        if self.args.use_liger_kernel:
            apply_liger([self.model], self.args)
        self._pair_sharing = PairSharing(self.model) if enabled and not self.args.torch_compile else None

    def _shard_base(self) -> None:
        if self.args.fsdp:  # weights are sampled and probed before, while they are whole
            shard_frozen_weights(self.model, unwrap_peft(self.model).base_model, self.args.device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        wrapped = super()._wrap_model(model, training, dataloader)
        return wrap_in_ddp(wrapped, self.accelerator) if self.args.fsdp and training and wrapped is model else wrapped

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create Trainer's schedule, and warn if its warm-up lasts longer than training."""
        warn_of_long_warmup(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does, and discard the calibration of the previous weights."""
        self._calibration = {}
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end:  # it replaces the last model, but keeps the last model's step
            self._calibration = {}
        self.write_model_card(self.args.output_dir)
        return output

    @torch.no_grad()
    def calibrate(self, dataset: Dataset | dict[str, Dataset] | None = None) -> dict[str, float]:
        """Measure accuracy, calibration, mean and spread of rewards on held-out pairs; saved with the model.

        Args:
            dataset: preference pairs, or a dict of datasets that are combined; `eval_dataset` by default.

        Returns:
            `accuracy` (share of correctly ordered pairs among those with different scores; NaN if there are none),
            `calibration_error` (expected calibration error of sigmoid(margin), see `pairwise_calibration_error`),
            `reward_mean` and `reward_std` (reward units, over chosen and rejected), `pairs`, `ties` (number of pairs
            with equal scores, if any), and the training `step` of the measurement.

        Raises:
            ValueError: the dataset has no pairs.
        """
        scored = []
        with evaluation_mode(self.model):
            for batch in chain.from_iterable(self._calibration_loaders(dataset)):
                batch = self._prepare_inputs(batch)
                batch.pop("margin", None)
                with self.accelerator.autocast():
                    scores = self.model(**batch, use_cache=False).logits.squeeze(-1).float()
                scored.append(cast(Tensor, self.accelerator.gather_for_metrics(scores.view(2, -1).T)).T)
        if not scored:
            raise ValueError(
                f"There is no pair to calibrate on: the dataset is empty, or max_length={self.args.max_length} or "
                "dataloader_drop_last drops all pairs. Pass more pairs, or raise max_length."
            )
        all_scores = torch.cat(scored, 1)
        chosen_scores, rejected_scores = all_scores
        differs = chosen_scores != rejected_scores
        self._calibration = {
            "accuracy": (chosen_scores > rejected_scores)[differs].float().mean().item(),
            "calibration_error": pairwise_calibration_error(chosen_scores - rejected_scores),
            "reward_mean": all_scores.mean().item(),
            "reward_std": all_scores.std(unbiased=False).item(),
            "pairs": len(chosen_scores),
            **({} if differs.all() else {"ties": int((~differs).sum())}),
            "step": self.state.global_step,
        }
        return dict(self._calibration)

    def _calibration_loaders(self, dataset: Any) -> Iterator[DataLoader]:
        if dataset is None:
            names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
            yield from map(self.get_eval_dataloader, names)
            return
        for name, part in (dataset if isinstance(dataset, dict) else {"calibration": dataset}).items():
            # Not `get_eval_dataloader`, which caches loaders by name if workers are persistent.
            yield self.get_test_dataloader(
                cast(Any, self._prepare_dataset(part, self.processing_class, self.args, name))
            )

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's dataloader, after tokenizing a `train_dataset` that was replaced."""
        self.train_dataset = self._tokenize_if_needed(self.train_dataset, "train")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return Trainer's dataloader, after tokenizing an `eval_dataset` that was replaced."""
        uses_default = eval_dataset is self.eval_dataset  # `evaluate` passes it
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._tokenize_if_needed(part, name) for name, part in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._tokenize_if_needed(self.eval_dataset, "eval")
        return super().get_eval_dataloader(None if uses_default else eval_dataset)

    def _tokenize_if_needed(self, dataset: Any, name: str) -> Any:
        columns = getattr(dataset, "column_names", None) or ()
        if "chosen" not in columns or "chosen_ids" in columns:
            return dataset
        return self._prepare_dataset(dataset, self.processing_class, self.args, name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: RewardConfig, dataset_name: str) -> Any:
        if processing_class.eos_token is None:
            if processing_class.sep_token is None:
                raise ValueError(
                    "The tokenizer has no EOS token, which a reward model needs at the end of each text: pass "
                    "RewardConfig(eos_token=...), or a processing_class that has one."
                )
            processing_class.eos_token = processing_class.sep_token  # encoders (BERT) end a text with it
        return tokenize_pairs(
            dataset,
            processing_class,
            max_length=args.max_length,
            num_proc=args.dataset_num_proc,
            name={"train": "train_dataset", "eval": "eval_dataset"}.get(dataset_name, dataset_name),
            num_embeddings=self._num_embeddings,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute TRL's loss, and log the accuracy over pairs with different scores."""
        mode = "train" if self.model.training else "eval"
        with contextlib.nullcontext() if self._pair_sharing is None else self._pair_sharing.apply():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.detach().squeeze(-1).chunk(2)
        counts = torch.stack([(chosen > rejected).sum(), (chosen != rejected).sum()]).view(1, 2)
        correct, untied = cast(Tensor, self.accelerator.gather_for_metrics(counts)).sum(0).tolist()
        logged = self._metrics[mode]["accuracy"]
        logged.pop()  # TRL counts a tie as an error
        if untied:
            logged.append(correct / untied)
        elif not logged:
            del self._metrics[mode]["accuracy"]
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, after updating an outdated calibration if there are held-out pairs."""
        is_current = self._calibration.get("step") == self.state.global_step
        if not _internal_call and self.eval_dataset is not None and not is_current:
            try:
                self.calibrate()
            except ValueError as error:
                self._calibration = {}
                warnings.warn(f"The reward model is saved without a calibration. {error}", stacklevel=2)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with without_generation_parameters(self.accelerator.unwrap_model(self.model).config):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            directory = Path(cast(str, output_dir or self.args.output_dir))
            (directory / REWARD_FILE).write_text(json.dumps(self._metadata(), indent=2), encoding="utf-8")
            (directory / TRAINING_ARGS_NAME).unlink()  # a pickle that contains the Hub token
            save_training_args_json(self.args, directory)
            self.write_model_card(directory)

    def _metadata(self) -> dict[str, Any]:
        config = self.accelerator.unwrap_model(self.model).config
        quantization: Any = getattr(config, "quantization_config", None)
        return {
            "base_model": config._name_or_path,
            **({} if self._base_weights is None else {"base_weights": self._base_weights}),
            "pad_token_id": config.get_text_config().pad_token_id,
            "quantization": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
            "chat_template_sha256": template_hash(self.processing_class),
            **{name: value for name, value in self._calibration.items() if not math.isnan(value)},  # JSON has no NaN
        }


def check_machine(args: RewardConfig, has_adapter: bool) -> None:
    """Refuse settings that these processes and devices cannot run."""
    check_no_sharding(args)
    check_fsdp(args)
    check_fsdp_adapter(args, has_adapter)
    check_liger(args)


def check_template_tokens(args: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a `chat_template_path` with tokens that TRL would add to the base, since an actor's base lacks them."""
    path = args.chat_template_path
    if path is None or path.endswith((".jinja", ".j2")):
        return
    source = AutoTokenizer.from_pretrained(path)
    added = [token.content for token in source.added_tokens_decoder.values()]
    if missing := [token for token in added if token not in tokenizer.get_vocab()]:
        raise ValueError(
            f"chat_template_path={path!r} adds tokens that the base does not have, {missing[:3]}: the reward adapter "
            "would train embeddings that an actor on this base lacks. Pass only the template, as a .jinja file that "
            "uses tokens of the base; or add the tokens to the base, save it, and use it for both models."
        )


def train_score_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """Copy an adapter configuration and add the score head to its trained modules; None for None."""
    if peft_config is None:
        return None
    peft_config = config_to_train(peft_config, TaskType.SEQ_CLS)
    saved = getattr(peft_config, "modules_to_save", None) or []
    peft_config.modules_to_save = sorted({*saved, "score"})
    return peft_config


def set_frozen_dtype(args: RewardConfig) -> None:
    """Load frozen weights in the dtype of the checkpoint, unless `model_init_kwargs` sets a dtype.

    TRL would load them in fp32. In an fp16 run they are loaded in fp16, since fp16 autocast cannot use bf16 weights.
    """
    frozen_dtype = "float16" if runs_in_fp16(args) else "auto"
    args.model_init_kwargs = {"dtype": frozen_dtype, **cast(dict, args.model_init_kwargs or {})}


def check_named_model(model: str, args: RewardConfig, *, is_fully_trained: bool) -> None:
    """Register a sequence classifier for a model's family, and check its configuration before loading weights."""
    options = {"trust_remote_code": args.trust_remote_code, **cast(dict, args.model_init_kwargs or {})}
    config = load_config(model, options)
    check_rope_scaling(model, config, options)
    if config.num_labels != 1 and any("ForSequenceClassification" in name for name in config.architectures or ()):
        raise ValueError(
            f"{model!r} is a classifier with num_labels={config.num_labels}, whose head a reward model cannot start "
            "from: it needs num_labels=1. Pass the base of that classifier."
        )
    register_sequence_classifier(config)
    if "score.bias" in weight_files(local_folder(model, options.get("revision"))):
        warnings.warn(
            f"The bias of the score head of {model!r} is left out: it shifts all rewards alike, which the pairwise "
            "loss does not see, so what is trained has none.",
            stacklevel=3,
        )
    if args.use_liger_kernel:
        check_liger_model(config, args)
    if is_fully_trained:
        dtype = options.get("dtype", options.get("torch_dtype"))
        check_trained_dtype(config.dtype if dtype == "auto" else dtype, args.fp16, args.learning_rate)


def resolve_tokenizer(
    model: str | PreTrainedModel | PeftModel, args: RewardConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Load the tokenizer by the model's name if None, and check that its special tokens have embeddings.

    Returns the tokenizer, and the number of embeddings; None if it is not known or will be resized.

    Raises:
        ValueError: EOS, or the padding token of the arguments, has no embedding.
    """
    options = cast(dict, args.model_init_kwargs or {})
    if tokenizer is None:
        name = model if isinstance(model, str) else cast(str, model.config._name_or_path)
        options = {"trust_remote_code": args.trust_remote_code, "revision": options.get("revision")} | options
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
        )
    adds_tokens = args.chat_template_path is not None and not args.chat_template_path.endswith((".jinja", ".j2"))
    num_embeddings = count_embeddings(model, options)
    if adds_tokens or num_embeddings is None:  # TRL resizes the embeddings for the added tokens
        return tokenizer, None
    for field in ("eos_token", "pad_token"):
        token = getattr(args, field)
        if token is not None and cast(int, tokenizer.convert_tokens_to_ids(token)) >= num_embeddings:
            raise ValueError(
                f"RewardConfig({field}={token!r}): the token has no embedding in the model ({num_embeddings} tokens). "
                "Choose another token, or call model.resize_token_embeddings(len(tokenizer)) and pass the model."
            )
    check_embedded(tokenizer, num_embeddings, with_eos=args.eos_token is None)
    return tokenizer, num_embeddings


def check_head_is_trained(model: PeftModel) -> None:
    """Refuse a PeftModel whose task type neither trains nor saves the score head with its adapter."""
    if model.active_peft_config.task_type == TaskType.SEQ_CLS:
        return
    trained = [name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not any("modules_to_save" in parts and {*HEADS} & {*parts} for parts in trained):
        raise ValueError(
            f"The adapter of model has task_type={model.active_peft_config.task_type!s}, so its score head is neither "
            "trained nor saved: create it with LoraConfig(task_type='SEQ_CLS'), or pass the base and peft_config."
        )
