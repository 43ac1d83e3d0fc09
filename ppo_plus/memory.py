"""A memory planner: what a run will need, from the model's config alone.

    python -m ppo_plus.memory --model Qwen/Qwen2.5-7B-Instruct --vram 12 --prompt-length 256 --response-length 512

Nothing is estimated by formula. The actor-critic that PPOTrainer would build runs its own code, forward and backward,
on tensors that have a shape, a dtype and a storage size but no data (`FakeTensorMode`), and a ledger books the bytes
of every storage from the moment it is made until it is freed. What the planner says of a new architecture is
therefore what that architecture does. Stand-ins are used in one place, for the linear layers of a quantized base,
whose kernels want a GPU.

Layers of one kind are alike, so a deep model is planned from two or three layers of each kind: what one more of them
adds is measured, and multiplied.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import copy
import dataclasses
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_type_hints

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from .functional import token_logprobs
from .loading import CriticSource, build_actor_critic
from .logits import logits_function, sample
from .lora import weights_at_rest
from .modeling import ActorCritic, Critic, unwrapped

GIB = 2**30
# Assumed, not computed: what a process takes of a card before its first tensor (CUDA context, kernels, cuBLAS
# workspace), and the share of the rest that the caching allocator loses to rounding and fragments.
CUDA_CONTEXT = GIB // 2
ALLOCATOR_SHARE = 0.05
PARTS = ("weights", "adapters", "gradients", "optimizer", "kv_cache", "activations", "logits")
Quantization = Literal["nf4", "int8", "bf16", "fp32"]
Parts = dict[str, int]


class Ledger(TorchDispatchMode):
    """Bytes of live tensor storages, by what they hold, and as they stood when their sum was largest.

    It books storages that are made while it is active, of real tensors and of those without data. Where a program
    asks a tensor without data for a truth, the answer is yes: of all rows of a batch, that none has ended yet.

    Args:
        vocabulary: storages whose last dimension is this are booked under "logits".
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.part = vocabulary, "activations"
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.earlier: list[Counter[str]] = []
        self._booked: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not has_data(args[0]):
            return True
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._book(tensor)
        if sum(self.held.values()) > sum(self.peak.values()):
            self.peak = self.held.copy()
        return result

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._booked:
            return
        logits = self.part == "activations" and tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
        entry = ("logits" if logits else self.part, storage.nbytes())
        self._booked[storage._cdata] = entry
        self.held[entry[0]] += entry[1]
        weakref.finalize(storage, self._strike, storage._cdata)

    def _strike(self, key: int) -> None:
        part, size = self._booked.pop(key)
        self.held[part] -= size

    @contextlib.contextmanager
    def booking(self, part: str) -> Iterator[None]:
        """Inside, what is made is booked under this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Book tensors that were made before, of which a view would else count as new."""
        for tensor in tensors:
            self._book(tensor)

    def restart(self) -> None:
        """Let the peak begin again at what is held now."""
        self.peak, self.earlier = self.held.copy(), []

    def mark(self) -> None:
        """Begin a stretch with a peak of its own; the peak so far is the last of `earlier`."""
        self.earlier.append(self.peak)
        self.peak = self.held.copy()


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor has numbers in it, and not only a shape."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


@dataclass(frozen=True)
class Setup:
    """What is planned for.

    Attributes:
        prompt_length: tokens of the longest prompt.
        response_length: tokens of the longest response.
        rollout_batch_size: responses per rollout.
        num_mini_batches: optimizer steps per pass over a rollout.
        quantization: of the base's linear layers; "bf16" and "fp32" are none. Embeddings, norms and the output head
            are bf16, with "fp32" fp32; all but "fp32" run under bf16 autocast, as PPOConfig does where it can.
        lora_r: rank of the LoRA adapter on all linear layers; adapters are fp32.
        critic: as in PPOConfig; "separate" is a model of its own, trained in full, in fp32.
        reward: "adapter" mounts a reward adapter of the same rank on the base, "none" has no weights.
        activation_checkpointing: recompute activations in the backward pass.
    """

    prompt_length: int = 256
    response_length: int = 512
    rollout_batch_size: int = 64
    num_mini_batches: int = 2
    quantization: Quantization = "nf4"
    lora_r: int = 16
    critic: Critic = "shared"
    reward: Literal["adapter", "none"] = "adapter"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_length", "response_length", "rollout_batch_size", "num_mini_batches", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}.")
        if self.rollout_batch_size % self.num_mini_batches:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} is not a multiple of num_mini_batches="
                f"{self.num_mini_batches}: a minibatch would not be whole."
            )
        choices = {"quantization": get_args(Quantization), "critic": get_args(Critic), "reward": ("adapter", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Of whatever of the base is not quantized."""
        return torch.float32 if self.quantization == "fp32" else torch.bfloat16


@dataclass(frozen=True)
class Phase:
    """Memory of one phase at its highest moment: bytes by part, with this many rows at a time."""

    name: str
    rows: int
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """A prediction: phases at the proposed sizes, and what there is.

    Attributes:
        parameters: of the base, counted by kind, and of a critic of its own.
        phases: generate, score, learn.
        budget: bytes that tensors may take; the card less context and allocator.
        setup: what was planned for.
        gradient_accumulation_steps: micro-batches of `learn`'s rows per minibatch.
    """

    parameters: Parts
    phases: tuple[Phase, Phase, Phase]
    budget: int
    setup: Setup
    gradient_accumulation_steps: int

    @property
    def fits(self) -> bool:
        """Whether every phase stays within the budget."""
        return all(phase.total <= self.budget for phase in self.phases)

    @property
    def sizes(self) -> dict[str, int]:
        """The proposed fields of PPOConfig."""
        generate, score, learn = self.phases
        return {
            "per_device_train_batch_size": learn.rows,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_mini_batches": self.setup.num_mini_batches,
            "local_rollout_forward_batch_size": score.rows,
            "generation_batch_size": generate.rows,
        }


class Prediction(abc.ABC):
    """What the phases of a run take; a subclass says how that is found.

    A pass is told in stretches: before the first layer, in the layers, after the last, and so on, backward too. Within
    a stretch the highest moment is the same one whatever the number of layers.

    Attributes:
        parameters: see `Plan`.
    """

    parameters: Parts

    @abc.abstractmethod
    def stretches(self, work: str, rows: int) -> list[Parts]:
        """Bytes by part at the highest moment of each stretch of "prefill", "decode", "score" or "learn"."""

    def generate(self, rows: int) -> Phase:
        """Decoding: reading the prompts, or sampling the last token."""
        return self._phase("generate", rows, "prefill", "decode")

    def score(self, rows: int) -> Phase:
        """Log-probabilities, values and entropies without gradients; the reference and a reward adapter need less."""
        return self._phase("score", rows, "score")

    def learn(self, rows: int) -> Phase:
        """A micro-batch forward and backward, with the gradients of the one before."""
        return self._phase("learn", rows, "learn")

    def _phase(self, name: str, rows: int, *works: str) -> Phase:
        found = [parts for work in works for parts in self.stretches(work, rows)]
        return Phase(name, rows, max(found, key=lambda parts: sum(parts.values())))


class DryRun(Prediction):
    """An actor-critic without data, whose phases are run for the memory that they take.

    Args:
        config: of a causal language model.
        setup: lengths, adapters, precision.
        value_config: of a critic of its own.
    """

    def __init__(self, config: PretrainedConfig, setup: Setup, value_config: PretrainedConfig | None = None) -> None:
        self.setup = setup
        with torch.device("meta"), Ledger():  # a ledger, to say yes where the head is compared with the model
            self.actor = _actor_critic(config, setup, value_config)
        self.parameters = count_parameters(self.actor)
        if setup.quantization in ("nf4", "int8"):
            _quantize(self.actor, setup.quantization)
        self.ledger = Ledger(self.actor.num_embeddings)
        self._fake = FakeTensorMode()
        with self._fake, self.ledger:
            _without_data(self.actor, self.ledger)
            with self.ledger.booking("optimizer"):  # Adam's two moments, there from the first step on
                self._moments = [torch.empty_like(p) for p in self._trained() for _ in range(2)]
        for model in filter(None, (self.actor.policy, self.actor.value_model)):
            _mark_layers(unwrapped(model), self.ledger)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.actor.parameters() if p.requires_grad]

    def stretches(self, work: str, rows: int) -> list[Parts]:
        """See `Prediction`; the same work has the same stretches whatever the number of layers."""
        self.actor.train(work == "learn")
        with self._fake, self.ledger, contextlib.nullcontext() if work == "learn" else torch.no_grad():
            self.ledger.restart()
            return getattr(self, f"_{work}")(rows)

    def _prefill(self, rows: int) -> list[Parts]:
        return self._peaks(cache_bytes(self._decoded(*self._tokens(rows, self.setup.prompt_length), None)))

    def _decode(self, rows: int) -> list[Parts]:
        """The last token, with all before it in the cache."""
        ids, mask = self._tokens(rows, self.setup.prompt_length + self.setup.response_length - 1)
        with self._autocast():
            cache = self.actor._hidden_states(ids, mask, use_cache=True).past_key_values
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
            for parameter in self._trained():
                parameter.grad = torch.empty_like(parameter)
        with self._autocast():
            output = self.actor(*self._tokens(rows), self.setup.response_length)
        (output.logprobs.sum() + output.values.sum()).backward()
        found = self._peaks()
        self.actor.zero_grad(set_to_none=True)
        return found

    def _decoded(self, ids: Tensor, mask: Tensor, cache: Any) -> Any:
        """The cache after one step of `ActorCritic.generate`."""
        model = self.actor.language_model
        with weights_at_rest(self.actor.policy), self._autocast():
            outputs = self.actor._hidden_states(ids, mask, past_key_values=cache, use_cache=True)
            logits = logits_function(model)(outputs.last_hidden_state[:, -1]).float() / 0.7
            token = sample(logits, torch.empty(len(ids), dtype=torch.float64))
            token_logprobs(logits, token)
            return outputs.past_key_values

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


class LayeredRun(Prediction):
    """The same predictions, of a model of which only a few layers are run.

    Args:
        first: few layers of each kind.
        more: for each kind, a run of one layer more, and how many such layers the whole model has beyond `first`.
    """

    def __init__(self, first: DryRun, more: list[tuple[DryRun, int]]) -> None:
        self.first, self.more = first, more
        self.parameters = self._whole(first.parameters, [run.parameters for run, _ in more])

    def stretches(self, work: str, rows: int) -> list[Parts]:
        """See `Prediction`."""
        first, *more = (run.stretches(work, rows) for run in (self.first, *(run for run, _ in self.more)))
        return [self._whole(parts, others) for parts, *others in zip(first, *more, strict=True)]

    def _whole(self, first: Parts, more: list[Parts]) -> Parts:
        missing = [count for _, count in self.more]
        return {
            part: size + sum((m[part] - size) * count for m, count in zip(more, missing, strict=True))
            for part, size in first.items()
        }


def predict(config: PretrainedConfig, setup: Setup, value_config: PretrainedConfig | None = None) -> Prediction:
    """From a few layers of each kind where that is sure to be the same model, else from all of them."""
    short, longer = fewer_layers(config, causal)
    critic, longer_critic = fewer_layers(value_config, classifier) if value_config is not None else (None, [])
    more = [(DryRun(other, setup, critic), count) for other, count in longer]
    more += [(DryRun(short, setup, other), count) for other, count in longer_critic]
    first = DryRun(short, setup, critic)
    return LayeredRun(first, more) if more else first


def fewer_layers(
    config: PretrainedConfig, build: Callable[[PretrainedConfig], PreTrainedModel]
) -> tuple[PretrainedConfig, list[tuple[PretrainedConfig, int]]]:
    """The config with the last two layers of each kind; for each kind with one more, and how many are left out.

    What tells layers apart is what the config lists for each (`layer_types` and the like). That nothing else does is
    seen from the parameters: the kinds' must add up to those of the whole model. The config as it is, and none left
    out, where they do not, where layers borrow keys and values of others, or where there are few layers anyway.
    """
    if getattr(config.get_text_config(), "num_hidden_layers", None) is None:
        return config, []
    kinds = _layer_kinds(config)
    where = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in set(kinds)}
    last = sorted(i for layers in where.values() for i in layers[-2:])
    left_out = {kind: layers[:-2] for kind, layers in where.items() if layers[2:]}
    borrowing = getattr(config.get_text_config(), "num_kv_shared_layers", 0)
    if borrowing or len(last) + (len(last) + 1) * len(left_out) >= len(kinds):
        return config, []
    short = _with_layers(config, last)
    more = [(_with_layers(config, sorted([layers[-1], *last])), len(layers)) for layers in left_out.values()]
    found = _parameter_shapes(short, build)
    total = Counter(found)
    for longer, count in more:
        for shape, number in (_parameter_shapes(longer, build) - found).items():
            total[shape] += number * count
    return (short, more) if total == _parameter_shapes(config, build) else (config, [])


def causal(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model with random weights."""
    return AutoModelForCausalLM.from_config(config)


def classifier(config: PretrainedConfig) -> PreTrainedModel:
    """A sequence classifier with one label, fp32, as PPOTrainer loads a critic by its name."""
    return AutoModelForSequenceClassification.from_config(_one_label(config), dtype=torch.float32)


def _one_label(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def _by_layer(text_config: PretrainedConfig) -> dict[str, Sequence]:
    """What a config lists by layer."""
    count = text_config.num_hidden_layers
    return {
        name: value
        for name, value in vars(text_config).items()
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith("token_id")
    }


def _layer_kinds(config: PretrainedConfig) -> list[str]:
    text_config = config.get_text_config()
    lists = _by_layer(text_config).values()
    return [repr([values[i] for values in lists]) for i in range(text_config.num_hidden_layers)]


def _with_layers(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    for name, values in _by_layer(text_config).items():
        setattr(text_config, name, [values[i] for i in layers])
    text_config.num_hidden_layers = len(layers)
    return config


def _parameter_shapes(config: PretrainedConfig, build: Callable[[PretrainedConfig], PreTrainedModel]) -> Counter:
    with torch.device("meta"):
        model = build(config)
    return Counter((re.sub(r"\.\d+\.", ".*.", name), p.shape) for name, p in model.named_parameters())


def _mark_layers(model: PreTrainedModel, ledger: Ledger) -> None:
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


def _actor_critic(config: PretrainedConfig, setup: Setup, value_config: PretrainedConfig | None) -> ActorCritic:
    base = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    lora = LoraConfig(r=setup.lora_r, lora_alpha=2 * setup.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = cast(PeftModel, get_peft_model(base, lora))
    if setup.reward == "adapter":
        trained = [p for p in policy.parameters() if p.requires_grad]
        policy.add_adapter("reward", dataclasses.replace(lora, inference_mode=True, target_modules="all-linear"))
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(".reward." not in name and any(parameter is p for p in trained))
    value_model = None if value_config is None else classifier(value_config)
    actor = build_actor_critic(policy, critic=CriticSource(setup.critic, model=value_model))
    actor._fused_attention = []  # the choice between kernels for CPUs is not that of a card
    if setup.activation_checkpointing:
        actor.activation_checkpointing_enable()
    return actor


def count_parameters(actor: ActorCritic) -> dict[str, int]:
    """Parameters of the base by kind (embeddings, a tied head counted once; linear layers; others), and of a critic."""
    model = actor.language_model
    apart = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    counts = {"embeddings": 0, "linear": 0, "other": 0}
    if actor.value_model is not None:
        counts["critic"] = sum(p.numel() for p in actor.value_model.parameters())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            linear = ".base_layer." in name and parameter.ndim == 2
            counts["embeddings" if id(parameter) in apart else "linear" if linear else "other"] += parameter.numel()
    return counts


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of a key-value cache."""
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _without_data(actor: ActorCritic, ledger: Ledger) -> None:
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


class QuantizedLinear(nn.Module):
    """Stands in for a linear layer of bitsandbytes 0.50: its bytes, and what its forward and backward pass allocate.

    NF4 with double quantization (Dettmers et al. 2023, section 3) keeps half a byte per weight, one byte of scale
    per block of 64, and an fp32 scale per 256 of those; the kernels for more than a few tokens dequantize the whole
    weight first. LLM.int8 keeps a byte per weight and an fp32 scale per row, and the input for the backward pass.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        n, self.kind, self.shape, device = weight.numel(), kind, weight.shape, weight.device
        blocks = -(-n // 64)
        buffers = {
            "nf4": {"packed": (-(-n // 2), torch.uint8), "absmax": (blocks, torch.uint8),
                    "absmax2": (-(-blocks // 256), torch.float32), "codes": (16 + 256 + 1, torch.float32)},
            "int8": {"packed": (n, torch.int8), "absmax": (weight.shape[0], torch.float32)},
        }[kind]  # fmt: skip
        for name, (size, dtype) in buffers.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return cast(Tensor, _Dequantized.apply(x, self.packed, self.shape, self.bias, self.kind))


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size, bias: Tensor | None, kind: str) -> Tensor:
        ctx.shape = shape
        if kind == "int8":
            ctx.save_for_backward(x)
            _temporaries = x.to(torch.float16), x.new_empty(x.shape, dtype=torch.int8)
            return x.new_empty(*x.shape[:-1], shape[0])
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ grad.new_empty(ctx.shape), None, None, None, None


def _quantize(actor: ActorCritic, kind: str) -> None:
    """Put a stand-in under every LoRA layer; what bitsandbytes leaves alone, the output head, has none."""
    for layer in actor.modules():
        if isinstance(layer, LoraLayer):
            linear = layer.base_layer
            layer.base_layer = QuantizedLinear(linear.weight, linear.bias, kind)


def plan(config: PretrainedConfig, setup: Setup, vram: float, value_config: PretrainedConfig | None = None) -> Plan:
    """Predict memory by phase and propose the largest batch sizes that fit.

    Args:
        config: of a causal language model; no weights are read.
        setup: what to plan for.
        vram: of the card, GiB.
        value_config: of the critic's own model, where `setup.critic` is "separate".

    Returns:
        a plan; where not even single rows fit, one of single rows whose `fits` is False.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if vram * GIB <= CUDA_CONTEXT:
        raise ValueError(f"vram={vram} GiB is not more than a CUDA context takes ({CUDA_CONTEXT / GIB} GiB).")
    if context is not None and setup.prompt_length + setup.response_length > context:
        raise ValueError(
            f"prompt_length + response_length = {setup.prompt_length + setup.response_length} tokens are more than "
            f"this model's context of {context}: lower one of them."
        )
    if (setup.critic == "separate") != (value_config is not None):
        raise ValueError(
            "critic='separate' and a model for the critic go together (value_config, --value-model): give both or none."
        )
    budget = int((vram * GIB - CUDA_CONTEXT) * (1 - ALLOCATOR_SHARE))
    run, minibatch = predict(config, setup, value_config), setup.rollout_batch_size // setup.num_mini_batches
    generate = largest(run.generate, setup.rollout_batch_size, budget)
    score = largest(run.score, setup.rollout_batch_size, budget)
    learn = largest(run.learn, minibatch, budget)
    return Plan(run.parameters, (generate, score, learn), budget, setup, minibatch // learn.rows)


def largest(run: Callable[[int], Phase], most: int, budget: int) -> Phase:
    """The phase with the largest divisor of `most` rows that fits; with one row where none does."""
    one = run(1)
    if most == 1 or one.total > budget:
        return one
    per_row = max(run(2).total - one.total, 1)
    for rows in sorted((n for n in range(2, most + 1) if most % n == 0), reverse=True):
        # Memory is a straight line in rows but for rounding and logits that do not fill a chunk: the line saves the
        # runs that are far off, a run decides.
        if one.total + (rows - 1) * per_row <= 1.1 * budget and (phase := run(rows)).total <= budget:
            return phase
    return one


def table(found: Plan) -> str:
    """A plan as text."""
    counts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in found.parameters.items())
    lines = [f"Parameters: {counts}.", "", f"{'GiB':<14}" + "".join(f"{p.name:>10}" for p in found.phases)]
    for part in PARTS:
        lines.append(f"{part:<14}" + "".join(f"{p.parts[part] / GIB:>10.2f}" for p in found.phases))
    lines.append(f"{'together':<14}" + "".join(f"{p.total / GIB:>10.2f}" for p in found.phases))
    lines.append(f"{'rows at a time':<14}" + "".join(f"{p.rows:>10}" for p in found.phases))
    lines += ["", f"There are {found.budget / GIB:.2f} GiB for tensors: the card less {CUDA_CONTEXT / GIB} GiB for CUDA"
              f" and {ALLOCATOR_SHARE:.0%} of the rest for the allocator (both assumed)."]  # fmt: skip
    if found.fits:
        return "\n".join([*lines, "", "PPOConfig(" + ", ".join(f"{k}={v}" for k, v in found.sizes.items()) + ")"])
    over = max(found.phases, key=lambda phase: phase.total)
    lines += [
        "",
        f"This does not fit: with one row, {over.name} needs {(over.total - found.budget) / GIB:.2f} GiB more.",
    ]
    remedies = {
        "critic='shared'": found.setup.critic == "separate",
        "quantization='nf4'": found.setup.quantization != "nf4",
        "activation_checkpointing=True": over.name == "learn" and not found.setup.activation_checkpointing,
        "a shorter prompt or response": True,
    }
    return "\n".join([*lines, "Try " + ", ".join(remedy for remedy, helps in remedies.items() if helps) + "."])


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0 where the plan fits, else 1."""
    parser = argparse.ArgumentParser(prog="python -m ppo_plus.memory", description="Predict the memory of a PPO run.")
    parser.add_argument("--model", required=True, help="a name on the Hub, a folder, or a config.json")
    parser.add_argument("--vram", type=float, required=True, help="memory of the card, GiB")
    parser.add_argument("--value-model", help="of the critic, with --critic separate; given as --model is")
    parser.add_argument("--json", action="store_true", help="print JSON, bytes, in place of the table")
    for field in dataclasses.fields(Setup):
        name, choices = "--" + field.name.replace("_", "-"), get_args(_HINTS[field.name])
        if field.type == "bool":
            parser.add_argument(name, action="store_true")
        else:
            kind = str if choices else int
            parser.add_argument(name, type=kind, choices=choices or None, default=field.default, help="%(default)s")
    given = vars(parser.parse_args(arguments))
    names, vram, as_json = (given.pop("model"), given.pop("value_model")), given.pop("vram"), given.pop("json")
    try:
        config, value_config = (name and AutoConfig.from_pretrained(name) for name in names)
        found = plan(config, Setup(**given), vram, value_config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(json.dumps(as_dict(found)) if as_json else table(found))
    return 0 if found.fits else 1


def as_dict(found: Plan) -> dict[str, Any]:
    """A plan for JSON; bytes."""
    phases = {p.name: {**p.parts, "together": p.total, "rows": p.rows} for p in found.phases}
    return {
        "parameters": found.parameters, "phases": phases, "budget": found.budget, "fits": found.fits,
        "sizes": found.sizes, "setup": dataclasses.asdict(found.setup),
    }  # fmt: skip


_HINTS = get_type_hints(Setup)

if __name__ == "__main__":
    raise SystemExit(main())
