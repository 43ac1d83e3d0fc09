"""The weights: one frozen backbone that plays actor, critic, reference and reward model.

The actor is the backbone with its LoRA adapter on; the reference is the same with it off; the critic is a value
head on the hidden states of the actor, of another adapter, or of a model of its own. Hidden states leave the backbone,
vocabulary logits never do: they exist for one chunk of response tokens at a time.

Notation: B rows, P prompt tokens (left-padded), R response tokens (right-padded), H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..algo.logprobs import token_logprobs
from ..algo.prefix_reward_baseline import REWARD_LINE, saved_reward_line
from ..kernels.cpu_attention import SDPA, select_attention
from ..kernels.fp32_heads import apply_head
from ..kernels.frozen_layers import FrozenPrefix, num_leading_frozen_layers, relative_error
from ..kernels.lora import autocast_dtype, cached_lora_weights, patch_lora_forward
from ..kernels.packing import (
    MAX_UNPACKED_PADDING,
    NO_PACKING,
    NoPacking,
    Packing,
    SeqLens,
    make_packing,
    packing_context,
)
from ..kernels.rmsnorm import patch_rmsnorm
from ..utils.devices import float64_device
from ..utils.files import reraise_as_corrupt_file
from .adapter_loading import explain_state_dict_mismatch, load_reward_adapter
from .adapters import active_adapter, is_adapter_parameter, use_adapter
from .backbone import (
    backbone_interface,
    cache_of,
    check_head,
    check_padding,
    is_probed_on,
    is_recurrent,
    move_if_movable,
    unwrap_peft,
)
from .generation import GenerateOutput, select_rows
from .logprobs import chunked_logprobs, head_is_frozen, logits_function, sample
from .saving import load_model, save_model
from .value_head import VALUE_HEAD_FILE, ValueHead

VALUE_MODEL = "value_model"


REFERENCE_ADAPTER, CRITIC_ADAPTER = "ref", "critic"


Critic = Literal["shared", "detached", "adapter", "separate"]


@dataclass
class ActorCriticOutput:
    """What the learning phase needs of a forward pass, each `(B, R)` float32; `None` where it was not asked for.

    No `ModelOutput`: that is a dict, and a field `values` would hide the method by which DDP reads it.
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
        critic: whose hidden states the head reads: the actor's ("shared"), the actor's with no gradient flowing back
            ("detached"), those of an adapter on the same base ("adapter"), or those of `value_model` ("separate").
        value_model: the critic's own model.
        ref_model: a separate reference model; needed where there is no adapter to switch off.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = False

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value_head: ValueHead,
        *,
        critic: Critic = "shared",
        value_model: PreTrainedModel | PeftModel | None = None,
        ref_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.value_head, self.critic, self.value_model = policy, value_head, critic, value_model
        # In a list so that the reference is no submodule: it is neither trained, saved, nor wrapped by DDP.
        self._ref_model = [] if ref_model is None else [ref_model.eval().requires_grad_(False)]
        patch_lora_forward(policy)
        patch_rmsnorm(policy)
        self.uses_prefix_reward_baseline = (
            False  # whether values are the head's plus a line through the reward adapter's scores
        )
        self.reward_line: tuple[float, float] | None = None  # its slope and intercept; None where the head is the value
        self._compiled = False
        self._last_train_mode: bool | None = None  # not known: an adapter may be in training and its base not
        self._active_model: PreTrainedModel = self.language_model
        self._frozen_cache: FrozenPrefix | None = None
        self._roles_sharing_cache: set[str | None] = set()
        models = self.transformers_models
        self._sdpa_models = [m for m in models if m.config.get_text_config()._attn_implementation == SDPA]
        if not self.is_peft and ref_model is None:
            raise ValueError(
                "Full fine-tuning needs a reference that training does not change: pass ref_model, "
                "or peft_config to train an adapter whose base is the reference."
            )
        self._packable_models: list[PreTrainedModel] = []
        self._probe_models()

    # What Trainer and accelerate look up on a model.

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
        """The models whose weights training leaves as they are, among adapters: the base, or a separate reference."""
        return [self.language_model, *self._ref_model]

    @property
    def transformers_models(self) -> list[PreTrainedModel]:
        """All models of transformers in here: the policy, a reference and a critic of their own."""
        return [*self.frozen_models, *([unwrap_peft(self.value_model)] if self.value_model else [])]

    @property
    def device(self) -> torch.device:
        """The device of the policy."""
        return self.policy.device

    @property
    def context(self) -> int | None:
        """Most tokens that prompt and response may have together; None where the model has no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_embeddings(self) -> int:
        """How many token ids the language model has embeddings for."""
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
        """What TRL asks before a model generates, to turn it off: `generate` evaluates, where it does nothing."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answers of the policy by its own `generate`, without dropout: to look at, as rollouts come from `sample`.

        Args:
            args: what `transformers.GenerationMixin.generate` takes.
            kwargs: likewise, such as `**tokenizer(...)`, `max_new_tokens` and `do_sample`.
        """
        training = self.training
        self.eval()
        try:
            return self.policy.generate(*args, **kwargs)
        finally:
            self.train(training)

    def move_auxiliary_modules(self, device: torch.device) -> None:
        """Move what Trainer does not: the reference, and what hangs on a policy that is placed already."""
        self.value_head.to(device)
        for model in (*self._ref_model, *([self.value_model] if self.value_model else [])):
            move_if_movable(model, device)
        if not all([is_probed_on(model, model.device) for model in self.transformers_models]):
            self._probe_models()

    def _probe_models(self) -> None:
        """Refuse models that compute something else in a batch, or with a cache, than of a row by itself."""
        check_head(self.language_model)
        for model in self.transformers_models[1:]:
            check_padding(model)
        self._packable_models = [m for m in self._sdpa_models if self._probe_packing(m)]

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tag the policy for the Hub."""
        self.language_model.add_model_tags(tags)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass, with the adapter that spoke in the forward pass."""
        given = kwargs.pop("activation_checkpointing_kwargs", None) or {}
        if self.critic == "adapter":
            given = {**given, "use_reentrant": False, "context_fn": self._checkpoint_context_fn}
        for model in [self.policy, *([self.value_model] if self.value_model else [])]:
            unwrap_peft(model).activation_checkpointing_enable(activation_checkpointing_kwargs=given or None, **kwargs)

    def compile_layers(self, **kwargs: Any) -> None:
        """Compile the decoder layers in place, each by itself: they are alike, so one graph serves all of them.

        Learning and scoring run compiled. Decoding does not: its shapes change with every token.

        Args:
            kwargs: what `torch.compile` takes, such as `backend` and `mode`.
        """
        self._compiled = True
        for module in [m for model in (self, *self._ref_model) for m in model.modules()]:
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=True, **kwargs)

    def _checkpoint_context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return contextlib.nullcontext(), use_adapter(self.policy, active_adapter(self.policy))

    def train(self, mode: bool = True) -> ActorCritic:
        """Switch between training and evaluation; Trainer asks before every micro-batch, mostly for what is so already.

        With adapters there are thousands of modules to ask.
        """
        if mode == self._last_train_mode and all(child.training == mode for child in self.children()):
            return self
        self._last_train_mode = mode
        return super().train(mode)

    # What is trained.

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the actor trains."""
        return [p for name, p in self.policy.named_parameters() if p.requires_grad and not is_critic_parameter(name)]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critic trains below its head: an adapter or a model of its own; empty where it has neither."""
        own = [] if self.value_model is None else self.value_model.parameters()
        adapter = [p for name, p in self.policy.named_parameters() if p.requires_grad and is_critic_parameter(name)]
        return adapter + [p for p in own if p.requires_grad]

    # The four roles.

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        temperature: float = 1.0,
        with_logprobs: bool = True,
        with_values: bool = True,
        with_entropy: bool = False,
        frozen_hidden_states: Tensor | None = None,
        response_mask: Tensor | None = None,
        seq_lens: SeqLens | None = None,
    ) -> ActorCriticOutput:
        """Log-probabilities, values and entropies of the response tokens.

        One pass over the backbone, and a second one where the critic has an adapter or a model of its own. Where
        `seq_lens` says that rows are of unequal length, the pass has no padding.

        Args:
            input_ids: prompt and response, `(B, P + R)` int64.
            attention_mask: 1 for real tokens, `(B, P + R)`.
            response_length: R, how many of the last positions are the response.
            temperature: divides the logits, as it does in sampling.
            with_logprobs: compute `logprobs`; without them (nor entropies), nothing flows back into the actor.
            with_values: compute `values`.
            with_entropy: compute `entropy`; differentiable, so ask for it only where it is used.
            frozen_hidden_states: of these rows, as the method of that name gives them; a pass goes on from there.
            response_mask: which of the last R positions to compute, `(B, R)` bool; the others are 0. All by default.
            seq_lens: of each row, as `LeftPaddedLayout.seq_lens` has them: the sums of `attention_mask` and
                `response_mask`.
        """
        output, states = ActorCriticOutput(), None
        answers = make_packing(response_mask, None if seq_lens is None else [response for _, response in seq_lens])
        actor, own = with_logprobs or with_entropy, self.critic in ("adapter", "separate")
        inputs = (input_ids, attention_mask, response_length, frozen_hidden_states, seq_lens)
        if actor or not own:
            with contextlib.nullcontext() if actor else torch.no_grad():
                states = self._response_hidden_states(*inputs)
        if states is not None and actor:
            targets = input_ids[:, -response_length:]
            logprobs, entropy = chunked_logprobs(
                logits_function(self._active_model), answers.pack(states), answers.pack(targets), temperature,
                with_entropy, frozen_head=head_is_frozen(self._active_model),
            )  # fmt: skip
            output.logprobs = answers.spread(logprobs)
            output.entropy = None if entropy is None else answers.spread(entropy)  # type: ignore[assignment]
        if with_values:
            if own:
                with self._critic_role():
                    states = self._response_hidden_states(*inputs)
            states = answers.pack(cast(Tensor, states))
            output.values = answers.spread(self.value_head(states.detach() if self.critic == "detached" else states))
        return output

    @contextlib.contextmanager
    def _critic_role(self) -> Iterator[None]:
        if self.value_model is None:
            with use_adapter(self.policy, CRITIC_ADAPTER):
                yield
        else:
            with self._use_model(unwrap_peft(self.value_model)):
                yield

    @contextlib.contextmanager
    def _use_model(self, model: PreTrainedModel) -> Iterator[None]:
        self._active_model = model
        try:
            yield
        finally:
            self._active_model = self.language_model

    def _response_hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, response_length: int, frozen_hidden_states: Tensor | None,
        seq_lens: SeqLens | None,
    ) -> Tensor:  # fmt: skip
        # The state before token t is the hidden state one position to its left; after the last token nothing is asked.
        packing = self._packing(attention_mask[:, :-1], lengths_without_last(seq_lens))
        with self._start_from_cached_layer(
            None if frozen_hidden_states is None else packing.pack(frozen_hidden_states)
        ):
            hidden = self._last_hidden(input_ids[:, :-1], attention_mask[:, :-1], packing)
        return packing.spread(hidden)[:, -response_length:]

    # Layers that no adapter reaches.

    @property
    def num_cached_layers(self) -> int:
        """How many of the lowest layers run once per rollout and not in every pass."""
        return 0 if self._frozen_cache is None else self._frozen_cache.count

    def enable_frozen_layer_cache(self) -> None:
        """From here on, let the layers below all that is trained run once per rollout, if there are any."""
        model, policies = self.language_model, ("default", REFERENCE_ADAPTER)

        def is_actor_parameter(name: str, parameter: nn.Parameter) -> bool:
            adapted = any(is_adapter_parameter(name, adapter) for adapter in policies)
            return adapted or (parameter.requires_grad and not is_critic_parameter(name))

        trained = num_leading_frozen_layers(model, is_actor_parameter)
        count = min(trained, model.config.get_text_config().num_hidden_layers - 1)
        if not self.is_peft or count < 1:
            return
        critic = num_leading_frozen_layers(model, lambda name, _: is_critic_parameter(name))
        self._roles_sharing_cache = {None, "default", REFERENCE_ADAPTER, *([CRITIC_ADAPTER] if critic >= count else [])}
        training = model.training
        model.eval()
        try:
            self._frozen_cache = FrozenPrefix(model.base_model, count, self._last_hidden)
        except ValueError as error:
            warnings.warn(f"All layers of {type(model).__name__} run in every pass: {error}.", stacklevel=2)
        finally:
            model.train(training)

    def frozen_hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, seq_lens: SeqLens | None = None
    ) -> Tensor:
        """What enters the lowest layer that runs in every pass: `(B, P + R - 1, H)`, the same for all roles.

        Args:
            input_ids: prompt and response, `(B, P + R)` int64; nothing is asked after its last token.
            attention_mask: 1 for real tokens, `(B, P + R)`.
            seq_lens: as `forward` takes them.
        """
        ids, mask = input_ids[:, :-1], attention_mask[:, :-1]
        packing = self._packing(mask, lengths_without_last(seq_lens))
        return packing.spread(cast(FrozenPrefix, self._frozen_cache).states(ids, mask, packing))

    def _start_from_cached_layer(self, frozen_hidden_states: Tensor | None) -> AbstractContextManager:
        # Who is another model, or has an adapter further down, runs all layers.
        if self._frozen_cache is None or frozen_hidden_states is None or self._active_model is not self.language_model:
            return contextlib.nullcontext()
        shared = active_adapter(self.policy) in self._roles_sharing_cache
        return self._frozen_cache.given(frozen_hidden_states) if shared else contextlib.nullcontext()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model speaks as the reference: adapter off, or the frozen copy named `ref`, or `ref_model`."""
        if self._ref_model:
            with self._use_model(self._ref_model[0]):
                yield
        else:
            frozen = REFERENCE_ADAPTER in cast(PeftModel, self.policy).peft_config
            with use_adapter(self.policy, REFERENCE_ADAPTER if frozen else None):
                yield

    def sample(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        uniforms: Tensor,
        *,
        stop_ids: Sequence[int],
        pad_token_id: int,
        temperature: float = 1.0,
        logits_processor: Callable[[Tensor], Tensor] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> GenerateOutput:
        """Sample responses from the distribution that `forward` scores.

        No `GenerationConfig` takes part: it would fill unset fields from the model's own (`top_k=50`, a repetition
        penalty), and the policy that is sampled would not be the one that is scored. Rows that finished leave the
        batch, so time follows the tokens generated.

        Args:
            input_ids: prompts, `(B, P)` int64, left-padded.
            attention_mask: 1 for real tokens, `(B, P)`.
            uniforms: uniform numbers that decide each token, `(B, R)` float64; R is the longest response.
            stop_ids: ids that end a response.
            pad_token_id: fills the positions after the stop token.
            temperature: divides the logits.
            logits_processor: maps logits at the temperature, `(B, V)`, to the logits sampled from (top-k and the like).
            on_step: called at each decode step with the number of rows that get a token in it.
        """
        # Asked of dynamo only where it was loaded anyway.
        eager = torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext()
        with cached_lora_weights(self.policy), eager, self._disable_redundant_autocast():
            return self._decode(
                input_ids, attention_mask, uniforms, stop_ids, pad_token_id, temperature, logits_processor, on_step
            )

    def _disable_redundant_autocast(self) -> AbstractContextManager:
        # To a model in that dtype it does nothing but take time, and cast what was left in fp32 on purpose.
        kind = self.device.type
        idle = autocast_dtype(kind) == self._active_model.dtype
        return torch.autocast(kind, enabled=False) if idle else contextlib.nullcontext()

    def _decode(
        self, input_ids: Tensor, mask: Tensor, uniforms: Tensor, stop_ids: Sequence[int], pad_token_id: int,
        temperature: float, logits_processor: Callable[[Tensor], Tensor] | None, on_step: Callable[[int], None] | None,
    ) -> GenerateOutput:  # fmt: skip
        (rows, length), device = uniforms.shape, input_ids.device
        tokens = torch.full((rows, length), pad_token_id, dtype=torch.int64, device=device)
        logprobs = torch.zeros(rows, length, device=device)
        stop = torch.tensor(list(stop_ids), device=device)
        head, uniforms = logits_function(self._active_model), uniforms.to(float64_device(device))
        alive, cache, step_ids = torch.arange(rows, device=device), None, input_ids
        for t in range(length):
            if on_step is not None:
                on_step(len(alive))
            outputs = self._hidden_states(step_ids, mask, use_cache=True, cache=cache)
            cache = cache_of(outputs)
            logits = head(outputs.last_hidden_state[:, -1]).float()
            logits = logits if temperature == 1 else logits / temperature
            token = sample(
                logits if logits_processor is None else logits_processor(logits), uniforms[alive.to(uniforms.device), t]
            )
            tokens[alive, t], logprobs[alive, t] = token, token_logprobs(logits, token)
            going = ~torch.isin(token, stop)
            left = int(going.sum())  # asked once: each time the host waits for the device
            if left == 0:
                break
            if left < len(alive):
                keep = going.nonzero().squeeze(-1)
                select_rows(cache, keep)
                alive, token, mask = alive[keep], token[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            step_ids = token[:, None]
        return GenerateOutput(tokens, logprobs)

    def load_reward_adapter(self, name: str, directory: str | Path) -> nn.Linear:
        """Load a reward adapter onto this backbone, next to the actor's.

        Args:
            name: what the adapter is called here.
            directory: an adapter of `AutoModelForSequenceClassification` with one label, as `RewardTrainer` saves it.

        Returns:
            its score head, H to 1, frozen.
        """
        if not isinstance(self.policy, PeftModel):
            raise ValueError(
                "A reward adapter shares the actor's frozen base, but this actor is trained in full: pass "
                "peft_config, or load the reward model by itself and pass the instance."
            )
        return load_reward_adapter(self.policy, name, Path(directory)).to(self.device)

    def reward_scores(
        self, name: str, head: nn.Linear, input_ids: Tensor, attention_mask: Tensor, pad_token_id: int | None = None
    ) -> Tensor:
        """Scores of whole texts by a mounted reward adapter, `(B,)` float32, reward units.

        Args:
            name: the adapter, as mounted.
            head: its score head.
            input_ids: `(B, L)` int64, padded on either side.
            attention_mask: `(B, L)`.
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
    ) -> Tensor:
        """Scores by a mounted reward adapter of every text as far as each of its tokens, `(B, L)` float32.

        Args:
            name: the adapter, as mounted.
            head: its score head.
            input_ids: `(B, L)` int64.
            attention_mask: `(B, L)`.
            lengths: real tokens by row; with them, there is no padding in the pass.
        """
        packing = self._packing(attention_mask, lengths)
        with use_adapter(self.policy, name):
            hidden = self._last_hidden(input_ids, attention_mask, packing)
        return packing.spread(apply_head(hidden, head.weight, head.bias)).squeeze(-1)

    def _packing(self, attention_mask: Tensor, lengths: Sequence[int] | None) -> Packing | NoPacking:
        # A compiler would make a graph for each number of rows and tokens.
        if self._compiled or self._active_model not in self._packable_models:
            return NO_PACKING
        return make_packing(attention_mask, lengths, MAX_UNPACKED_PADDING)

    @torch.no_grad()
    def _probe_packing(self, model: PreTrainedModel) -> bool:
        """Whether a packed pass over this model gives the numbers of a padded one."""
        if model.device.type == "meta":
            return False
        ids = torch.tensor([[1, 1, 1, 2, 3, 1], [3, 2, 1, 3, 1, 2], [2, 1, 3, 3, 1, 1]], device=model.device)
        mask = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=model.device)
        packing, training = Packing(mask, [2, 6, 3]), model.training
        model.eval()
        try:
            with self._use_model(model):
                found = packing.spread(self._last_hidden(ids, mask, packing))
                expected = self._last_hidden(ids, mask)  # and last: it leaves the model's attention as it was
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
            return False
        finally:
            model.train(training)
        # Kernels for 4-bit weights add up otherwise for fewer rows; what is no rounding is as large as the states are.
        return not relative_error(found, expected, mask, half=0.2)

    def _last_hidden(
        self, input_ids: Tensor, attention_mask: Tensor, packing: Packing | NoPacking = NO_PACKING
    ) -> Tensor:
        """Last hidden states of the backbone, `(B, L, H)`, or those of the real tokens, `(1, T, H)`."""
        return cast(Tensor, self._hidden_states(input_ids, attention_mask, packing).last_hidden_state)

    def _hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, packing: Packing | NoPacking = NO_PACKING, *,
        use_cache: bool = False, cache: Cache | None = None,
    ) -> Any:  # fmt: skip
        backbone, interface = self._active_model.base_model, backbone_interface(self._active_model)
        if self._active_model in self._sdpa_models:
            select_attention(backbone, input_ids.shape[1], attention_mask.shape[1], packing is not NO_PACKING)
        kwargs: dict[str, Any] = {"use_cache": use_cache}
        if interface.takes_positions:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = packing.pack(positions[:, -input_ids.shape[1] :])
        input_ids = packing.pack(input_ids)
        if packing is not NO_PACKING:
            attention_mask = torch.ones_like(input_ids)
        if cache is not None:
            kwargs[cast(str, interface.cache_name)] = cache
            if is_recurrent(cache):
                attention_mask = attention_mask[:, -input_ids.shape[1] :]
        with packing_context(packing):
            return backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    # On disk: a plain adapter (or model), and the critic beside it.

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Write the adapter as PEFT does (or the whole model where there is none) and `value_head.safetensors`.

        A critic's own adapter goes to the folder `critic`, its own model to `value_model`; the header of the head's
        file has the slope and intercept of a reward baseline, `reward_line`.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(self.policy, PeftModel):
            adapters = ["default", CRITIC_ADAPTER] if self.critic == "adapter" else ["default"]
            self.policy.save_pretrained(str(directory), selected_adapters=adapters)
        else:
            save_model(self.policy, directory)
        if self.value_model is not None:
            save_model(self.value_model, directory / VALUE_MODEL)
        head = {name: tensor.contiguous() for name, tensor in self.value_head.state_dict().items()}
        line = {} if self.reward_line is None else {REWARD_LINE: json.dumps(self.reward_line)}
        save_file(head, directory / VALUE_HEAD_FILE, metadata={"format": "pt", **line})

    def load_weights(self, directory: str | Path) -> None:
        """Read into this model what `save_pretrained` wrote; nothing missing, nothing left over."""
        directory = Path(directory)
        head_file = directory / VALUE_HEAD_FILE
        if not head_file.is_file():
            raise ValueError(f"{directory} has no {VALUE_HEAD_FILE}: it was not written by ppo_plus, or not finished.")
        load_model(self.policy, directory)
        if self.critic == "adapter":
            load_model(self.policy, directory / CRITIC_ADAPTER, CRITIC_ADAPTER)
        if self.value_model is not None:
            load_model(self.value_model, directory / VALUE_MODEL)
        with reraise_as_corrupt_file(head_file):
            head = load_file(head_file)
        with explain_state_dict_mismatch(
            f"The value head in {directory}", "Use the same base, value_head and value_head_activation."
        ):
            self.value_head.load_state_dict(head)
        self.reward_line = saved_reward_line(head_file)


def is_critic_parameter(parameter: str) -> bool:
    """Whether a parameter of that name is one of the critic's adapter."""
    return is_adapter_parameter(parameter, CRITIC_ADAPTER)


def lengths_without_last(seq_lens: SeqLens | None) -> list[int] | None:
    """Tokens by row of a pass that leaves out the last token of each."""
    return None if seq_lens is None else [tokens - 1 for tokens, _ in seq_lens]


def pool_last_token(
    scores: Tensor, input_ids: Tensor, attention_mask: Tensor, pad_token_id: int | None = None
) -> Tensor:
    """Gather from scores `(B, L)` the one at each row's last token, `(B,)`, with padding on either side.

    Args:
        scores: at every position.
        input_ids: `(B, L)` int64.
        attention_mask: 1 for real tokens, `(B, L)`.
        pad_token_id: the padding token in the configuration of the reward model itself. A sequence classifier of
            transformers passes over it at the end of a text, where it may be EOS, a real token. None passes over none.
    """
    real = attention_mask.bool()
    if pad_token_id is not None:
        real = real & (input_ids != pad_token_id)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (positions * real).argmax(-1, keepdim=True)
    return scores.gather(1, last).squeeze(1)
