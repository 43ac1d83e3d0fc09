"""Measures what ppo_plus can do with every causal decoder of the installed transformers, on tiny random models.

    python benchmarks/architectures.py [--only llama gpt2] [--seconds 120] [--out FILE]

Every number of ppo_plus is compared with the plain transformers model on each row alone, without padding, cache,
packing or adapters. Every model runs in a process of its own under a time limit. Results go to
`benchmarks/results/architectures.json`, and from there `benchmarks/tables.py` puts the table into
`docs/supported_models.md`.

A cell is "yes", "no: ..." (ppo_plus takes the model, and its numbers differ), "refused: ..." (ppo_plus or a library
below says why it does not), or "slow: ..." (right, on a path without the shortcut).
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from _utils import ROOT, describe_machine
from peft import LoraConfig, get_peft_model
from tables import ARCHITECTURE_COLUMNS as COLUMNS
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.kernels.frozen_layers import decoder_layers
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.classifier import load_classifier, set_padding
from ppo_plus.models.loading import CriticSpec, build_actor_critic, load_policy

RESULT = ROOT / "benchmarks" / "results" / "architectures.json"

# The sizes of tiny models, by the names that configurations give them. Windows and chunks are shorter than rows.
VOCABULARY, LENGTH = 64, 128
SIZES_BY_VALUE: dict[float, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size ngram_vocab_size_base",
    32: "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim embedding_dim lru_width mamba_d_ssm "
        "input_embedding_size output_embedding_size backbone_hidden_size",
    48: "intermediate_size ffn_dim dff dim_ff d_inner ffn_hidden_size dense_intermediate_size intermediate_size_mlp "
        "decoder_ffn_dim encoder_ffn_dim n_inner block_ff_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size attention_head_dim image_size "
        "index_n_heads",  # many: with few, scores of an indexer are 0 for many tokens, and its top-k is arbitrary
    8: "head_dim dim_head d_head swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank q_lora_rank "
       "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim index_head_dim "
       "hidden_size_per_layer_input o_lora_rank query_pre_attn_scalar global_head_dim loop_gate_rank hc_lowrank "
       "adapter_rank router_hidden_size time_step_rank mamba_dt_rank gated_norm_rank d_rel ple_embed_dim kv_channels "
       "patch_size",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
       "swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads num_experts "
       "n_routed_experts num_local_experts moe_num_experts laurel_rank rotary_dim state_size mamba_d_state "
       "ssm_state_size sliding_window sliding_window_size window_size local_attention attention_window_size "
       "attention_chunk_size chunk_size mamba_chunk_size block_size index_block_size zero_expert_num",
    2: "num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_kv_heads num_query_groups moe_k moe_topk "
       "num_experts_per_tok num_experts_per_token index_topk_blocks num_codebooks o_groups n_layer "
       "n_mamba_heads",
    3: "conv_L_cache conv_kernel mamba_d_conv index_topk linear_conv_kernel_dim",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups depth",
    LENGTH: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length rel_extent "
            "max_target_positions max_source_positions original_max_position_embeddings",
    0.2: "initializer_range init_std",
}  # fmt: skip
SIZES = {name: value for value, names in SIZES_BY_VALUE.items() for name in names.split()}
COUNTS_OF_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks"
)  # fmt: skip
HEADS = {
    "num_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "linear_num_key_heads": "linear_num_value_heads",
}
FIXED = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
MIXED = ["sliding_attention", "full_attention"]
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_expand": 2}
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
# What a configuration needs beside that.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA_HEADS, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "doge": {"keep_window_size": LENGTH},  # beyond, it keeps tokens of the largest scores: among equal tokens, any
    "dory": {
        "num_hidden_layers": 4, "layer_types": MIXED * 2, "n_input_layers": 1, "n_output_layers": 1,
        "n_recurrent_layers": 2,
    },
    "bert-generation": {"is_decoder": True},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
    },
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2},
    "granitemoehybrid": {**MAMBA_HEADS, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "llama4_text": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "mixtral": {"sliding_window": 4},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "qwen4_exp_text": {
        **HALF_LINEAR, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "xlstm": {"num_heads": 2, "hidden_size": 128, "embedding_dim": 128},
    "zamba": {"attention_hidden_size": 64, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Rows of a batch: prompts of unequal length, the longest beyond every window, and answers that end at unequal steps.
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 20, 21, 22, 23], [15], [16, 17, 18, 19, 20, 30]]
STOPS, STEPS, TEMPERATURE = [2, *range(10, 20)], 12, 0.7
# Nats. Rounding of fp32 is a tenth of it; what is computed differently is above it.
TOLERANCE = 2e-4


def swept() -> list[str]:
    """One `model_type` for each class of a causal decoder: no encoder, and no half of an encoder-decoder."""
    by_class: dict[str, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            continue
        family = re.sub("(ForCausalLM|LMHeadModel|ForConditionalGeneration|LMHead)$", "", name)
        own = CONFIG_MAPPING[kind].__name__ in (f"{family}TextConfig", f"{family}Config")
        if name not in by_class or (own and (kind.endswith("_text") or kind.replace("_", "") == family.lower())):
            by_class[name] = kind
    return sorted(by_class.values())


def tiny_sizes(cls: Any) -> dict[str, Any]:
    """Choose arguments that make a configuration of this class tiny and keep one layer of each kind it has."""
    special = SPECIAL.get(cls.model_type, {})
    default = {name: value for name, value in vars(cls()).items() if not name.startswith("_")}
    counts = [default[name] for name in COUNTS_OF_LAYERS if isinstance(default.get(name), int)]
    by_layer = {n: v for n, v in default.items() if isinstance(v, list) and len(v) == (counts or [len(v)])[0] > 2}
    layers = layers_of_each_kind(by_layer, (counts or [2])[0])
    sizes: dict[str, Any] = {}
    for name, value in default.items():
        if name in by_layer:
            sizes[name] = [value[i] for i in layers]
        elif name in COUNTS_OF_LAYERS and isinstance(value, int):
            sizes[name] = len(layers)
        elif name in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            sizes[name] = SIZES[name]
        elif name in FIXED:
            sizes[name] = FIXED[name]
        elif name in getattr(cls, "sub_configs", {}) and value is not None:
            sizes[name] = {"model_type": value.model_type, **tiny_sizes(type(value))}
    for few, many in HEADS.items():  # as many heads for keys as the architecture has: all, one, or half
        if few in sizes and many in sizes:
            sizes[few] = {default[many]: sizes[many], 1: 1}.get(default[few], sizes[few])
    return sizes | special


def layers_of_each_kind(by_layer: dict[str, list], count: int) -> list[int]:
    """Choose layers, at least two, so that every entry of every list is there."""
    chosen: set[int] = set()
    for entries in by_layer.values():
        for i, entry in enumerate(entries):
            if all(entries[j] != entry for j in chosen):
                chosen.add(i)
    chosen |= set([i for i in range(count) if i not in chosen][: max(0, 2 - len(chosen))])
    return sorted(chosen)


@torch.no_grad()
def tiny_model(kind: str) -> Any:
    """A random model whose distributions are not flat, and in which no bias is 0 and no norm is 1."""
    config = CONFIG_MAPPING[kind](**tiny_sizes(CONFIG_MAPPING[kind]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim < 2 and parameter.is_floating_point():
            parameter.add_(0.3 * torch.randn_like(parameter))
    embeddings = model.get_input_embeddings().weight
    embeddings[0] = embeddings.std() * torch.randn_like(embeddings[0])  # that of padding may be 0
    ids = torch.tensor([PROMPTS[1]])
    head, spread = model.get_output_embeddings(), model(input_ids=ids, use_cache=False).logits.std()
    if head is not None and spread.isfinite() and spread > 0:
        head.weight.mul_(1.5 / spread)
    return model


# The oracle: the plain model on one row alone.


@torch.no_grad()
def plain_logits(model: Any, row: Sequence[int]) -> Tensor:
    """Logits of one row that has no padding, in one pass without a cache, `(L, V)` float32."""
    return model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0].float()


def plain_logprobs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-probabilities of a response, `(R,)` nats."""
    logprobs = (plain_logits(model, [*prompt, *response]) / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs[range(len(response)), list(response)]


def left_padded() -> tuple[Tensor, Tensor]:
    """Prompts and their mask, `(B, P)` each."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[3] * (longest - len(p)) + p for p in PROMPTS])
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])


def responses() -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """Answers that are the same for every model, in rows as the trainer scores them, with all padding on the left.

    Returns:
        ids and mask, `(B, L)` each, which of the last positions are the answer's, `(B, R)` bool, and the answers.
    """
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(VOCABULARY - 31, generator=generator) + 31  # no token comes twice in a row: no ties in top-k
    answers = [order[i : i + n].tolist() for i, n in enumerate((STEPS, 5, 9, 2))]
    texts = [p + a for p, a in zip(PROMPTS, answers, strict=True)]
    longest = max(map(len, texts))
    ids = torch.tensor([[3] * (longest - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
    asked = torch.tensor([[False] * (STEPS - len(a)) + [True] * len(a) for a in answers])
    return ids, mask, asked, answers


def lengths_of(answers: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(len(p) + len(a), len(a)) for p, a in zip(PROMPTS, answers, strict=True)]


def off(found: Tensor, expected: Sequence[Tensor]) -> float:
    """The largest difference between the ends of rows `(B, R)` and the oracle's, nats; infinite where one is NaN."""
    gaps = [(row[-len(e) :] - e).abs().max() for row, e in zip(found, expected, strict=True)]
    return float(torch.stack(gaps).nan_to_num(nan=torch.inf).max())


def verdict(gap: float, what: str = "log-probabilities", right: str = "yes") -> str:
    return right if gap < TOLERANCE else f"no: {what} differ by {gap:.2g}"


# What is measured.


def actor_of(model: Any) -> ActorCritic:
    """What PPOTrainer makes of a model that is trained in full."""
    return build_actor_critic(load_policy(model, peft_config=None), critic=CriticSpec()).eval()


class Sweep:
    """All columns of one model."""

    def __init__(self, kind: str) -> None:
        self.kind, self.plain = kind, tiny_model(kind)
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.cells: dict[str, str] = {}
        self.warned: list[str] = []
        self.ids, self.mask, self.asked, self.answers = responses()

    def run(self) -> dict[str, Any]:
        """Measure everything; a model that is no causal decoder has no cells."""
        row = {"model": type(self.plain).__name__, "model_type": self.kind, "layers": self.layer_kinds()}
        first = plain_logits(self.plain, PROMPTS[1])
        later = plain_logits(self.plain, [*PROMPTS[1][:-1], 33])
        if not first.isfinite().all() or (first[:-1] - later[:-1]).abs().max() > TOLERANCE:
            return row | {"left_out": "not causal: an earlier token sees a later one"}
        before = plain_logits(self.plain, [*PROMPTS[1][:-2], 44, *PROMPTS[1][-1:]])
        row["past_matters"] = round(float((first - before)[-1].abs().max()), 4)
        self.expected = [plain_logprobs(self.plain, p, a) for p, a in zip(PROMPTS, self.answers, strict=True)]
        row["plain_padding_gap"] = self.plain_padding_gap()
        actor = self.construct(lambda: actor_of(copy.deepcopy(self.plain)))
        if isinstance(actor, str):
            row["refused"] = actor
            self.cells |= dict.fromkeys(COLUMNS, "refused")
        else:
            for column, measure in (
                ("left_padding", self.left_padding), ("packing", self.packing),
                ("shared_prompts", self.shared_prompts),
                ("cached_decoding", self.cached_decoding), ("generate", self.generate),
            ):  # fmt: skip
                self.cell(column, lambda measure=measure: measure(actor))
            for column, measure in (
                ("frozen_layers", self.frozen_layers), ("lora", self.lora), ("nf4", self.nf4),
                ("reward_head", self.reward_head),
            ):  # fmt: skip
                self.cell(column, measure)
        return row | {"cells": self.cells, "warnings": sorted({*self.warned})}

    def layer_kinds(self) -> str:
        kinds = getattr(self.plain.config.get_text_config(), "layer_types", None) or []
        return ", ".join(dict.fromkeys(map(str, kinds)))

    def construct(self, make: Callable[[], Any]) -> Any:
        """What it makes, or why it does not; what it warns of is kept."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made = make()
            except Exception as error:
                made = sentence(error)
        self.warned += [f"{w.message}" for w in caught if "ppo_plus" in w.filename]
        return made

    def cell(self, column: str, measure: Callable[[], str]) -> None:
        """Fill a cell; what raises was refused, by ppo_plus or by what it calls."""
        found = self.construct(measure)
        known = re.match(r"(yes|no|slow)\b", found)
        self.cells[column] = found if known else f"refused: {found}".replace(self.temporary.name, "FOLDER")

    @torch.no_grad()
    def plain_padding_gap(self) -> float | str:
        """How far the plain model's own left-padded pass is off, nats: whether a refusal had a reason."""
        try:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
            takes = "position_ids" in inspect.signature(self.plain.forward).parameters
            kwargs = {"position_ids": positions} if takes else {}
            logits = self.plain(input_ids=self.ids, attention_mask=self.mask, use_cache=False, **kwargs).logits
        except Exception as error:
            return sentence(error)
        logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)[:, -STEPS - 1 : -1]
        found = logprobs.gather(-1, self.ids[:, -STEPS:, None]).squeeze(-1)
        return round(off(found, self.expected), 6)

    @torch.no_grad()
    def left_padding(self, actor: ActorCritic) -> str:
        found = actor(self.ids, self.mask, STEPS, TEMPERATURE, with_values=False).logprobs
        return verdict(off(found, self.expected))

    @torch.no_grad()
    def packing(self, actor: ActorCritic) -> str:
        found = actor(
            self.ids,
            self.mask,
            STEPS,
            TEMPERATURE,
            with_values=False,
            response_mask=self.asked,
            seq_lens=lengths_of(self.answers),
        ).logprobs
        packs = actor.language_model in actor.runner.packable_models
        return verdict(off(found, self.expected), right="yes" if packs else "slow: padded passes")

    @torch.no_grad()
    def shared_prompts(self, actor: ActorCritic) -> str:
        """Two answers to each prompt, the second in reverse order, in passes that read the prompt once."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cell says what the warning does
            actor.runner.enable_shared_prompts(2)
        ids, answers = self.ids.clone(), [answer[::-1] for answer in self.answers]
        for row, answer in zip(ids, answers, strict=True):
            row[-len(answer) :] = torch.tensor(answer)
        expected = [plain_logprobs(self.plain, p, a) for p, a in zip(PROMPTS, answers, strict=True)]
        found = actor(
            torch.cat([self.ids, ids]), self.mask.repeat(2, 1), STEPS, TEMPERATURE, with_values=False,
            response_mask=self.asked.repeat(2, 1), seq_lens=lengths_of(self.answers) * 2,
            prefixes=[(i, len(prompt)) for i, prompt in enumerate(PROMPTS)] * 2,
        ).logprobs  # fmt: skip
        shares = actor.language_model in actor.runner.sharing_models
        return verdict(off(found, [*self.expected, *expected]), right="yes" if shares else "slow: repeated prompts")

    @torch.no_grad()
    def cached_decoding(self, actor: ActorCritic) -> str:
        ids, mask = left_padded()
        noise = sampling_uniforms(0, len(ids), STEPS)
        out = actor.sample(ids, mask, noise, stop_ids=STOPS, pad_token_id=0, temperature=TEMPERATURE)
        lengths = [next((i + 1 for i, t in enumerate(row) if t in STOPS), STEPS) for row in out.tokens.tolist()]
        rows = [row[:n] for row, n in zip(out.tokens.tolist(), lengths, strict=True)]
        expected = [plain_logprobs(self.plain, p, a) for p, a in zip(PROMPTS, rows, strict=True)]
        ends = torch.stack([row.roll(STEPS - n) for row, n in zip(out.logprobs, lengths, strict=True)])
        return verdict(off(ends, expected))

    @torch.no_grad()
    def generate(self, actor: ActorCritic) -> str:
        ids, mask = left_padded()
        top = TopKLogitsWarper(1)
        noise = torch.full((len(ids), STEPS), 0.5, dtype=torch.float64)
        ours = actor.sample(
            ids,
            mask,
            noise,
            stop_ids=[2],
            pad_token_id=0,
            temperature=1.0,
            logits_processor=lambda logits: top(None, logits),
        ).tokens.tolist()
        options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        for prompt, answer in zip(PROMPTS, ours, strict=True):
            inputs = torch.tensor([prompt])
            theirs = self.plain.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
            theirs = theirs[0, len(prompt) :].tolist()
            answer = answer[: answer.index(2) + 1] if 2 in answer else answer
            if answer != theirs:
                who = {True: "", False: "not "}
                a, b = (self.is_greedy(prompt, tokens) for tokens in (answer, theirs))
                return f"no: ours is {who[a]}greedy in a full pass, generate's is {who[b]}"
        return "yes"

    def is_greedy(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        logits = plain_logits(self.plain, [*prompt, *answer])[len(prompt) - 1 : -1]
        chosen = logits[range(len(answer)), list(answer)]
        return bool((logits.max(-1).values - chosen < TOLERANCE).all())

    def frozen_layers(self) -> str:
        model = copy.deepcopy(self.plain)
        layers = decoder_layers(model.base_model)
        if not layers:
            return "slow: layers not found, all run"
        names = {id(module): name for name, module in model.named_modules()}
        top = [names[id(m)] for m in layers[-1].modules() if isinstance(m, LINEAR)]
        top = [name for name in top if "att" in name] or top  # PEFT adapts experts in all layers or in none
        policy = load_policy(model, peft_config=lora(target_modules=top or "all-linear"))
        actor = build_actor_critic(policy, critic=CriticSpec()).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actor.enable_frozen_layer_cache()
        if not actor.num_cached_layers:
            said = [str(w.message).partition(" in every pass: ")[2] for w in caught]
            return "slow: all layers run in every pass" + "".join(f" ({reason[:120]})" for reason in said if reason)
        with torch.no_grad():
            states = actor.frozen_hidden_states(self.ids, self.mask)
            found = actor(
                self.ids, self.mask, STEPS, TEMPERATURE, with_values=False, frozen_hidden_states=states
            ).logprobs
        return verdict(off(found, self.expected))

    def lora(self) -> str:
        """Whether LoRA adapts all that is a linear layer, is right, and all of it learns."""
        model = copy.deepcopy(self.plain)
        policy = load_policy(model, peft_config=lora())
        actor = build_actor_critic(policy, critic=CriticSpec()).eval()
        with torch.no_grad():
            gap = off(actor(self.ids, self.mask, STEPS, TEMPERATURE, with_values=False).logprobs, self.expected)
        if gap >= TOLERANCE:
            return verdict(gap)
        torch.manual_seed(2)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        generator = torch.Generator().manual_seed(3)  # many tokens, so that every expert gets some
        ids = torch.randint(4, VOCABULARY, (8, 48), generator=generator)
        actor.train()
        (actor(ids, torch.ones_like(ids), 40).logprobs * torch.randn(8, 40, generator=generator)).sum().backward()
        adapters = {name: p for name, p in policy.named_parameters() if "lora_" in name and p.requires_grad}
        idle = sorted(
            {
                name.split(".lora_")[0].split(".")[-1]
                for name, p in adapters.items()
                if p.grad is None or not p.grad.any()
            }
        )
        if any(p.grad is not None and not p.grad.isfinite().all() for p in adapters.values()):
            return "no: gradients are not finite"
        adapted = {
            id(m.get_param() if hasattr(m, "get_param") else m.get_base_layer().weight)
            for m in policy.modules() if hasattr(m, "lora_A")
        }  # fmt: skip
        if idle:
            return f"no: no gradient for {', '.join(idle)}"
        return f"yes{but_for(model, adapted)}"

    def saved(self) -> Path:
        if not (self.folder / "config.json").is_file():
            self.plain.save_pretrained(self.folder)
        return self.folder

    def nf4(self) -> str:
        folder = self.saved()
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        policy = load_policy(
            str(folder), peft_config=lora(target_modules=self.adaptable()), quantization_config=options,
            frozen_dtype=torch.float32,
        )  # fmt: skip
        actor = build_actor_critic(policy, critic=CriticSpec()).eval()
        model = actor.language_model
        with torch.no_grad():
            found = actor(self.ids, self.mask, STEPS, TEMPERATURE, with_values=False).logprobs
            expected = [plain_logprobs(model, p, a) for p, a in zip(PROMPTS, self.answers, strict=True)]
        gap = off(found, expected)
        actor.train()
        actor(self.ids, self.mask, STEPS).logprobs.sum().backward()
        grads = [p.grad for n, p in policy.named_parameters() if "lora_B" in n and p.requires_grad]
        if not any(g is not None and g.any() for g in grads):
            return "no: no gradient"
        quantized = {id(p) for p in model.parameters() if hasattr(p, "quant_state")}
        return verdict(gap, right=f"yes{but_for(model, quantized)}" if quantized else "slow: no layer is quantized")

    def adaptable(self) -> Any:
        """All linear layers, or those of attention and MLP where PEFT refuses one of a state-space layer."""
        try:
            get_peft_model(copy.deepcopy(self.plain), lora())
        except Exception:
            head = self.plain.get_output_embeddings()
            return sorted(
                {
                    name.split(".")[-1] for name, m in self.plain.named_modules()
                    if type(m) is nn.Linear and m is not head and not name.endswith(("out_proj", "conv1d", "o_a_proj"))
                }
            )  # fmt: skip
        return "all-linear"

    def reward_head(self) -> str:
        """A classifier from the files of the language model, by itself and as an adapter on the actor's base."""
        folder = self.saved()
        torch.manual_seed(4)
        model, _ = load_classifier(str(folder), torch.float32)
        model.eval()
        nn.init.normal_(model.score.weight, std=1.0)
        texts = [p + [t for t in a if t] for p, a in zip(PROMPTS, self.answers, strict=True)]
        longest = max(map(len, texts))
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
        states = [self.plain.base_model(input_ids=torch.tensor([t])).last_hidden_state[0, -1] for t in texts]
        expected = (torch.stack(states) @ model.score.weight.T)[:, 0].detach()
        with torch.no_grad(), set_padding(model, 0):
            found = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        scale = expected.abs().max()
        gap = float(((found - expected).abs().max() / scale).nan_to_num(nan=torch.inf))
        if gap >= TOLERANCE:
            return verdict(gap, "a classifier's scores of padded rows")
        adapter = LoraConfig(r=2, target_modules=self.adaptable(), task_type="SEQ_CLS",
                             modules_to_save=["score"], init_lora_weights=False)  # fmt: skip
        reward = get_peft_model(model, adapter).eval()
        reward.save_pretrained(self.folder / "reward")
        with torch.no_grad():
            expected = torch.stack([reward(input_ids=torch.tensor([t])).logits[0, 0] for t in texts])
        actor = build_actor_critic(
            load_policy(str(folder), peft_config=lora(target_modules=self.adaptable()), frozen_dtype=torch.float32),
            critic=CriticSpec(),
        ).eval()
        head = actor.load_reward_adapter("reward_0", self.folder / "reward")
        with torch.no_grad():
            found = actor.reward_scores("reward_0", head, ids, mask, 0)
        gap = float(((found - expected).abs().max() / expected.abs().max()).nan_to_num(nan=torch.inf))
        return verdict(gap, "a reward adapter's scores")


LINEAR = (nn.Linear, transformers.pytorch_utils.Conv1D)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def but_for(model: Any, reached: set[int]) -> str:
    """Name the matrices that are not among those reached (ids of parameters); embeddings and output head do not count.

    Shares of a tiny model would not be those of a real one, in which experts are nearly all of the weights.
    """
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    left = [
        name for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in reached | ends and "lora_" not in name
    ]  # fmt: skip
    names = dict.fromkeys(re.sub(r"\.base_layer|\.weight$", "", name).split(".")[-1] for name in left)
    return f", without {', '.join(names)}"[:120] if names else ""


def sentence(error: BaseException) -> str:
    """Name an error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    return text.replace(str(ROOT), "").replace("|", "/")[:220]


def measure(kind: str) -> dict[str, Any]:
    """Measure one model, in this process."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        row = Sweep(kind).run()
    except Exception as error:
        row = {"model": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "model_type": kind, "left_out": sentence(error)}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def in_a_process(kind: str, seconds: float) -> dict[str, Any]:
    """Measure one model in a child of this process, which it may crash or hang."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(measure(kind)))
    child.start()
    sender.close()
    name = {"model": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "model_type": kind}
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return name | {"left_out": f"not done after {seconds:.0f} seconds"}
    except EOFError:
        child.join(5)
        how = signal.Signals(-child.exitcode).name if (child.exitcode or 0) < 0 else f"status {child.exitcode}"
        return name | {"left_out": f"its process ended by {how}"}
    finally:
        child.kill()
        child.join()


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many models there are of each outcome."""
    taken = [row for row in rows if "cells" in row and "refused" not in row]
    silent = [
        f"{row['model']}: {column}" for row in taken for column, cell in row["cells"].items() if cell.startswith("no")
    ]
    return {
        "models": len(rows), "taken": len(taken), "refused": sum("refused" in row for row in rows),
        "left_out": sum("left_out" in row for row in rows), "no": silent,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="MODEL_TYPE", help="these alone; all by default")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a model")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    args = parser.parse_args()
    rows = []
    for kind in args.only or swept():
        rows.append(in_a_process(kind, args.seconds))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {
        **summary(rows),
        "columns": COLUMNS,
        "rows": sorted(rows, key=lambda row: row["model"].lower()),
        **describe_machine(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


if __name__ == "__main__":
    main()
