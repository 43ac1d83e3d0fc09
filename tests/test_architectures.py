"""Causal decoders of every kind of position and cache: they train and are scored as they are by themselves, or are
refused with a reason before training."""

from __future__ import annotations

import copy

import conftest
import pytest
import torch
import transformers
from conftest import lora, make_model, make_trainer
from peft import PeftModel

from ppo_plus import ActorCritic, ValueHead
from ppo_plus.data.padding import left_pad
from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.models.backbone import cache_of
from ppo_plus.models.generation import select_rows
from ppo_plus.models.turn_cache import tokens_after
from ppo_plus.rollout.buffer import response_mask

SIZES = {k: v for k, v in conftest.SIZES.items() if k != "tie_word_embeddings"} | {"initializer_range": 0.3}
WINDOW = {"sliding_window": 4}  # shorter than the prompts
NO_GROUPS = ("num_key_value_heads", "intermediate_size")
ONLY_STATES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
MAMBA = {"state_size": 4, "expand": 2, "conv_kernel": 3, "initializer_range": 0.1}
HYBRID = {"mamba_n_groups": 1, "mamba_d_state": 4, "mamba_d_conv": 3, "mamba_d_head": 8, "mamba_chunk_size": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SLIDING, LINEAR = ({"layer_types": [first, "full_attention"]} for first in ("sliding_attention", "linear_attention"))
LINEAR_HEADS = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip

# Family: (class without "ForCausalLM", what differs from SIZES, what SIZES it does not know)
FAMILIES = {
    "Llama": ("Llama", {}, ()),
    "Qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}, ()),
    "Qwen3": ("Qwen3", {"head_dim": 8}, ()),
    "Mistral": ("Mistral", WINDOW, ()),
    "Gemma 2": (
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
         **WINDOW},
        (),
    ),
    "Gemma 3": (
        "Gemma3",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0,
         "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
        (),
    ),
    "Phi-3": ("Phi3", WINDOW, ()),
    "GPT-2": ("GPT2LMHeadModel", {"n_positions": 128}, NO_GROUPS),
    "GPT-NeoX": ("GPTNeoX", {}, ("num_key_value_heads",)),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, NO_GROUPS),
    "BLOOM": ("Bloom", {"n_head": 4}, (*NO_GROUPS, "num_attention_heads")),
    "Falcon": ("Falcon", {}, NO_GROUPS),
    "OLMo 2": ("Olmo2", {}, ()),
    "Cohere": ("Cohere", {"logit_scale": 0.5}, ()),
    "Granite": ("Granite", {"logits_scaling": 2.0}, ()),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, ()),
    "Qwen3-MoE": ("Qwen3Moe", {"head_dim": 8, "moe_intermediate_size": 16, **EXPERTS}, ()),
    "Mamba": ("Mamba", MAMBA, ONLY_STATES),
    "Mamba 2": ("Mamba2", {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}, ONLY_STATES),
    "Bamba": ("Bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_expand": 2, **HYBRID}, ()),
    "Falcon-H1": ("FalconH1", {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, **HYBRID}, ()),
    "Gemma 3n": (
        "Gemma3n",
        {"head_dim": 8, "num_hidden_layers": 4, "layer_types": [*SLIDING["layer_types"]] * 2, "num_kv_shared_layers": 2,
         "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": SIZES["vocab_size"], "laurel_rank": 4, "altup_num_inputs": 2, **WINDOW},
        (),
    ),
    "Gemma 4": (
        "Gemma4",
        {"num_hidden_layers": 4, "layer_types": [*SLIDING["layer_types"]] * 2, "num_kv_shared_layers": 2,
         "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SIZES["vocab_size"], **WINDOW},
        (),
    ),
    "Qwen3.5": ("Qwen3_5", {"head_dim": 8, **LINEAR, **LINEAR_HEADS}, ()),
    "DeepSeek V3": (
        "DeepseekV3",
        {"q_lora_rank": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, **LATENT},
        (),
    ),
    "gpt-oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING, **WINDOW}, ()),
    "Granite 4": (
        "GraniteMoeHybrid",
        {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_expand": 2, "num_local_experts": 0,
         "shared_intermediate_size": 48, **HYBRID},
        (),
    ),
    "Gemma 3, with vision": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {"head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING, **WINDOW}, "vision_config": VISION,
         "mm_tokens_per_image": 4},
        (),
    ),
    "Gemma 4, with vision": (
        "Gemma4ForConditionalGeneration",
        {"text_config": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SIZES["vocab_size"], **SLIDING,
                         **WINDOW},
         "vision_config": {**VISION, "head_dim": 8, "num_key_value_heads": 2}, "audio_config": None},
        (),
    ),
    "Qwen3.5, with vision": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": {"head_dim": 8, **LINEAR, **LINEAR_HEADS},
         "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                           "out_hidden_size": 32}},
        (),
    ),
    "Mistral 3, with vision": (
        "Mistral3ForConditionalGeneration",
        {"text_config": {"model_type": "mistral", "head_dim": 8},
         "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8}},
        (),
    ),
    "SmolVLM": (
        "SmolVLMForConditionalGeneration",
        {"text_config": {"model_type": "llama"}, "vision_config": VISION, "scale_factor": 1},
        (),
    ),
    "LFM 2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 48}, ()),
}  # fmt: skip

# PEFT refuses LoRA on the output projection of a state-space layer, which its kernels read past the module.
TARGETS = {
    "Mamba": ["in_proj", "x_proj"],
    "Mamba 2": ["in_proj"],
    "Falcon-H1": ["q_proj", "v_proj", "in_proj", "down_proj"],
}

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19, 20]]
STOPS, LENGTH, TEMPERATURE = [2, *range(10, 20)], 12, 0.7


def build(family: str):
    name, differs, unknown = FAMILIES[family]
    return make(name, differs, unknown)


def make(name, differs, unknown=()):
    sizes = {key: value for key, value in SIZES.items() if key not in unknown}
    if "text_config" in differs:
        sizes = {**differs, "text_config": {**sizes, **differs["text_config"]}}
    else:
        sizes = {**sizes, **differs}
    text = {n: f"{n}TextConfig" for n in ("Gemma3", "Gemma3n", "Gemma4", "Qwen3_5")}
    known = {"GPT2LMHeadModel": "GPT2Config", **text}
    config = getattr(transformers, known.get(name, f"{name.removesuffix('ForConditionalGeneration')}Config"))(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, name if name.endswith(("Model", "Generation")) else f"{name}ForCausalLM")(
        config
    ).eval()


def spread_out(completion_ids, **kwargs):
    """A reward that differs between any two answers, whatever they are."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def actor_critic(model) -> ActorCritic:
    return ActorCritic(
        model, ValueHead(model.config.get_text_config().hidden_size), ref_model=copy.deepcopy(model)
    ).eval()


@torch.no_grad()
def plain_logprobs(model, prompt, response):
    """The oracle: the plain model on one row that has no padding, and a softmax at the temperature."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float() / TEMPERATURE
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs[range(len(response)), response]


def left_padded():
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[3] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    return ids, mask


def sampled(model):
    """Answers of unequal length to left-padded prompts: (input_ids, attention_mask, response mask, generation)."""
    ids, mask = left_padded()
    out = model.sample(
        ids, mask, sampling_uniforms(0, len(ids), LENGTH), stop_ids=STOPS, pad_token_id=0, temperature=TEMPERATURE
    )
    real = response_mask(out.tokens, STOPS)
    return torch.cat([ids, out.tokens], 1), torch.cat([mask, real.long()], 1), real, out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_has_the_logprobs_of_the_plain_model(family):
    plain = build(family)
    model = actor_critic(plain)
    ids, mask, real, generation = sampled(model)
    with torch.no_grad():
        scored = model(ids, mask, LENGTH, TEMPERATURE).logprobs
    assert len(set(real.sum(1).tolist())) > 1  # rows left the batch while others went on
    for row, prompt in enumerate(PROMPTS):
        length = int(real[row].sum())
        expected = plain_logprobs(plain, prompt, generation.tokens[row, :length].tolist())
        assert (scored[row, :length] - expected).abs().max() < 1e-5
        assert (generation.logprobs[row, :length] - expected).abs().max() < 2e-5
    assert scored[real].std() > 0.05  # the oracle could see a difference


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_has_the_logprobs_of_the_plain_model(family):
    """After answers of unequal length of a tool, in another order; some models keep a cache and others read again."""
    plain = build(family)
    model, (ids, mask) = actor_critic(plain), left_padded()
    options = {"stop_ids": STOPS, "pad_token_id": 0, "temperature": TEMPERATURE}
    caches = [None] * len(ids)
    first = model.sample(ids, mask, sampling_uniforms(0, len(ids), LENGTH), turn_caches=caches, **options)
    real = response_mask(first.tokens, STOPS)
    rows = [row for row in (2, 0, 3, 1) if first.tokens[row, int(real[row].sum()) - 1] in STOPS]
    sequences = [PROMPTS[row] + first.tokens[row][real[row]].tolist() + [21, 22, 23, 24][: row + 1] for row in rows]
    kept = [caches[row] for row in rows]
    new_tokens = tokens_after(kept, sequences)
    assert len(rows) > 1
    if family in ("Llama", "Qwen3", "GPT-2", "GPT-NeoX"):
        assert [len(new) for new in new_tokens] == [1 + row + 1 for row in rows]
    if family in ("Mistral", "Gemma 2", "Mamba"):
        assert new_tokens == sequences
    ids, mask = left_pad(new_tokens, 3)
    second = model.sample(ids, mask, sampling_uniforms(1, len(rows), LENGTH), turn_caches=kept, **options)
    for row, sequence in enumerate(sequences):
        tokens = second.tokens[row][response_mask(second.tokens, STOPS)[row]].tolist()
        expected = plain_logprobs(plain, sequence, tokens)
        assert (second.logprobs[row, : len(tokens)] - expected).abs().max() < 5e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_is_learned_from_saved_and_loaded(family, tmp_path):
    config = {"max_steps": 2, "num_ppo_epochs": 1, "local_rollout_forward_batch_size": 8}
    adapter = lora(target_modules=TARGETS.get(family, "all-linear"))
    trainer = make_trainer(tmp_path, model=build(family), config=config, peft_config=adapter, reward_funcs=spread_out)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.log_history[0]["ppo/initial_ratio_error"] < 1e-4
    assert trainer.state.log_history[0]["sampling/logp_difference"] < 1e-4
    after = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora" in name)
    trainer.save_model()
    ids, mask = left_padded()
    ids, mask = torch.cat([ids, ids[:, :4]], 1), torch.cat([mask, torch.ones(len(ids), 4, dtype=torch.int64)], 1)
    with torch.no_grad():
        trained = trainer.model.eval()(ids, mask, 4).logprobs
        fresh = actor_critic_of(PeftModel.from_pretrained(build(family), tmp_path))
        assert (fresh(ids, mask, 4).logprobs - trained).abs().max() < 1e-6
        assert (actor_critic(build(family))(ids, mask, 4).logprobs - trained).abs().max() > 1e-4  # negative control


def actor_critic_of(policy) -> ActorCritic:
    return ActorCritic(policy, ValueHead(policy.config.get_text_config().hidden_size)).eval()


def test_rows_of_recurrent_states_leave_with_their_keys():
    """A cache layer with attention and recurrence inherits a way to select rows that forgets half of it."""
    model = build("Falcon-H1")
    ids, mask = left_padded()
    with torch.no_grad():
        cache = cache_of(model.model(input_ids=ids, attention_mask=mask, use_cache=True))
    whole = copy.deepcopy(cache)
    select_rows(cache, torch.tensor([3, 1]))
    for layer, before in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(layer.keys, before.keys[[3, 1]])
        for states, all_states in ((layer.conv_states, before.conv_states),
                                   (layer.recurrent_states, before.recurrent_states)):  # fmt: skip
            assert torch.equal(states[0], all_states[0][[3, 1]])


@pytest.mark.parametrize(
    ("name", "differs", "unknown", "message"),
    [
        ("Rwkv", {"attention_hidden_size": 32}, ONLY_STATES[1:], "returns no cache"),
        ("MiniMax", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4,
                     "layer_types": ["full_attention", "linear_attention"]}, (),
         "keeps states outside the layers of its cache"),
        ("RecurrentGemma", {"head_dim": 8, "lru_width": 32, "block_types": ["recurrent", "attention"]}, (),
         "returns no cache"),
    ],
)  # fmt: skip
def test_what_cannot_answer_prompts_side_by_side_is_refused(name, differs, unknown, message, tmp_path):
    with pytest.raises(ValueError, match=f"{name}ForCausalLM {message}"):
        make_trainer(tmp_path, model=make(name, differs, unknown), peft_config=lora())


def test_a_model_without_an_attention_mask_is_refused():
    model = make_model()
    forward = model.model.forward
    model.model.forward = lambda input_ids, past_key_values=None, use_cache=False: forward(input_ids)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention mask, so prompts of unequal length"):
        ActorCritic(model, ValueHead(32), ref_model=make_model())
