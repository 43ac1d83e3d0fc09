"""An actor-critic without data, run for the memory that its phases take."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ..algo.logprobs import token_logprobs
from ..kernels.lora import cached_lora_weights
from ..models import logprobs as logits
from ..models.actor_critic import ActorCritic
from ..models.backbone import backbone_interface, cache_of, unwrap_peft
from ..models.classifier import register_sequence_classifier
from ..models.critic import CriticSpec
from ..models.loading import build_actor_critic, language_model_class
from .ledger import MemoryTracker
from .prediction import PARTS, MemoryEstimator, Parts, PlannerConfig
from .quantized import quantize


class DryRun(MemoryEstimator):
    """An actor-critic without data, whose phases are run for the memory that they take.

    Args:
        config: of a causal language model.
        setup: lengths, adapters, precision.
        value_config: of a critic of its own.
    """

    def __init__(
        self, config: PretrainedConfig, setup: PlannerConfig, value_config: PretrainedConfig | None = None
    ) -> None:
        self.setup = setup
        with torch.device("meta"), MemoryTracker():  # a ledger, to say yes where the head is compared with the model
            self.actor = _actor_critic(config, setup, value_config)
        self.parameters = count_parameters(self.actor)
        if setup.quantization in ("nf4", "int8"):
            quantize(self.actor, setup.quantization)
        self.ledger = MemoryTracker(self.actor.num_embeddings)
        self._fake = FakeTensorMode()
        with self._fake, self.ledger:
            _without_data(self.actor, self.ledger)
            with self.ledger.booking("optimizer"):  # Adam's two moments, there from the first step on
                self._moments = [torch.empty_like(p) for p in self._trainable_parameters() for _ in range(2)]
        for model in filter(None, (self.actor.policy, self.actor.value_model)):
            _mark_layers(unwrap_peft(model), self.ledger)

    def _trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.actor.parameters() if p.requires_grad]

    def segment_peaks(self, work: str, rows: int) -> list[Parts]:
        """See `MemoryEstimator`; the same work has the same stretches whatever the number of layers."""
        self.actor.train(work == "learn")
        gradients = contextlib.nullcontext() if work == "learn" else torch.no_grad()
        with self._fake, self.ledger, gradients, logits_as_on_a_gpu():
            self.ledger.restart()
            return getattr(self, f"_{work}")(rows)

    def _prefill(self, rows: int) -> list[Parts]:
        return self._peaks(cache_bytes(self._decoded(*self._tokens(rows, self.setup.prompt_length), None)))

    def _decode(self, rows: int) -> list[Parts]:
        """The last token, with all before it in the cache."""
        ids, mask = self._tokens(rows, self.setup.prompt_length + self.setup.response_length - 1)
        with self._autocast():
            cache = cache_of(self.actor.runner.run(self.actor.language_model, ids, mask, use_cache=True))
        ids, mask = ids[:, :1], torch.cat([mask, mask[:, :1]], 1)
        self.ledger.restart()
        cache = self._decoded(ids, mask, cache)
        return self._peaks(cache_bytes(cache))

    def _score(self, rows: int) -> list[Parts]:
        with self._autocast():
            self.actor(*self._tokens(rows), self.setup.response_length, with_entropy=True)
        return self._peaks()

    def _learn(self, rows: int) -> list[Parts]:
        with self.ledger.booking("gradients"):
            for parameter in self._trainable_parameters():
                parameter.grad = torch.empty_like(parameter)
        with self._autocast():
            output = self.actor(*self._tokens(rows), self.setup.response_length)
        (output.logprobs.sum() + output.values.sum()).backward()
        found = self._peaks()
        self.actor.zero_grad(set_to_none=True)
        return found

    def _decoded(self, ids: Tensor, mask: Tensor, cache: Any) -> Any:
        """The cache after one step of `ActorCritic.sample`."""
        model = self.actor.language_model
        with cached_lora_weights(self.actor.policy), self._autocast():
            outputs = self.actor.runner.run(model, ids, mask, use_cache=True, cache=cache)
            scaled = logits.logits_function(model)(outputs.last_hidden_state[:, -1]).float() / 0.7
            token = logits.sample(scaled, torch.empty(len(ids), dtype=torch.float64))
            token_logprobs(scaled, token)
            return cache_of(outputs)

    def _tokens(self, rows: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        length = length or self.setup.prompt_length + self.setup.response_length
        return torch.empty(rows, length, dtype=torch.int64), torch.empty(rows, length, dtype=torch.int64)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.setup.quantization != "fp32")

    def _peaks(self, kv_cache: int = 0) -> list[Parts]:
        found = []
        for peak in (*self.ledger.earlier, self.ledger.peak):
            parts = {part: peak[part] for part in PARTS}
            parts["kv_cache"] = min(kv_cache, parts["activations"])
            parts["activations"] -= parts["kv_cache"]
            found.append(parts)
        return found


@contextlib.contextmanager
def logits_as_on_a_gpu() -> Iterator[None]:
    """Cut logits inside as on a GPU: tensors without data say that they are on a CPU, whose chunks are smaller."""
    on_cpu = logits.CHUNK_ELEMENTS, logits.SLICE_ELEMENTS
    logits.CHUNK_ELEMENTS = logits.chunk_elements(torch.device("cuda"), frozen_head=True)
    logits.SLICE_ELEMENTS = logits.GPU_SLICE_ELEMENTS
    try:
        yield
    finally:
        logits.CHUNK_ELEMENTS, logits.SLICE_ELEMENTS = on_cpu


def _actor_critic(config: PretrainedConfig, setup: PlannerConfig, value_config: PretrainedConfig | None) -> ActorCritic:
    base = language_model_class(config).from_config(config, dtype=setup.dtype)
    lora = LoraConfig(r=setup.lora_r, lora_alpha=2 * setup.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = cast(PeftModel, get_peft_model(base, lora))
    if setup.reward == "adapter":
        trained = [p for p in policy.parameters() if p.requires_grad]
        policy.add_adapter("reward", dataclasses.replace(lora, inference_mode=True, target_modules="all-linear"))
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(".reward." not in name and any(parameter is p for p in trained))
    value_model = None if value_config is None else classifier(value_config)
    actor = build_actor_critic(policy, critic=CriticSpec(setup.critic, model=value_model))
    if actor.value_model is not None:
        backbone_interface(actor.value_model)  # tried here, on meta: fake tensors of a dry run cannot be compared
    actor.runner.sdpa_models = []  # the choice between kernels for CPUs is not that of a card
    if setup.activation_checkpointing:
        actor.activation_checkpointing_enable()
    return actor


def causal(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model with random weights."""
    return language_model_class(config).from_config(config)


def classifier(config: PretrainedConfig) -> PreTrainedModel:
    """A sequence classifier with one label, fp32, as PPOTrainer loads a critic by its name."""
    register_sequence_classifier(config)
    return AutoModelForSequenceClassification.from_config(_one_label(config), dtype=torch.float32)


def _one_label(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def count_parameters(actor: ActorCritic) -> dict[str, int]:
    """Parameters of the base by kind (embeddings, a tied head counted once; linear layers; others), and of a critic."""
    model = actor.language_model
    relative_error = {
        id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    counts = {"embeddings": 0, "linear": 0, "other": 0}
    if actor.value_model is not None:
        counts["critic"] = sum(p.numel() for p in actor.value_model.parameters())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            linear = ".base_layer." in name and parameter.ndim == 2
            counts["embeddings" if id(parameter) in relative_error else "linear" if linear else "other"] += (
                parameter.numel()
            )
    return counts


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of a key-value cache."""
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _without_data(actor: ActorCritic, ledger: MemoryTracker) -> None:
    """Give every parameter and buffer a storage that is booked; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module_name, module in actor.named_modules():
        part = "adapters" if "lora_" in module_name or module_name.startswith("value_head.") else "weights"
        for tensors in (module._parameters, module._buffers):
            for name, tensor in cast(dict[str, Any], tensors).items():
                if tensor is not None and id(tensor) not in made:
                    with ledger.booking(part):
                        new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if trained else new
                tensors[name] = None if tensor is None else made[id(tensor)]


def _mark_layers(model: PreTrainedModel, ledger: MemoryTracker) -> None:
    """Have the stretches of a pass begin and end with the layers, forward and backward."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    layers = next((module for module in lists if len(module) == count), None)
    if layers is None:
        return

    def mark(*_: Any) -> None:
        ledger.mark()

    def mark_backward(module: nn.Module, args: Any, output: Any) -> None:
        states = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if states.requires_grad:
            states.register_hook(mark)

    layers[0].register_forward_pre_hook(mark)
    layers[-1].register_forward_hook(mark)
    for layer in (layers[0], layers[-1]):
        layer.register_forward_hook(mark_backward)
