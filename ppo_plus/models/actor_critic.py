"""The weights: one frozen backbone in four roles, as actor, critic, reference and reward model.

The actor is the backbone with its LoRA adapter on; the reference is the same with it off; the critic is a value
head on the hidden states of the actor, of another adapter, or of a model of its own. Hidden states leave the backbone,
vocabulary logits never do: they exist for one chunk of response tokens at a time.

Passes over the backbone are in backbone_runner.py, decoding in generation.py, files in saving.py.

Notation: B rows, P prompt tokens (left-padded), R response tokens (right-padded), H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.critic_fields import Critic
from ..kernels.fp32_heads import apply_head
from ..kernels.frozen_layers import FrozenPrefix
from ..kernels.packing import NoPacking, Packing, SeqLens, make_packing
from ..kernels.shared_prompts import Prefixes
from ..kernels.switch import kernels_enabled, replace_forwards
from ..utils.contexts import evaluation_mode, set_attributes
from .adapter_loading import load_reward_adapter
from .adapters import (
    CRITIC_ADAPTER,
    REFERENCE_ADAPTER,
    active_adapter,
    frozen_layers_and_users,
    is_critic_parameter,
    keep_model_card,
    use_adapter,
)
from .backbone import move_if_movable, unwrap_peft
from .backbone_runner import BackboneRunner, TokenBatch
from .generation import sample_responses
from .logprobs import chunked_logprobs, head_is_frozen, logits_function
from .saving import load_actor_critic, save_actor_critic
from .score_heads import pool_last_token
from .value_head import ValueHead

ROLES = ("actor", "reference", "critic")  # and the names of reward adapters


@dataclass
class ActorCriticOutput:
    """Outputs of a forward pass, each `(B, R)` float32; `None` if not requested.

    Not a `ModelOutput`: that is a dict, and a field `values` would hide the method by which DDP reads it.
    """

    logprobs: Tensor = None  # type: ignore[assignment]
    values: Tensor = None  # type: ignore[assignment]
    entropy: Tensor = None  # type: ignore[assignment]


class ActorCritic(nn.Module):
    """A causal language model as policy, with a critic.

    Args:
        policy: a `PeftModel` (its adapter is the actor, its base the reference) or a plain causal language model
            that is trained in full.
        value_head: the critic's head.
        critic: source of the hidden states that the head reads: the actor ("shared"), the actor without gradients
            ("detached"), an adapter on the same base ("adapter"), or `value_model` ("separate").
        value_model: the critic's own model.
        ref_model: a separate reference model; required if the policy has no adapter.
        use_kernels: whether ppo_plus's kernels replace forwards; PPO_PLUS_KERNELS=0 turns them off too.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = False

    def __init__(
        self, policy: PreTrainedModel | PeftModel, value_head: ValueHead, *, critic: Critic = "shared",
        value_model: PreTrainedModel | PeftModel | None = None, ref_model: PreTrainedModel | None = None,
        use_kernels: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.value_head, self.critic, self.value_model = policy, value_head, critic, value_model
        # In a list so that the reference is no submodule: it is neither trained, saved, nor wrapped by DDP.
        self._ref_model = [] if ref_model is None else [ref_model.eval().requires_grad_(False)]
        self.use_kernels = kernels_enabled(use_kernels)
        replace_forwards(policy, self.use_kernels)
        for model in (policy, value_model):
            keep_model_card(model)
        # Whether a linear function of the reward adapter's scores is added to the values; its slope and intercept.
        self.uses_prefix_reward_baseline, self.reward_line = False, cast(tuple[float, float] | None, None)
        self._last_train_mode: bool | None = None  # unknown: an adapter may be in training and its base not
        self._role = "actor"
        self._frozen_cache: FrozenPrefix | None = None
        self._adapters_sharing_cache: set[str | None] = set()
        if not self.is_peft and ref_model is None:
            raise ValueError(
                "Full fine-tuning needs a reference that training does not change: pass ref_model, "
                "or peft_config to train an adapter whose base is the reference."
            )
        self.runner = BackboneRunner(self.transformers_models, self.use_kernels)

    # Attributes that Trainer and accelerate look up on a model

    @property
    def config(self) -> Any:
        """The configuration of the language model."""
        return self.policy.config

    @property
    def is_peft(self) -> bool:
        """Whether the actor is an adapter."""
        return isinstance(self.policy, PeftModel)

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal language model, with adapters injected where there are any."""
        return unwrap_peft(self.policy)

    @property
    def frozen_models(self) -> list[PreTrainedModel]:
        """Models whose weights may be frozen: the language model, and a separate reference."""
        return [self.language_model, *self._ref_model]

    @property
    def transformers_models(self) -> list[PreTrainedModel]:
        """All models of transformers inside: the policy, a separate reference and a separate critic."""
        return [*self.frozen_models, *([unwrap_peft(self.value_model)] if self.value_model else [])]

    @property
    def device(self) -> torch.device:
        """The device of the policy."""
        return self.policy.device

    @property
    def context(self) -> int | None:
        """Largest number of tokens in prompt and response together; None if the model has no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_embeddings(self) -> int:
        """Number of token ids that the language model has embeddings for."""
        return self.language_model.get_input_embeddings().weight.shape[0]

    @property
    def quantization_method(self) -> Any:
        """Set for a quantized backbone, which Trainer must not move."""
        return getattr(self.language_model, "quantization_method", None)

    @property
    def generation_config(self) -> Any:
        """The policy's generation defaults; never used for rollouts, and saved unchanged."""
        return self.language_model.generation_config

    @property
    def is_gradient_checkpointing(self) -> bool:
        """False: TRL would turn checkpointing off to generate, and `generate` runs in evaluation, without it."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate by the policy's own `transformers` method, without dropout; rollouts come from `sample`."""
        with evaluation_mode(self):
            return self.policy.generate(*args, **kwargs)

    def move_auxiliary_modules(self, device: torch.device) -> None:
        """Move modules that `Trainer` does not move: value head, reference and value model of a placed policy."""
        self.value_head.to(device)
        for model in (*self._ref_model, *([self.value_model] if self.value_model else [])):
            move_if_movable(model, device)
        self.runner.probe_moved_models()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tag the policy for the Hub."""
        self.language_model.add_model_tags(tags)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass, with the adapter of the forward pass."""
        options = kwargs.pop("activation_checkpointing_kwargs", None) or {}
        if self.critic == "adapter":
            options = {**options, "use_reentrant": False, "context_fn": self._checkpoint_context_fn}
        for model in [self.policy, *([self.value_model] if self.value_model else [])]:
            unwrap_peft(model).activation_checkpointing_enable(
                activation_checkpointing_kwargs=options or None, **kwargs
            )

    def compile_layers(self, **kwargs: Any) -> None:
        """Compile the decoder layers in place with `torch.compile`'s arguments; one graph serves all of them.

        Learning and scoring run compiled. Decoding does not: its shapes change with every token.
        """
        self.runner.compiled = True
        for module in [m for model in (self, *self._ref_model) for m in model.modules()]:
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=True, **kwargs)

    def _checkpoint_context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return contextlib.nullcontext(), use_adapter(self.policy, active_adapter(self.policy))

    def train(self, mode: bool = True) -> ActorCritic:
        """Switch between training and evaluation."""
        # Trainer calls this before every micro-batch, and adapters add thousands of modules.
        if mode == self._last_train_mode and all(child.training == mode for child in self.children()):
            return self
        self._last_train_mode = mode
        return super().train(mode)

    # Trained parameters

    def actor_parameters(self) -> list[nn.Parameter]:
        """List the parameters that the actor trains."""
        return [p for name, p in self.policy.named_parameters() if p.requires_grad and not is_critic_parameter(name)]

    def critic_parameters(self) -> list[nn.Parameter]:
        """List the parameters that the critic trains below its head, in an adapter or a separate model."""
        separate = [] if self.value_model is None else self.value_model.parameters()
        adapter = [p for name, p in self.policy.named_parameters() if p.requires_grad and is_critic_parameter(name)]
        return adapter + [p for p in separate if p.requires_grad]

    # Roles

    @contextlib.contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Context manager: run the model in one role; the previous role is restored, also after an error.

        Args:
            name: "actor"; "reference" (adapter off, its frozen copy `ref`, or `ref_model`); "critic" (the adapter or
                model whose hidden states the value head reads); or a reward adapter by its name.
        """
        with set_attributes(self, _role=name), self._activate_adapter(name):
            yield

    @property
    def active_model(self) -> PreTrainedModel:
        """The causal language model or classifier that the current role runs."""
        if self._role == "reference" and self._ref_model:
            return self._ref_model[0]
        if self._role == "critic" and self.value_model is not None:
            return unwrap_peft(self.value_model)
        return self.language_model

    def _activate_adapter(self, role: str) -> AbstractContextManager:
        if self.active_model is not self.language_model or (not self.is_peft and role in ("actor", "critic")):
            return contextlib.nullcontext()
        has_copy = REFERENCE_ADAPTER in cast(PeftModel, self.policy).peft_config
        adapters = {
            "actor": "default",
            "reference": REFERENCE_ADAPTER if has_copy else None,
            "critic": CRITIC_ADAPTER if self.critic == "adapter" else "default",
        }
        return use_adapter(self.policy, adapters.get(role, role))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float = 1.0,
        with_logprobs: bool = True, with_values: bool = True, with_entropy: bool = False,
        frozen_hidden_states: Tensor | None = None, response_mask: Tensor | None = None,
        seq_lens: SeqLens | None = None, prefixes: Prefixes | None = None,
    ) -> ActorCriticOutput:  # fmt: skip
        """Compute log-probabilities, values and entropies of the response tokens.

        One pass computes all, or two if the critic has its own adapter or model.

        Args:
            input_ids: prompt and response, `(B, P + R)` int64.
            attention_mask: 1 for real tokens, `(B, P + R)`.
            response_length: R; the last R positions are the response's.
            temperature: divides the logits, as it does in sampling.
            with_logprobs: compute `logprobs`; without them (nor entropies), no gradient flows into the actor.
            with_values: whether values are computed.
            with_entropy: whether entropies are computed.
            frozen_hidden_states: output of the method of that name for these rows; the pass starts there.
            response_mask: which of the last R positions to compute, `(B, R)` bool; the others are 0. All by default.
            seq_lens: sums of `attention_mask` and `response_mask` per row; with them the pass has no padding.
            prefixes: (prompt, tokens of the prompt) per row; the pass reads the prompt of several rows once.
        """
        batch = TokenBatch.without_last(input_ids, attention_mask, seq_lens, frozen_hidden_states, prefixes)
        packing = make_packing(response_mask, None if seq_lens is None else [response for _, response in seq_lens])
        with_actor, has_own_backbone = with_logprobs or with_entropy, self.critic in ("adapter", "separate")
        output, states = ActorCriticOutput(), cast(Tensor, None)
        if with_actor or not has_own_backbone:
            with contextlib.nullcontext() if with_actor else torch.no_grad():
                states = packing.pack(self._response_hidden_states(batch, response_length))
        if with_actor:
            targets = packing.pack(input_ids[:, -response_length:])
            logprobs, entropy = self._score_tokens(states, targets, temperature, with_entropy)
            output.logprobs = packing.unpack(logprobs)
            output.entropy = cast(Tensor, None if entropy is None else packing.unpack(entropy))
        if with_values:
            if has_own_backbone:
                with self.role("critic"):
                    states = packing.pack(self._response_hidden_states(batch, response_length))
            output.values = packing.unpack(self.value_head(states.detach() if self.critic == "detached" else states))
        return output

    def _score_tokens(
        self, states: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        head, frozen = logits_function(self.active_model), head_is_frozen(self.active_model)
        return chunked_logprobs(head, states, targets, temperature, with_entropy, frozen_head=frozen)

    def _response_hidden_states(self, batch: TokenBatch, response_length: int) -> Tensor:
        # Logits and values of token t come from the hidden state at position t - 1.
        packing = self.runner.packing(self.active_model, batch)
        with self._start_from_cached_layer(batch.frozen_hidden_states, packing):
            hidden = self.runner.last_hidden(self.active_model, batch.input_ids, batch.attention_mask, packing)
        return packing.unpack_last(hidden, response_length)

    # Frozen layers, run once per rollout

    @property
    def num_cached_layers(self) -> int:
        """Number of lowest layers that run once per rollout and not in every pass."""
        return 0 if self._frozen_cache is None else self._frozen_cache.count

    def enable_frozen_layer_cache(self) -> None:
        """Run the layers below all trained ones once per rollout, if there are any."""
        count, self._adapters_sharing_cache = frozen_layers_and_users(self.language_model)
        if self.is_peft and count >= 1:
            self._frozen_cache = self.runner.frozen_prefix(self.language_model, count)

    def frozen_hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, seq_lens: SeqLens | None = None,
        prefixes: Prefixes | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the input of the lowest layer that runs in every pass, `(B, P + R - 1, H)`.

        It is the same for all roles. Arguments are those of `forward`.
        """
        batch = TokenBatch.without_last(input_ids, attention_mask, seq_lens, prefixes=prefixes)
        packing, cache = self.runner.packing(self.active_model, batch), cast(FrozenPrefix, self._frozen_cache)
        return packing.unpack(cache.compute(batch.input_ids, batch.attention_mask, packing))

    def _start_from_cached_layer(self, states: Tensor | None, packing: Packing | NoPacking) -> AbstractContextManager:
        # Other models, and adapters with layers below the cached one, run all layers.
        if self._frozen_cache is None or states is None or self.active_model is not self.language_model:
            return contextlib.nullcontext()
        shared = active_adapter(self.policy) in self._adapters_sharing_cache
        return self._frozen_cache.override(packing.pack(states)) if shared else contextlib.nullcontext()

    sample = sample_responses

    def load_reward_adapter(self, name: str, directory: str | Path) -> nn.Linear:
        """Load a reward adapter onto this backbone, and return its frozen score head, H to 1."""
        if not isinstance(self.policy, PeftModel):
            raise ValueError(
                "A reward adapter shares the actor's frozen base, but this actor is trained in full: pass "
                "peft_config, or load the reward model by itself and pass the instance."
            )
        head = load_reward_adapter(self.policy, name, Path(directory)).to(self.device)
        replace_forwards(self.policy, self.use_kernels)  # of layers that only this adapter has
        return head

    def reward_scores(
        self, name: str, head: nn.Linear, input_ids: Tensor, attention_mask: Tensor, pad_token_id: int | None = None
    ) -> Tensor:
        """Score whole texts by a reward adapter, `(B,)` float32, reward units; arguments as of `prefix_rewards`.

        Args:
            pad_token_id: as of `pool_last_token`.
        """
        return pool_last_token(
            self.prefix_rewards(name, head, input_ids, attention_mask), input_ids, attention_mask, pad_token_id
        )

    def prefix_rewards(
        self,
        name: str,
        head: nn.Linear,
        input_ids: Tensor,
        attention_mask: Tensor,
        lengths: Sequence[int] | None = None,
        prefixes: Prefixes | None = None,
    ) -> Tensor:
        """Score every prefix of texts by a reward adapter, `(B, L)` float32, reward units.

        Args:
            name: the adapter, as loaded.
            head: its score head.
            input_ids: `(B, L)` int64, padded on either side.
            attention_mask: 1 for real tokens, `(B, L)`.
            lengths: real tokens of each row; with them the pass has no padding.
            prefixes: (group, first tokens that all rows of the group share) per row; the pass reads them once.
        """
        batch = TokenBatch(input_ids, attention_mask, lengths, prefixes=prefixes)
        with self.role(name):
            packing = self.runner.packing(self.active_model, batch)
            hidden = self.runner.last_hidden(self.active_model, input_ids, attention_mask, packing)
        return packing.unpack(apply_head(hidden, head.weight, head.bias)).squeeze(-1)

    # On disk

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Write adapter or model, value head, and a critic's own weights; see `save_actor_critic`."""
        save_actor_critic(self, Path(directory))

    def load_weights(self, directory: str | Path) -> None:
        """Read into this model what `save_pretrained` wrote; nothing missing, nothing left over."""
        load_actor_critic(self, Path(directory))
