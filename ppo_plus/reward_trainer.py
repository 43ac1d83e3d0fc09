"""Reward models from preferences: TRL's RewardTrainer, with an adapter on disk that says how it is to be used.

The loss is the pairwise one of InstructGPT (eq. 1), with TRL's margin and centring. What this adds: the score head
is always trained and saved with the LoRA weights, and beside them stands `reward_model.json` with the base, its
quantization, the chat template's hash, and the calibration on held-out pairs.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
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

from .config import check_no_sharding, copy_arguments
from .config.reward_config import RewardConfig
from .data.preferences import tokenize_pairs
from .data.tokenizers import check_embedded
from .kernels.fp32_heads import compute_heads_in_fp32
from .kernels.liger import LigerMixin, apply_liger, check_liger, check_liger_model
from .kernels.lora import patch_lora_forward
from .kernels.rmsnorm import patch_rmsnorm
from .models.adapter_checks import check_no_adapter, check_preserves_base
from .models.adapter_files import HEADS, REWARD_FILE
from .models.adapters import train_adapter
from .models.base_weights import encode_samples, sample_model
from .models.classifier import register_sequence_classifier
from .models.loading import (
    clone_mmapped_tensors,
    config_to_train,
    count_embeddings,
    load_config,
    quantization_in_fp16,
    runs_in_fp16,
    warn_of_bf16,
)
from .models.precision import check_trained_dtype, hold_trained_in_fp32
from .models.saving import without_generation_parameters
from .models.weight_checks import check_device_map, check_model_weights
from .rewards.adapters import template_hash
from .training.hub import HubMixin, save_training_args_json

ADAPTER_HINT = (
    "Pass the name of its base for a new reward adapter; to start from the adapter's weights, merge them into the base "
    "(merge_and_unload) and save that; to train the adapter further, pass "
    "PeftModel.from_pretrained(base, name, is_trainable=True)."
)


class RewardTrainer(LigerMixin, HubMixin, TRLRewardTrainer):
    """Trains a reward model with the pairwise loss; arguments are those of `trl.RewardTrainer`.

    Args:
        model: a name, or a sequence classifier with one label.
        args: hyper-parameters; the trainer has a copy of them.
        peft_config: the adapter to train; `score` is added to its `modules_to_save`.
        **kwargs: see `trl.RewardTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, ...
    """

    args: RewardConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase
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
        check_no_sharding(args)
        check_liger(args)
        model = str(model) if isinstance(model, Path) else model
        check_preserves_base(peft_config, "peft_config")
        check_no_adapter(model, ADAPTER_HINT)
        peft_config = train_score_head(peft_config)
        if isinstance(model, str):
            if peft_config is not None:
                set_frozen_dtype(args)
            check_named_model(model, args, is_trained_whole=peft_config is None)
        check_device_map(cast(dict, args.model_init_kwargs or {}).get("device_map"))
        if runs_in_fp16(args) and kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantization_in_fp16(kwargs["quantization_config"])
        if (tokenizer := kwargs.get("processing_class")) is not None:
            kwargs["processing_class"] = copy.deepcopy(tokenizer)  # TRL sets its EOS, padding and chat template
        self._calibration: dict[str, Any] = {}
        kwargs["processing_class"] = tokenizer_with_embeddings(model, args, kwargs.get("processing_class"))
        if peft_config is not None:
            check_template_tokens(args, kwargs["processing_class"])
        if isinstance(model, PeftModel):
            train_adapter(model)
            check_head_is_trained(model)
        super().__init__(model=model, args=args, peft_config=peft_config, **kwargs)
        check_model_weights(self.model, "model")
        # Taken before a forward pass, in which bitsandbytes may order 4-bit weights anew.
        self._base_weights = encode_samples(sample_model(self.model)) if isinstance(self.model, PeftModel) else None
        if isinstance(self.model, PeftModel) or not isinstance(model, str):
            hold_trained_in_fp32(self.model)  # TRL casts adapters of a quantized model to bf16
        self._configure_forward()

    def _configure_forward(self) -> None:
        """Replace the forwards of adapters, norms and head by ours, or Liger's; the last step on a loaded model."""
        clone_mmapped_tensors(self.model)
        if runs_in_fp16(self.args):
            warn_of_bf16(self.model)
        patch_lora_forward(self.model)
        patch_rmsnorm(self.model)
        compute_heads_in_fp32(self.model)
        if self.args.use_liger_kernel:
            apply_liger([self.model], self.args)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's `train`, which makes other weights of those that were calibrated."""
        self._calibration = {}
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end:  # in the place of the last, under the last one's step
            self._calibration = {}
        return output

    @torch.no_grad()
    def calibrate(self, dataset: Dataset | dict[str, Dataset] | None = None) -> dict[str, float]:
        """Accuracy and the mean and standard deviation of rewards on held-out pairs; saved with the model.

        Args:
            dataset: preference pairs, or a dict of them, which are taken together; `eval_dataset` by default.

        Returns:
            `accuracy` (share in the right order of the pairs whose scores differ; NaN for none), `reward_mean` and
            `reward_std` (reward units, over chosen and rejected), `pairs`, `ties` (pairs of equal scores, where there
            are any), and the `step` of training at which they were measured.

        Raises:
            ValueError: there are no pairs.
        """
        chosen, rejected = [], []
        training = self.model.training
        self.model.eval()
        for loader in self._calibration_loaders(dataset):
            for batch in loader:
                batch = self._prepare_inputs(batch)
                batch.pop("margin", None)
                with self.accelerator.autocast():
                    scores = self.model(**batch, use_cache=False).logits.squeeze(-1).float()
                first, second = cast(Tensor, self.accelerator.gather_for_metrics(scores.view(2, -1).T)).T
                chosen.append(first)
                rejected.append(second)
        self.model.train(training)
        if not chosen:
            raise ValueError(
                f"There is no pair to calibrate on: the dataset is empty, or max_length={self.args.max_length} or "
                "dataloader_drop_last leaves nothing of it. Pass more pairs, or raise max_length."
            )
        first, second = torch.cat(chosen), torch.cat(rejected)
        both = torch.cat([first, second])
        decided = first != second
        self._calibration = {
            "accuracy": (first > second)[decided].float().mean().item(),
            "reward_mean": both.mean().item(),
            "reward_std": both.std(unbiased=False).item(),
            "pairs": len(first),
            **({} if decided.all() else {"ties": int((~decided).sum())}),
            "step": self.state.global_step,
        }
        return dict(self._calibration)

    def _calibration_loaders(self, dataset: Any) -> Iterator[DataLoader]:
        if dataset is None:
            names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
            yield from map(self.get_eval_dataloader, names)
            return
        for name, part in (dataset if isinstance(dataset, dict) else {"calibration": dataset}).items():
            # As for a test: those for evaluation are kept, under one name, where workers are persistent.
            yield self.get_test_dataloader(
                cast(Any, self._prepare_dataset(part, self.processing_class, self.args, name))
            )

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's; pairs that were put into `train_dataset` later are tokenized first."""
        self.train_dataset = self._tokenized(self.train_dataset, "train")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Trainer's; pairs that were put into `eval_dataset` later are tokenized first."""
        own = eval_dataset is self.eval_dataset  # as `evaluate` passes it
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._tokenized(part, name) for name, part in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._tokenized(self.eval_dataset, "eval")
        return super().get_eval_dataloader(None if own else eval_dataset)

    def _tokenized(self, dataset: Any, name: str) -> Any:
        columns = getattr(dataset, "column_names", None) or ()
        if "chosen" not in columns or "chosen_ids" in columns:
            return dataset
        return self._prepare_dataset(dataset, self.processing_class, self.args, name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: RewardConfig, dataset_name: str) -> Any:
        if processing_class.eos_token is None:
            if processing_class.sep_token is None:
                raise ValueError(
                    "The tokenizer has no EOS token, and texts without an end are not what a reward model can be asked "
                    "about: pass RewardConfig(eos_token=...), or a processing_class that has one."
                )
            processing_class.eos_token = processing_class.sep_token  # so an encoder (BERT) ends a text
        return tokenize_pairs(
            dataset,
            processing_class,
            max_length=args.max_length,
            num_proc=args.dataset_num_proc,
            name={"train": "train_dataset", "eval": "eval_dataset"}.get(dataset_name, dataset_name),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute TRL's loss, and log the accuracy over the pairs whose two scores differ."""
        mode = "train" if self.model.training else "eval"
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.detach().squeeze(-1).chunk(2)
        counts = torch.stack([(chosen > rejected).sum(), (chosen != rejected).sum()]).view(1, 2)
        right, decided = cast(Tensor, self.accelerator.gather_for_metrics(counts)).sum(0).tolist()
        logged = self._metrics[mode]["accuracy"]
        logged.pop()  # TRL counts a tie as a mistake
        if decided:
            logged.append(right / decided)
        elif not logged:
            del self._metrics[mode]["accuracy"]
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save, measuring the calibration first where there are held-out pairs and it is out of date."""
        measured = self._calibration.get("step") == self.state.global_step
        if not _internal_call and self.eval_dataset is not None and not measured:
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
            (directory / REWARD_FILE).write_text(json.dumps(self._description(), indent=2), encoding="utf-8")
            (directory / TRAINING_ARGS_NAME).unlink()  # pickled, and with the token in it
            save_training_args_json(self.args, directory)

    def _description(self) -> dict[str, Any]:
        config = self.accelerator.unwrap_model(self.model).config
        quantization: Any = getattr(config, "quantization_config", None)
        return {
            "base_model": config._name_or_path,
            **({} if self._base_weights is None else {"base_weights": self._base_weights}),
            "pad_token_id": config.get_text_config().pad_token_id,
            "quantization": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
            "chat_template_sha256": template_hash(self.processing_class),
            **{name: value for name, value in self._calibration.items() if not math.isnan(value)},  # JSON has none
        }


def check_template_tokens(args: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template whose tokens TRL would add to the base: no actor's base has them.

    Args:
        args: with `chat_template_path`, a folder or a file of a template.
        tokenizer: of the base.
    """
    path = args.chat_template_path
    if path is None or path.endswith((".jinja", ".j2")):
        return
    source = AutoTokenizer.from_pretrained(path)
    added = [token.content for token in source.added_tokens_decoder.values()]
    if lacking := [token for token in added if token not in tokenizer.get_vocab()]:
        raise ValueError(
            f"chat_template_path={path!r} brings tokens that the base does not have, {lacking[:3]}: the reward adapter "
            "would train embeddings for them that no actor on this base has. Pass the template alone, as a .jinja "
            "file, written with the base's own tokens; or add the tokens to the base, save it, and use it for both."
        )


def train_score_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """Return a copy of an adapter's configuration that trains the score head too; None for None."""
    if peft_config is None:
        return None
    peft_config = config_to_train(peft_config, TaskType.SEQ_CLS)
    saved = getattr(peft_config, "modules_to_save", None) or []
    peft_config.modules_to_save = sorted({*saved, "score"})
    return peft_config


def set_frozen_dtype(args: RewardConfig) -> None:
    """Let weights that are not trained stay as they were saved, where `model_init_kwargs` names no dtype.

    TRL would load them in fp32. In an fp16 run they are fp16, because nothing is done in bf16 and fp16 at once.
    """
    frozen_dtype = "float16" if runs_in_fp16(args) else "auto"
    args.model_init_kwargs = {"dtype": frozen_dtype, **cast(dict, args.model_init_kwargs or {})}


def check_named_model(model: str, args: RewardConfig, *, is_trained_whole: bool) -> None:
    """Register a classifier for the family of a model, and refuse what its configuration tells before it is loaded."""
    options = {"trust_remote_code": args.trust_remote_code, **cast(dict, args.model_init_kwargs or {})}
    config = load_config(model, options)
    register_sequence_classifier(config)
    if args.use_liger_kernel:
        check_liger_model(config)
    if is_trained_whole:
        dtype = options.get("dtype", options.get("torch_dtype"))
        check_trained_dtype(config.dtype if dtype == "auto" else dtype, args.fp16, args.learning_rate)


def tokenizer_with_embeddings(
    model: str | PreTrainedModel | PeftModel, args: RewardConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer (loaded by the model's name for None) with EOS and padding that the model can embed.

    Raises:
        ValueError: its EOS, or the padding token of the arguments, has no embedding.
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
    if adds_tokens or num_embeddings is None:  # TRL resizes the model to the tokens that the template brings
        return tokenizer
    for field in ("eos_token", "pad_token"):
        token = getattr(args, field)
        if token is not None and cast(int, tokenizer.convert_tokens_to_ids(token)) >= num_embeddings:
            raise ValueError(
                f"RewardConfig({field}={token!r}): that token has no embedding in the model ({num_embeddings} tokens). "
                "Choose another, or call model.resize_token_embeddings(len(tokenizer)) and pass the model."
            )
    check_embedded(tokenizer, num_embeddings, with_eos=args.eos_token is None)
    return tokenizer


def check_head_is_trained(model: PeftModel) -> None:
    """Refuse a PeftModel of another task whose score head is neither trained nor saved with its adapter."""
    if model.active_peft_config.task_type == TaskType.SEQ_CLS:
        return
    trained = [name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not any("modules_to_save" in parts and {*HEADS} & {*parts} for parts in trained):
        raise ValueError(
            f"The adapter of model has task_type={model.active_peft_config.task_type!s}, with which its score head is "
            "neither trained nor saved: make it with LoraConfig(task_type='SEQ_CLS'), or pass the base and peft_config."
        )
