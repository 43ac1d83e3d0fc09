"""Run the phases of an actor-critic on fake tensors, and track their memory."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from ..algo.logprobs import token_logprobs
from ..kernels.frozen_layers import decoder_layers
from ..kernels.lora import cached_lora_weights
from ..models import logprobs as logits
from ..models.actor_critic import ActorCritic
from ..models.backbone import backbone_interface, cache_of, unwrap_peft
from ..models.classifier import register_sequence_classifier
from ..models.critic import CriticSpec
from ..models.loading import build_actor_critic, language_model_class
from ..utils.contexts import set_attributes
from .prediction import PARTS, MemoryEstimator, Parts, PlannerConfig
from .quantized import QuantizedLinear, quantize
from .tracker import MemoryTracker


class DryRun(MemoryEstimator):
    """An actor-critic of fake tensors, whose phases run under a memory tracker.

    Args:
        config: config of a causal language model.
        setup: lengths, adapters, precision.
        value_config: config of a separate critic.
    """

    def __init__(
        self, config: PretrainedConfig, setup: PlannerConfig, value_config: PretrainedConfig | None = None
    ) -> None:
        self.setup = setup
        with torch.device("meta"), MemoryTracker():  # under it, comparisons of the self-tests are True
            self.actor = _actor_critic(config, setup, value_config)
        self.parameters = count_parameters(self.actor)
        if setup.quantization in ("nf4", "int8"):
            quantize(self.actor, setup.quantization)
        self.tracker = MemoryTracker(self.actor.num_embeddings)
        self._fake = FakeTensorMode()
        with self._fake, self.tracker:
            _replace_with_fake_tensors(self.actor, self.tracker)
            with self.tracker.category("optimizer"):  # Adam's two moments, which exist after the first step
                self._optimizer_state = [torch.empty_like(p) for p in self._trainable_parameters() for _ in range(2)]
        for model in filter(None, (self.actor.policy, self.actor.value_model)):
            _start_segments_at_layers(unwrap_peft(model), self.tracker)

    def _trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.actor.parameters() if p.requires_grad]

    def segment_peaks(self, phase: str, rows: int) -> list[Parts]:
        """See `MemoryEstimator`; the number of segments does not depend on the number of layers."""
        self.actor.train(phase == "learn")
        gradients = nullcontext() if phase == "learn" else torch.no_grad()
        with self._fake, self.tracker, gradients, gpu_logit_chunking():
            self.tracker.reset_peak()
            peaks = getattr(self, f"_{phase}")(rows)
        added = 0 if self.setup.processes == 1 else self._bytes_added_by_sharding(phase)
        return [{**parts, "weights": parts["weights"] + added} for parts in peaks]

    def _bytes_added_by_sharding(self, phase: str) -> int:
        """Return the bytes of weights on a rank that holds a share, less those of a whole base."""
        model = self.actor.language_model
        base, layers = sharded_bytes(model), [sharded_bytes(layer) for layer in decoder_layers(model.base_model)]
        share = -(-base // self.setup.processes)
        if phase != "learn" and not self.setup.gather_layers:
            return share  # the whole base is gathered, in addition to the share
        # The backward pass gathers the next layer while it runs one.
        return share + base - sum(layers) + max(layers, default=0) * (2 if phase == "learn" else 1) - base

    def _prefill(self, rows: int) -> list[Parts]:
        return self._peaks(cache_bytes(self._decode_step(*self._tokens(rows, self.setup.prompt_length), None)))

    def _decode(self, rows: int) -> list[Parts]:
        """Decode the last token, with all tokens before it in the cache."""
        ids, mask = self._tokens(rows, self.setup.prompt_length + self.setup.response_length - 1)
        with self._autocast():
            cache = cache_of(self.actor.runner.run(self.actor.language_model, ids, mask, use_cache=True))
        ids, mask = ids[:, :1], torch.cat([mask, mask[:, :1]], 1)
        self.tracker.reset_peak()
        cache = self._decode_step(ids, mask, cache)
        return self._peaks(cache_bytes(cache))

    def _score(self, rows: int) -> list[Parts]:
        with self._autocast():
            self.actor(*self._tokens(rows), self.setup.response_length, with_entropy=True)
        return self._peaks()

    def _learn(self, rows: int) -> list[Parts]:
        with self.tracker.category("gradients"):
            for parameter in self._trainable_parameters():
                parameter.grad = torch.empty_like(parameter)
        with self._autocast():
            output = self.actor(*self._tokens(rows), self.setup.response_length)
        (output.logprobs.sum() + output.values.sum()).backward()
        peaks = self._peaks()
        self.actor.zero_grad(set_to_none=True)
        return peaks

    def _decode_step(self, ids: Tensor, mask: Tensor, cache: Any) -> Any:
        """Run one step of `ActorCritic.sample` and return the cache."""
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
        peaks = []
        for peak in (*self.tracker.previous_peaks, self.tracker.peak):
            parts = {part: peak[part] for part in PARTS}
            parts["kv_cache"] = min(kv_cache, parts["activations"])
            parts["activations"] -= parts["kv_cache"]
            peaks.append(parts)
        return peaks


def gpu_logit_chunking() -> AbstractContextManager:
    """Context manager: chunk logits as on a GPU, although fake tensors are on the CPU, whose chunks are smaller."""
    chunk = logits.chunk_elements(torch.device("cuda"), frozen_head=True)
    return set_attributes(logits, CHUNK_ELEMENTS=chunk, SLICE_ELEMENTS=logits.GPU_SLICE_ELEMENTS)


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
        backbone_interface(actor.value_model)  # probed here on meta, because fake tensors cannot be compared
    actor.runner.sdpa_models = []  # no CPU kernels
    if setup.activation_checkpointing:
        actor.activation_checkpointing_enable()
    return actor


def causal(config: PretrainedConfig) -> PreTrainedModel:
    """Build a causal language model with random weights."""
    return language_model_class(config).from_config(config)


def classifier(config: PretrainedConfig) -> PreTrainedModel:
    """Build a sequence classifier with one label in fp32, as PPOTrainer loads a critic by name."""
    register_sequence_classifier(config)
    config = copy.deepcopy(config)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def count_parameters(actor: ActorCritic) -> dict[str, int]:
    """Count parameters of the base by kind, and of a separate critic; a tied head counts once, as embeddings."""
    model = actor.language_model
    embeddings = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    counts = {"embeddings": 0, "linear": 0, "other": 0}
    if actor.value_model is not None:
        counts["critic"] = sum(p.numel() for p in actor.value_model.parameters())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            linear = ".base_layer." in name and parameter.ndim == 2
            kind = "embeddings" if id(parameter) in embeddings else "linear" if linear else "other"
            counts[kind] += parameter.numel()
    return counts


def sharded_bytes(module: nn.Module) -> int:
    """Return the bytes of a module that FSDP2 shards: frozen parameters and packed weights, but not their scales."""
    frozen = {id(p): p.nbytes for n, p in module.named_parameters() if not p.requires_grad and "lora_" not in n}
    packed = (cast(Tensor, m.weight).nbytes for m in module.modules() if isinstance(m, QuantizedLinear))
    return sum(frozen.values()) + sum(packed)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a key-value cache."""
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _replace_with_fake_tensors(actor: ActorCritic, tracker: MemoryTracker) -> None:
    """Replace every parameter and buffer by a tracked fake tensor; tied ones stay tied."""
    replacements: dict[int, Tensor] = {}
    for module_name, module in actor.named_modules():
        category = "adapters" if "lora_" in module_name or module_name.startswith("value_head.") else "weights"
        for tensors in (module._parameters, module._buffers):
            for name, tensor in cast(dict[str, Any], tensors).items():
                if tensor is not None and id(tensor) not in replacements:
                    with tracker.category(category):
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    replacements[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = None if tensor is None else replacements[id(tensor)]


def _start_segments_at_layers(model: PreTrainedModel, tracker: MemoryTracker) -> None:
    """Start a segment before the first and after the last layer, forward and backward."""
    layers = decoder_layers(model.base_model)
    if not layers:
        return

    def start_segment(*_: Any) -> None:
        tracker.start_segment()

    def start_backward_segment(module: nn.Module, args: Any, output: Any) -> None:
        states = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if states.requires_grad:
            states.register_hook(start_segment)

    layers[0].register_forward_pre_hook(start_segment)
    layers[-1].register_forward_hook(start_segment)
    for layer in (layers[0], layers[-1]):
        layer.register_forward_hook(start_backward_segment)
