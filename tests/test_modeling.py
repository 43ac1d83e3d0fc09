"""One backbone in four roles: its numbers are the plain model's, and what it writes is plain files."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import PeakMemory, lora, make_config, make_model, make_tokenizer, make_trainer
from peft import AdaLoraConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.logits_process import TopPLogitsWarper

from ppo_plus.data.padding import left_pad
from ppo_plus.models import actor_critic as modeling
from ppo_plus.models import logprobs as logits
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.adapters import use_adapter
from ppo_plus.models.backbone import move_if_movable
from ppo_plus.models.critic import CriticSpec
from ppo_plus.models.loading import build_actor_critic, load_policy
from ppo_plus.models.logprobs import chunked_logprobs, head_is_frozen, logits_function, sample, top_p_filter
from ppo_plus.models.value_head import ValueHead
from ppo_plus.rollout.buffer import response_mask
from ppo_plus.rollout.decoding import build_logits_processor

VOCABULARY, PAD, EOS = 42, 0, 2
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": False}


def build(cls, config, head_scale=20.0):
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(head_scale)
    return model.eval()


ARCHITECTURES = {
    "llama": lambda: make_model().eval(),
    # A window of 4 tokens is shorter than most rows here; the cap of 3 bends most logits.
    "gemma2, soft-capped": lambda: build(
        Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, sliding_window=4, final_logit_softcapping=3.0)
    ),
    "cohere, multiplied": lambda: build(CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25)),
    "granite, divided": lambda: build(
        GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=2.0)
    ),
    "gpt2, absolute positions": lambda: build(
        GPT2LMHeadModel, GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **IDS)
    ),
    "opt, positions from the mask": lambda: build(
        OPTForCausalLM,
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, **IDS,
        ),
    ),
    "bloom, no positions": lambda: build(
        BloomForCausalLM, BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **IDS)
    ),
}  # fmt: skip
everywhere = pytest.mark.parametrize("architecture", ARCHITECTURES)


def actor_critic(policy=None, kind="linear", activation="silu", **options):
    """An actor-critic in eval mode whose value head says something."""
    policy = make_model() if policy is None else policy
    if not isinstance(policy, PeftModel):
        options.setdefault("ref_model", copy.deepcopy(policy))
    head = ValueHead(policy.config.hidden_size, kind, activation)
    torch.manual_seed(1)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return ActorCritic(policy, head, **options).eval()


def moved(policy, seed=2, adapter="default"):
    """Give an adapter an effect: LoRA starts with B = 0."""
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if f"lora_B.{adapter}." in name:
            nn.init.normal_(parameter, std=0.2)
    return policy


def adapted(seed=2, **options):
    return moved(get_peft_model(make_model(), lora(**options)), seed)


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def ragged_rows(seed=0, prompts=(7, 3, 1, 5), responses=(4, 6, 2, 1)):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()

    return [(draw(p), draw(r)) for p, r in zip(prompts, responses, strict=True)]


def as_batch(rows, pad=PAD):
    """Prompts padded on the left, responses on the right."""
    p, r = max(len(a) for a, _ in rows), max(len(b) for _, b in rows)
    ids = [[pad] * (p - len(a)) + a + b + [pad] * (r - len(b)) for a, b in rows]
    mask = [[0] * (p - len(a)) + [1] * (len(a) + len(b)) + [0] * (r - len(b)) for a, b in rows]
    return torch.tensor(ids), torch.tensor(mask), r


@torch.no_grad()
def plain(model, prompt, response, temperature=1.0):
    """The oracle: one row without padding through the model's own forward; the rest in float64."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    distribution = (logits.double() / temperature).log_softmax(-1)
    taken = torch.stack([distribution[t, token] for t, token in enumerate(response)])
    return taken, -(distribution.exp() * distribution).sum(-1)


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


def gap_to_plain(output, model, rows, temperature=1.0):
    """Largest distance of a batch's log-probabilities from those of the rows alone."""
    return max(
        gap(output.logprobs[i, : len(response)], plain(model, prompt, response, temperature)[0])
        for i, (prompt, response) in enumerate(rows)
    )


# --- forward ---


@everywhere
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_a_padded_batch_scores_as_its_rows_do_alone_in_the_plain_model(architecture, temperature):
    model, rows = ARCHITECTURES[architecture](), ragged_rows()
    actor = actor_critic(copy.deepcopy(model))
    with torch.no_grad():
        output = actor(*as_batch(rows), temperature=temperature, with_entropy=True)
    for i, (prompt, response) in enumerate(rows):
        logprobs, entropy = plain(model, prompt, response, temperature)
        assert gap(output.logprobs[i, : len(response)], logprobs) < 1e-5
        assert gap(output.entropy[i, : len(response)], entropy) < 1e-5
    if temperature != 1.0:
        assert gap_to_plain(output, model, rows, temperature=1.0) > 1e-2


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if "ed" in name.split(", ")[-1]])
def test_the_bare_head_would_not_do_where_logits_are_scaled_or_capped(architecture, monkeypatch):
    model, rows = ARCHITECTURES[architecture](), ragged_rows()
    actor = actor_critic(copy.deepcopy(model))
    monkeypatch.setattr(modeling, "logits_function", lambda model: model.get_output_embeddings())
    with torch.no_grad():
        assert gap_to_plain(actor(*as_batch(rows)), model, rows) > 1e-2


@pytest.mark.parametrize("pad", [1, EOS, 17])
def test_what_stands_in_the_padding_does_not_matter(pad):
    actor, rows = actor_critic(), ragged_rows()
    with torch.no_grad():
        a, b = (actor(*as_batch(rows, pad=p), with_entropy=True) for p in (PAD, pad))
    real = torch.arange(6) < torch.tensor([len(response) for _, response in rows])[:, None]
    for name in ("logprobs", "values", "entropy"):
        assert gap(getattr(a, name)[real], getattr(b, name)[real]) < 1e-6


def test_an_adapters_scores_are_those_of_the_base_with_b_times_a_added():
    policy, rows = adapted(), ragged_rows()
    by_hand = make_model().eval()
    weights, lora_weights = dict(by_hand.named_parameters()), snapshot(policy)
    with torch.no_grad():
        for name, a in lora_weights.items():
            if "lora_A" in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                weights[target] += 8 / 4 * lora_weights[name.replace("lora_A", "lora_B")] @ a
        output = actor_critic(policy)(*as_batch(rows))
    assert gap_to_plain(output, by_hand, rows) < 1e-5
    assert gap_to_plain(output, make_model().eval(), rows) > 1e-1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapters_gradients_are_those_of_plain_peft_on_each_row_alone(checkpointing):
    rows, plain_peft = ragged_rows(), adapted().eval()
    actor = build_actor_critic(
        load_policy(make_model(), peft_config=lora()),
        critic=CriticSpec(),
    ).train(checkpointing)
    actor.policy.load_state_dict(plain_peft.state_dict())
    if checkpointing:
        actor.activation_checkpointing_enable()
    logprobs = actor(*as_batch(rows), temperature=0.7).logprobs
    total, expected = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for i, (prompt, response) in enumerate(rows):
        logits = plain_peft(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        alone = (logits.double() / 0.7).log_softmax(-1)
        for t, token in enumerate(response):
            total = total + (i - 1.5 + t) * logprobs[i, t]
            expected = expected + (i - 1.5 + t) * alone[t, token]
    total.backward()
    expected.backward()
    found = {name: p.grad for name, p in actor.policy.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in plain_peft.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-3
        assert gap(found[name], gradient) < 1e-5 * max(1.0, gradient.abs().max().item()), name


def test_only_what_is_asked_for_is_computed():
    actor, batch = actor_critic(), as_batch(ragged_rows())
    output = actor(*batch)
    assert output.entropy is None and output.logprobs.shape == output.values.shape == (4, 6)
    assert actor(*batch, with_values=False).values is None
    alone = actor(*batch, with_logprobs=False)
    assert alone.logprobs is None and torch.equal(alone.values, output.values)


def test_the_value_at_t_is_that_of_the_state_before_token_t():
    actor = actor_critic()
    (prompt, response), *others = ragged_rows(responses=(6, 6, 2, 1))
    for t in range(6):
        changed = [*response[:t], (response[t] - 3) % 38 + 4, *response[t + 1 :]]
        with torch.no_grad():
            before, after = (actor(*as_batch([(prompt, r), *others])).values[0] for r in (response, changed))
        assert gap(before[: t + 1], after[: t + 1]) < 1e-6
        assert all(abs(before[u] - after[u]) > 1e-3 for u in range(t + 1, 6))


def test_values_are_the_head_on_the_hidden_state_that_predicts_the_token():
    actor, rows = actor_critic(), ragged_rows()
    weight, bias = actor.value_head.state_dict().values()
    with torch.no_grad():
        values = actor(*as_batch(rows)).values
        for i, (prompt, response) in enumerate(rows):
            states = actor.policy.model(torch.tensor([prompt + response])).last_hidden_state[0]
            states = states[len(prompt) - 1 : len(prompt) + len(response) - 1].double()
            assert gap(values[i, : len(response)], states @ weight[0].double() + bias.double()) < 1e-5


@pytest.mark.parametrize("detached", [False, True])
def test_the_critics_gradient_reaches_the_backbone_unless_it_is_detached(detached):
    actor = actor_critic(critic="detached" if detached else "shared")
    actor(*as_batch(ragged_rows())).values.sum().backward()
    assert actor.value_head.layers[0].weight.grad.abs().sum() > 0
    reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in actor.policy.model.layers.parameters()]
    assert not any(reached) if detached else all(reached)


def test_detached_values_leave_the_policys_gradient_alone():
    gradients = []
    for options in ({"critic": "detached"}, {"critic": "detached"}, {}):
        actor = actor_critic(**options)
        output = actor(*as_batch(ragged_rows()), with_values=bool(gradients))
        (output.logprobs.sum() + (output.values.sum() if gradients else 0)).backward()
        gradients.append(actor.policy.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert gap(gradients[0], gradients[2]) > 1e-3


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaForCausalLM, {**SIZES, "attention_dropout": 0.5}),
        (GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.5, "resid_pdrop": 0.5}),
        (OPTForCausalLM, {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5}),
        (BloomForCausalLM, {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.5}),
    ],
)  # fmt: skip
def test_without_dropout_a_model_in_training_scores_as_in_evaluation(cls, config):
    options = {"critic": CriticSpec()}
    for disable in (False, True):
        model = build(cls, cls.config_class(**{**config, "vocab_size": VOCABULARY}))
        actor = build_actor_critic(model, disable_dropout=disable, **options)
        with torch.no_grad():
            evaluated, trained = (actor.train(mode)(*as_batch(ragged_rows())).logprobs for mode in (False, True))
        assert (gap(evaluated, trained) < 1e-6) == disable


# --- value head ---


@pytest.mark.parametrize(("kind", "activation"), [("linear", "silu"), ("mlp", "silu"), ("mlp", "gelu")])
def test_a_new_value_head_says_zero_and_can_learn_either_sign(kind, activation):
    head, hidden = ValueHead(8, kind, activation), torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(hidden), torch.zeros(64))
    target = hidden[:, 0] * 3 - 1
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (head(hidden) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert head(hidden).min() < -2 and head(hidden).max() > 2


@pytest.mark.parametrize(("activation", "function"), [("silu", lambda x: x / (1 + (-x).exp())), ("gelu", None)])
def test_the_mlp_head_is_the_formula(activation, function):
    function = function or (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    head, hidden = ValueHead(8, "mlp", activation), torch.randn(5, 3, 8)
    torch.manual_seed(1)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    w1, b1, w2, b2 = (tensor.double() for tensor in head.state_dict().values())
    expected = function(hidden.double() @ w1.T + b1) @ w2[0] + b2
    assert head(hidden).shape == (5, 3)
    assert gap(head(hidden), expected) < 1e-5
    other = ValueHead(8, "mlp", "gelu" if activation == "silu" else "silu")
    other.load_state_dict(head.state_dict())
    assert gap(other(hidden), expected) > 1e-2


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_value_head_stays_in_fp32_under_autocast_and_on_a_bf16_backbone(kind):
    actor = actor_critic(make_model().to(torch.bfloat16), kind=kind)
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = actor.value_head(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(actor.value_head(hidden), exact)
        assert gap(actor.value_head.layers(hidden.float()).squeeze(-1), exact) > 1e-4
        output = actor(*as_batch(ragged_rows()), with_entropy=True)
    assert {output.logprobs.dtype, output.values.dtype, output.entropy.dtype, exact.dtype} == {torch.float32}


# --- vocabulary logits, in chunks ---


def tokens_to_score(n=90, vocabulary=50, hidden_size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(hidden_size, vocabulary, bias=False)
    head.weight.data.normal_(generator=generator)
    hidden = torch.randn(3, n // 3, hidden_size, generator=generator, requires_grad=True)
    return head, hidden, torch.randint(0, vocabulary, (3, n // 3), generator=generator)


@pytest.mark.parametrize("tokens_per_chunk", [1, 16, 17, 32, 89, 90, 1000])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, tokens_per_chunk, with_entropy, frozen_head):
    head, hidden, targets = tokens_to_score()
    distribution = (head(hidden).double() / 0.7).log_softmax(-1)
    expected = distribution.gather(-1, targets[..., None]).squeeze(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    weights = torch.linspace(-1, 1, 90).view(3, 30)
    whole = ((expected + entropy * 2) if with_entropy else expected) * weights
    wanted = torch.autograd.grad(whole.sum(), [hidden, head.weight])
    head.requires_grad_(not frozen_head)

    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", tokens_per_chunk * 50)
    calls = []

    def counted(states):
        calls.append(len(states))
        return head(states)

    logprobs, found_entropy = chunked_logprobs(counted, hidden, targets, 0.7, with_entropy, frozen_head=frozen_head)
    most = min(max(tokens_per_chunk, 16), 90)
    assert len(calls[1:]) == -(-90 // most) and max(calls) - min(calls[1:]) < most / 2 and sum(calls[1:]) == 90
    assert gap(logprobs, expected) < 1e-5
    assert (found_entropy is None) != with_entropy
    if with_entropy:
        assert gap(found_entropy, entropy) < 1e-5
    loss = ((logprobs + found_entropy * 2) if with_entropy else logprobs) * weights
    trained = [hidden] if frozen_head else [hidden, head.weight]
    for found, gradient in zip(torch.autograd.grad(loss.sum(), trained), wanted, strict=False):
        assert gap(found, gradient) < 1e-5
    # A frozen head is asked once per token, in the forward pass; a trained one again in the backward pass.
    assert sum(calls[1:]) == (90 if frozen_head else 180)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_rows_in_fp32_at_a_time_change_no_bit(monkeypatch, dtype, with_entropy):
    found = []
    for rows in (90, 7, 1):
        head, hidden, targets = tokens_to_score()
        head, hidden = head.to(dtype).requires_grad_(False), hidden.detach().to(dtype).requires_grad_()
        monkeypatch.setattr(logits, "SLICE_ELEMENTS", rows * 50)
        assert len(logits.row_slices(head(hidden.view(90, -1)))) == -(-90 // rows)
        logprobs, entropy = chunked_logprobs(head, hidden, targets, 0.7, with_entropy, frozen_head=True)
        (logprobs + (2 * entropy if with_entropy else 0)).sum().backward()
        with torch.no_grad():
            scored = chunked_logprobs(head, hidden, targets, 0.7, with_entropy, frozen_head=True)
        found.append([logprobs.detach(), hidden.grad, *scored[: 1 + with_entropy]])
    assert torch.equal(found[0][0], found[0][2])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("elements", "grows"), [(16 * 4000, False), (2**24, True)])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_memory_grows_with_the_chunk_and_not_with_vocabulary_times_tokens(monkeypatch, elements, grows, frozen_head):
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", elements)
    peaks = []
    for n in (96, 384):
        head, hidden, targets = tokens_to_score(n=n, vocabulary=4000, hidden_size=4)
        head.requires_grad_(not frozen_head)
        with PeakMemory() as memory:
            logprobs, entropy = chunked_logprobs(head, hidden, targets, 1.0, True, frozen_head=frozen_head)
            (logprobs.sum() + entropy.sum()).backward()
        peaks.append(memory.peak)
    bytes_per_token = (peaks[1] - peaks[0]) / (384 - 96)
    assert (bytes_per_token > 4 * 4000) if grows else (bytes_per_token < 4 * 4000 / 20)


def test_which_path_is_taken_follows_from_what_is_trained():
    assert head_is_frozen(adapted().get_base_model())
    assert not head_is_frozen(make_model())
    assert not head_is_frozen(adapted(target_modules=["q_proj", "lm_head"]).get_base_model())


# --- reference ---


def test_with_the_adapter_off_it_is_the_base_model():
    actor, rows, base = actor_critic(adapted()), ragged_rows(), make_model().eval()
    with torch.no_grad():
        with actor.role("reference"):
            off = actor(*as_batch(rows))
        on = actor(*as_batch(rows))
    assert gap_to_plain(off, base, rows) < 1e-5
    assert gap_to_plain(on, base, rows) > 1e-1


def test_a_separate_reference_model_is_used_and_is_no_part_of_the_model():
    other, rows = make_model(seed=5).eval(), ragged_rows()
    for policy in (adapted(), make_model()):
        actor = actor_critic(policy, ref_model=copy.deepcopy(other))
        with torch.no_grad():
            with actor.role("reference"):
                found = actor(*as_batch(rows))
            own = actor(*as_batch(rows))
        assert gap_to_plain(found, other, rows) < 1e-5
        assert gap_to_plain(own, other, rows) > 1e-1
        owned = {id(p) for p in actor.parameters()}
        assert not any(id(p) in owned or p.requires_grad for p in actor._ref_model[0].parameters())


def test_a_reference_with_an_adapter_of_its_own_speaks_with_it():
    reference, rows = adapted(seed=6).eval(), ragged_rows()
    actor = build_actor_critic(adapted(), critic=CriticSpec(), ref_model=reference)
    with torch.no_grad(), actor.eval().role("reference"):
        assert gap_to_plain(actor(*as_batch(rows)), reference, rows) < 1e-5


@pytest.mark.parametrize("peft", [True, False])
def test_the_policy_cannot_be_its_own_reference(peft):
    model = make_model()
    policy = load_policy(model, peft_config=lora() if peft else None)
    with pytest.raises(ValueError, match="ref_model share their weights"):
        build_actor_critic(policy, critic=CriticSpec(), ref_model=model)


def test_full_fine_tuning_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="Full fine-tuning needs a reference"):
        ActorCritic(make_model(), ValueHead(32))


def test_full_fine_tuning_keeps_a_frozen_copy_as_reference(tmp_path):
    start, rows = make_model().eval(), ragged_rows()
    trainer = make_trainer(tmp_path, peft_config=None, config={"max_steps": 4})
    trainer.train()
    actor = trainer.model.eval()
    with torch.no_grad():
        with actor.role("reference"):
            reference = actor(*as_batch(rows))
        trained = actor(*as_batch(rows))
    assert gap_to_plain(reference, start, rows) < 1e-5
    assert gap_to_plain(trained, start, rows) > 1e-2


def test_a_continued_adapter_is_its_own_frozen_reference(tmp_path):
    sft, rows = adapted(), ragged_rows()
    started = snapshot(sft)
    trainer = make_trainer(tmp_path, model=sft, peft_config=None, config={"max_steps": 4, "logging_steps": 4})
    actor = trainer.model.eval()

    def scores():
        with torch.no_grad():
            with actor.eval().role("reference"):
                reference = actor(*as_batch(rows)).logprobs
            return reference, actor(*as_batch(rows)).logprobs

    reference, policy = scores()
    assert torch.equal(reference, policy)
    assert gap_to_plain(actor(*as_batch(rows)), make_model().eval(), rows) > 1e-1
    trainer.train()
    after_reference, after_policy = scores()
    assert torch.equal(after_reference, reference)
    assert gap(after_policy, policy) > 1e-2
    now = snapshot(actor.policy)
    trained = [name for name in started if ".default." in name]
    assert trained and any(not torch.equal(now[name], started[name]) for name in trained)
    for name in trained:
        assert torch.equal(now[name.replace(".default.", ".ref.")], started[name])
    assert trainer.state.log_history[0]["kl"] == 0.0


ADAPTERS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "LoRA and the output head": {"modules_to_save": ["lm_head"]},
    "LoRA and embeddings": {"modules_to_save": ["embed_tokens"]},
    "LoRA and norms": {"modules_to_save": ["norm"]},
    "LoRA and single tokens": {"trainable_token_indices": [4, 9]},
    "rank-stabilized LoRA": {"use_rslora": True},
    "LoRA with biases of its own": {"lora_bias": True},
    "LoRA from a normal distribution": {"init_lora_weights": "gaussian"},
    "LoRA from orthogonal vectors": {"init_lora_weights": "orthogonal"},
    "LoRA from minor components": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("continued", [False, True], ids=["new", "continued"])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_whatever_an_adapter_trains_the_reference_stays_where_it_was(tmp_path, options, continued):
    policy, rows = make_model(attention_bias=True), as_batch(ragged_rows())
    if continued:
        policy = moved_from_the_start(get_peft_model(policy, lora(**options)))
    plain_policy = copy.deepcopy(policy).eval()
    peft_config = None if continued else lora(**options)
    trainer = make_trainer(
        tmp_path, model=policy, peft_config=peft_config, config={"max_steps": 4},
        reward_funcs=lambda completion_ids, **_: [sum(ids) % 7 for ids in completion_ids],
    )  # fmt: skip
    actor = trainer.model
    gathered = {id(p) for p in (*actor.actor_parameters(), *actor.value_head.parameters())}
    assert gathered == {id(p) for p in actor.parameters() if p.requires_grad}
    trainer.train()
    actor.eval()
    with torch.no_grad():
        with actor.role("reference"):
            reference = actor(*rows)
        trained = actor(*rows)
    assert gap_to_plain(reference, plain_policy, ragged_rows()) < 1e-5
    assert gap_to_plain(trained, plain_policy, ragged_rows()) > 1e-3


DERIVING = {
    "AdaLoRA": AdaLoraConfig(target_modules=["q_proj"], total_step=4),
    "VeRA": VeraConfig(target_modules=["q_proj"]),
    "VB-LoRA": VBLoRAConfig(target_modules=["q_proj"], r=4, vector_length=8, num_vectors=16),
}


@pytest.mark.parametrize("kind", DERIVING.values(), ids=DERIVING)
def test_adapters_with_tensors_that_are_not_saved_resume_to_the_same_bits(tmp_path, kind):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(tmp_path, peft_config=copy.deepcopy(kind), config=config)
        started = snapshot(trainer.model)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(snapshot(trainer.model))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(started[name], ends[1][name]) for name in started if ".default" in name)


def test_full_fine_tuning_leaves_what_is_frozen_as_it_is(tmp_path):
    model = make_model()
    frozen = {"embed_tokens": model.model.embed_tokens, ".layers.0.": model.model.layers[0], ".norm.": model.model.norm}
    for module in frozen.values():
        module.requires_grad_(False)
    start = snapshot(model)
    trainer = make_trainer(tmp_path, model=model, peft_config=None, config={"max_steps": 4})
    assert trainer.model.num_cached_layers == 0  # the reference is another model
    trainer.train()
    now = snapshot(trainer.model.policy)
    kept = {name for name in start if torch.equal(now[name], start[name])}
    assert kept == {name for name in start if any(part in name for part in frozen)}


def moved_from_the_start(policy):
    """As if it had been trained: every weight of the adapter is elsewhere."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "default" in name.split("."):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return policy


def test_an_adapter_loaded_for_inference_is_trained_when_it_is_continued(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path / "sft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = load_policy(PeftModel.from_pretrained(base, tmp_path / "sft"), peft_config=None)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if ".default." in name}


def test_an_adapter_and_a_config_for_another_one_is_refused():
    with pytest.raises(ValueError, match="has an adapter already"):
        load_policy(adapted(), peft_config=lora())


# --- switching adapters ---


def switches():
    """A policy with two adapters and one parameter of the actor frozen by the user, and two ways to switch."""
    policy = load_policy(adapted(), peft_config=None)
    next(p for name, p in policy.named_parameters() if ".default." in name).requires_grad_(False)
    bare = adapted()
    next(p for name, p in bare.named_parameters() if ".default." in name).requires_grad_(False)
    return {
        "adapter": (policy, lambda: use_adapter(policy, "ref")),
        "frozen copy": (policy, partial(actor_critic(policy).role, "reference")),
        "adapter off": (bare, partial(actor_critic(bare).role, "reference")),
        "own model": (bare, partial(actor_critic(bare, ref_model=make_model()).role, "reference")),
    }


def state_of(policy):
    layers = [m for m in policy.modules() if hasattr(m, "active_adapters") and hasattr(m, "lora_A")]
    return (
        {name: p.requires_grad for name, p in policy.named_parameters()},
        [(list(layer.active_adapters), layer.disable_adapters) for layer in layers],
        policy.active_adapter,
    )


@pytest.mark.parametrize("way", ["adapter", "frozen copy", "adapter off", "own model"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_switch_of_roles_leaves_nothing_behind(way, fails):
    policy, switch = switches()[way]
    before = state_of(policy)
    assert len(set(before[0].values())) == 2
    try:
        with switch():
            if way != "own model":
                assert state_of(policy) != before
            if fails:
                raise KeyError("a reward function, say")
    except KeyError:
        assert fails
    assert state_of(policy) == before


def test_the_role_is_the_actor_again_after_an_error():
    rows = ragged_rows()
    for actor in (actor_critic(adapted()), actor_critic(adapted(), ref_model=make_model(seed=5))):
        with torch.no_grad():
            before = actor(*as_batch(rows)).logprobs
            with pytest.raises(KeyError), actor.role("reference"):
                assert gap(actor(*as_batch(rows)).logprobs, before) > 1e-2
                raise KeyError
            assert torch.equal(actor(*as_batch(rows)).logprobs, before)


@pytest.mark.parametrize("critic", ["shared", "adapter", "separate"])
def test_roles_nest_and_the_one_before_comes_back(critic):
    """The actor of a plain copy is the oracle of each role."""
    policy = adapted()
    if critic == "adapter":
        policy.add_adapter("critic", policy.peft_config["default"])
    policy.add_adapter("judge", policy.peft_config["default"])
    for i, (name, parameter) in enumerate(policy.named_parameters()):
        if "lora_B.critic" in name or "lora_B.judge" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    value_model = make_model(seed=7) if critic == "separate" else None
    actor = actor_critic(policy, critic=critic, value_model=value_model)
    ids, mask, _ = as_batch(ragged_rows())

    def hidden():
        return actor.runner.last_hidden(actor.active_model, ids, mask)

    with torch.no_grad():
        seen = {}
        with actor.role("reference"):
            seen["reference"] = hidden()
            with actor.role("critic"):
                seen["critic"] = hidden()
                with actor.role("judge"):
                    seen["judge"] = hidden()
                    with actor.role("actor"):
                        seen["actor"] = hidden()
                assert torch.equal(hidden(), seen["critic"])
            assert torch.equal(hidden(), seen["reference"])
        assert torch.equal(hidden(), seen["actor"])
        of_critic = {"shared": "default", "adapter": "critic", "separate": value_model}[critic]
        for role, adapter in {"actor": "default", "reference": None, "judge": "judge", "critic": of_critic}.items():
            if isinstance(adapter, torch.nn.Module):
                expected = actor.runner.last_hidden(value_model, ids, mask)
            else:
                with use_adapter(policy, adapter):
                    expected = hidden()
            assert torch.equal(seen[role], expected)
    apart = [gap(seen[a], seen[b]) for a in seen for b in seen if a < b and {a, b} != {"actor", "critic"}]
    assert min(apart) > 1e-3 and (gap(seen["actor"], seen["critic"]) > 1e-3) == (critic != "shared")
    with pytest.raises(ValueError, match="no adapter 'nobody' here"), actor.role("nobody"):
        pass
    assert actor.active_model is actor.language_model


def test_an_adapter_that_does_not_exist_leaves_the_active_ones():
    policy = adapted(modules_to_save=["lm_head"], target_modules=["q_proj"])
    before = state_of(policy)
    with pytest.raises(Exception, match="nobody"), use_adapter(policy, "nobody"):
        actor_critic(policy)(*as_batch(ragged_rows()))
        raise KeyError("nobody")
    assert state_of(policy) == before


def test_a_wholly_saved_module_follows_the_switch():
    policy = adapted(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    policy, rows = load_policy(policy, peft_config=None), ragged_rows()
    actor = actor_critic(policy)
    with torch.no_grad():
        start = actor(*as_batch(rows)).logprobs
        for name, parameter in policy.named_parameters():
            if "modules_to_save.default" in name:
                parameter.mul_(0.5)
        with actor.role("reference"):
            assert torch.equal(actor(*as_batch(rows)).logprobs, start)
        assert gap(actor(*as_batch(rows)).logprobs, start) > 1e-2


# --- on disk ---


def tensors_in(file):
    with safe_open(file, "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def greedy(model, prompts, length=12):
    ids, mask = left_pad(prompts, PAD)
    return model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=length, pad_token_id=PAD, eos_token_id=EOS
    )[:, ids.shape[1] :]


PROMPTS = [prompt for prompt, _ in ragged_rows()]


@pytest.fixture(params=[False, True], ids=["new adapter", "continued adapter"])
def saved(request, tmp_path):
    """A base on disk, and an actor-critic on it, saved."""
    make_model().save_pretrained(tmp_path / "base")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora())
    policy = load_policy(policy, peft_config=None) if request.param else policy
    actor = actor_critic(moved(policy), kind="mlp")
    actor.save_pretrained(tmp_path / "out")
    return tmp_path / "base", tmp_path / "out", actor


def test_only_the_adapter_and_the_value_head_are_written(saved):
    _, folder, actor = saved
    assert {file.name for file in folder.iterdir()} - {"README.md"} == {
        "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors",
    }  # fmt: skip
    adapter = tensors_in(folder / "adapter_model.safetensors")
    live = {n.replace(".default", ""): p for n, p in actor.policy.named_parameters() if ".default." in n}
    assert adapter.keys() == live.keys() and all("lora_" in name for name in adapter)
    assert all(torch.equal(adapter[name], live[name]) for name in adapter)
    head = tensors_in(folder / "value_head.safetensors")
    assert head.keys() == actor.value_head.state_dict().keys()
    assert all(torch.equal(head[name], value) for name, value in actor.value_head.state_dict().items())


def test_plain_peft_loads_the_adapter_on_the_plain_base_and_generates_the_same(saved):
    base, folder, actor = saved
    plain_base = AutoModelForCausalLM.from_pretrained(base).eval()
    of_the_base = greedy(plain_base, PROMPTS)
    loaded = PeftModel.from_pretrained(plain_base, folder).eval()
    assert torch.equal(greedy(loaded, PROMPTS), greedy(actor.policy, PROMPTS))
    assert not torch.equal(greedy(loaded, PROMPTS), of_the_base)
    rows = ragged_rows()
    with torch.no_grad():
        assert gap_to_plain(actor(*as_batch(rows)), loaded, rows) < 1e-5


def test_what_was_saved_is_what_is_loaded(saved):
    base, folder, actor = saved
    policy = load_policy(AutoModelForCausalLM.from_pretrained(base), peft_config=lora())
    fresh = ActorCritic(policy, ValueHead(32, "mlp")).eval()
    batch = as_batch(ragged_rows())
    with torch.no_grad():
        wanted, before = actor(*batch), fresh(*batch)
        fresh.load_weights(folder)
        found = fresh(*batch)
    for name in ("logprobs", "values"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
        assert gap(getattr(before, name), getattr(wanted, name)) > 1e-2


def test_a_fully_trained_model_loads_as_a_causal_language_model(tmp_path):
    actor = actor_critic(make_model(seed=4))
    actor.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LlamaForCausalLM)
    weights = actor.policy.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in loaded.state_dict().items())
    other = actor_critic(make_model(seed=5))
    nn.init.zeros_(other.value_head.layers[0].weight)
    other.load_weights(tmp_path)
    batch = as_batch(ragged_rows())
    with torch.no_grad():
        assert torch.equal(other(*batch).logprobs, actor(*batch).logprobs)
        assert torch.equal(other(*batch).values, actor(*batch).values)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fully_trained_model_comes_back_with_its_ties_and_dtype(tmp_path, tied, dtype):
    actor = actor_critic(make_model(seed=4, tie_word_embeddings=tied).to(dtype))
    actor.save_pretrained(tmp_path)
    other = actor_critic(make_model(seed=5, tie_word_embeddings=tied).to(dtype))
    other.load_weights(tmp_path)
    for (name, found), wanted in zip(other.policy.named_parameters(), actor.policy.parameters(), strict=True):
        assert found.dtype == dtype and torch.equal(found, wanted), name
    assert (other.policy.lm_head.weight is other.policy.model.embed_tokens.weight) == tied


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("value_head.safetensors", None, "has no value_head.safetensors"),
        ("value_head.safetensors", lambda t: t.pop("layers.0.bias"), "Missing key.*layers.0.bias"),
        ("adapter_model.safetensors", lambda t: t.pop(sorted(t)[3]), "does not fit this model: missing .*lora_"),
        ("adapter_model.safetensors", lambda t: t.update(extra=torch.ones(1)), "unexpected .*extra"),
        ("adapter_model.safetensors", lambda t: t.update({k: v[:, :1] for k, v in t.items()}), "size mismatch"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path, file, change, message):
    actor = actor_critic(adapted())
    actor.save_pretrained(tmp_path)
    actor.load_weights(tmp_path)
    (tmp_path / file).unlink() if change is None else edit(tmp_path / file, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        actor.load_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing .*layers.1.mlp.up_proj"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected .*extra"),
    ],
)
def test_an_incomplete_model_is_refused(tmp_path, change, message):
    actor = actor_critic()
    actor.save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", change)
    before = snapshot(actor)
    with pytest.raises(ValueError, match=message):
        actor.load_weights(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())


# --- generate, as transformers has it ---


@pytest.mark.parametrize("peft_config", [lora(lora_dropout=0.5), None], ids=["adapter", "in full"])
def test_the_model_answers_as_what_it_saves_does(tmp_path, base, peft_config):
    """Right after training: without dropout, and what was in training is so afterward."""
    trainer = make_trainer(tmp_path, model=str(base), peft_config=peft_config, config={"max_steps": 4})
    trainer.train()
    trainer.save_model()
    inputs = make_tokenizer()(["the film", "a"], padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    trainer.model.train()
    found = trainer.model.generate(**inputs, **options)
    assert trainer.model.training and all(m.training for m in trainer.model.modules() if isinstance(m, nn.Dropout))
    saved = make_model() if peft_config else AutoModelForCausalLM.from_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(saved, tmp_path) if peft_config else saved
    assert torch.equal(found, policy.eval().generate(**inputs, **options))
    assert not torch.equal(found, make_model().eval().generate(**inputs, **options))  # training has moved it


# --- sample ---


def answer(actor, prompts, noise, **options):
    options = {"stop_ids": [EOS], "pad_token_id": PAD, **options}
    return actor.sample(*left_pad(prompts, PAD), noise, **options)


def uniform(rows, length, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first_token_frequencies(actor, prompt, n, **options):
    noise = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    tokens = answer(actor, [prompt] * n, noise, **options).tokens[:, 0]
    return torch.bincount(tokens, minlength=VOCABULARY).double() / n


def next_token_distribution(model, prompt, temperature):
    with torch.no_grad():
        return (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_first_tokens_come_as_often_as_softmax_says(temperature):
    model, n = make_model().eval(), 2000
    found = first_token_frequencies(actor_critic(copy.deepcopy(model)), PROMPTS[0], n, temperature=temperature)
    wanted = next_token_distribution(model, PROMPTS[0], temperature)
    assert gap(found, wanted) < 1 / n
    assert gap(found, next_token_distribution(model, PROMPTS[0], temperature + 0.2)) > 10 / n


def by_hand_top_k(p):
    kept = sorted(range(len(p)), key=lambda i: -p[i])[:5]
    return [x if i in kept else 0.0 for i, x in enumerate(p)]


def by_hand_top_p(p):
    kept, total = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        kept.append(i)
        total += p[i]
        if total >= 0.6:
            break
    return [x if i in kept else 0.0 for i, x in enumerate(p)]


def by_hand_min_p(p):
    return [x if x >= 0.2 * max(p) else 0.0 for x in p]


@pytest.mark.parametrize(
    ("option", "keep"),
    [({"top_k": 5}, by_hand_top_k), ({"top_p": 0.6}, by_hand_top_p), ({"min_p": 0.2}, by_hand_min_p)],
)
def test_truncation_samples_the_kept_tokens_in_proportion_and_scores_them_whole(tmp_path, option, keep):
    model, n = make_model().eval(), 2000
    actor, logits_processor = (
        actor_critic(copy.deepcopy(model)),
        build_logits_processor(make_config(tmp_path, **option)),
    )
    whole = next_token_distribution(model, PROMPTS[0], 0.7)
    kept = torch.tensor(keep(whole.tolist()), dtype=torch.float64)
    assert 2 <= (kept > 0).sum() < (whole > 1 / n).sum()
    found = first_token_frequencies(actor, PROMPTS[0], n, temperature=0.7, logits_processor=logits_processor)
    assert gap(found, kept / kept.sum()) < 1 / n
    out = answer(actor, PROMPTS, uniform(4, 6), temperature=0.7, logits_processor=logits_processor, stop_ids=[EOS])
    with torch.no_grad():
        forward = actor(*responses_as_batch(PROMPTS, out.tokens, [EOS]), temperature=0.7)
    real = response_mask(out.tokens, [EOS])
    assert gap(out.logprobs[real], forward.logprobs[real]) < 1e-5


def test_no_truncation_is_no_warp(tmp_path):
    assert build_logits_processor(make_config(tmp_path)) is None


def responses_as_batch(prompts, tokens, stop_ids):
    ids, mask = left_pad(prompts, PAD)
    attended = response_mask(tokens, stop_ids).long()
    return torch.cat([ids, tokens], 1), torch.cat([mask, attended], 1), tokens.shape[1]


MANY_STOPS = [EOS, 5, 9, 14, 20, 33]


@everywhere
def test_decoding_computes_the_log_probabilities_that_forward_does(architecture):
    actor = actor_critic(ARCHITECTURES[architecture]())
    out = answer(actor, PROMPTS, uniform(4, 10), temperature=0.7, stop_ids=MANY_STOPS)
    with torch.no_grad():
        forward = actor(*responses_as_batch(PROMPTS, out.tokens, MANY_STOPS), temperature=0.7)
    real = response_mask(out.tokens, MANY_STOPS)
    assert gap(out.logprobs[real], forward.logprobs[real]) < 1e-5
    assert torch.equal(out.logprobs[~real], torch.zeros((~real).sum()))


@everywhere
def test_a_row_is_answered_alone_as_it_is_in_any_batch(architecture):
    actor = actor_critic(ARCHITECTURES[architecture]())
    prompts = [prompt for prompt, _ in ragged_rows(prompts=(7, 3, 1, 5, 2, 9, 4, 6), responses=(1,) * 8)]
    noise = uniform(8, 12, seed=3)
    options = {"temperature": 1.0, "stop_ids": MANY_STOPS}
    together = answer(actor, prompts, noise, **options)
    lengths = response_mask(together.tokens, MANY_STOPS).sum(1)
    assert len(lengths.unique()) >= 4
    for i, prompt in enumerate(prompts):
        assert torch.equal(answer(actor, [prompt], noise[i : i + 1], **options).tokens[0], together.tokens[i])
    order = torch.tensor([5, 2, 7, 0])
    shuffled = answer(actor, [prompts[i] for i in order], noise[order], **options)
    assert torch.equal(shuffled.tokens, together.tokens[order])


def test_finished_rows_are_not_computed_any_more():
    actor, rows_seen = actor_critic(), []

    def count(module, args, kwargs):
        rows_seen.append(len(kwargs["input_ids"]))

    hook = actor.policy.model.register_forward_pre_hook(count, with_kwargs=True)
    out = answer(actor, PROMPTS * 4, uniform(16, 12), stop_ids=MANY_STOPS)
    hook.remove()
    assert rows_seen == sorted(rows_seen, reverse=True)
    assert sum(rows_seen) == response_mask(out.tokens, MANY_STOPS).sum() < 16 * 12


@everywhere
def test_at_a_tiny_temperature_it_is_the_greedy_generate_of_transformers(architecture):
    model = ARCHITECTURES[architecture]()
    expected = greedy(model, PROMPTS)
    found = answer(actor_critic(model), PROMPTS, uniform(4, 12), temperature=1e-5).tokens
    assert torch.equal(found[:, : expected.shape[1]], expected)
    assert (found[:, expected.shape[1] :] == PAD).all()


def test_the_models_own_generation_config_has_no_say():
    plain_actor, actor = actor_critic(), actor_critic()
    settings = actor.policy.generation_config
    settings.top_k, settings.repetition_penalty, settings.eos_token_id = 1, 3.0, [4, 5, 6]
    noise = uniform(4, 12)
    assert torch.equal(answer(actor, PROMPTS, noise).tokens, answer(plain_actor, PROMPTS, noise).tokens)


@pytest.mark.parametrize("stop_ids", [[EOS], [5], [9, 14], MANY_STOPS])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_every_stop_id_ends_a_response_and_padding_follows(stop_ids, pad):
    actor, noise = actor_critic(), uniform(32, 12, seed=4)
    endless = answer(actor, PROMPTS * 8, noise, stop_ids=[]).tokens.tolist()
    found = answer(actor, PROMPTS * 8, noise, stop_ids=stop_ids, pad_token_id=pad).tokens.tolist()
    ended = 0
    for free, row in zip(endless, found, strict=True):
        end = next((t + 1 for t, token in enumerate(free) if token in stop_ids), len(free))
        assert row == free[:end] + [pad] * (len(free) - end)
        ended += end < len(free)
    assert ended > 0


def test_generation_draws_no_random_numbers():
    actor, noise = actor_critic(), uniform(4, 6)
    state = torch.get_rng_state()
    answer(actor, PROMPTS, noise)
    assert torch.equal(torch.get_rng_state(), state)


# --- sample ---

LOG0 = float("-inf")
JUST_UNDER_1 = 1 - 2**-53


@pytest.fixture(params=[False, True], ids=["default", "deterministic algorithms"])
def summing_up(request):
    """With deterministic algorithms, sums are of whole numbers."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("summing_up")
@pytest.mark.parametrize(
    ("logits", "noise", "token"),
    [
        ([0.0, 0.0, 0.0, 0.0], 0.0, 0),
        ([0.0, 0.0, 0.0, 0.0], 0.25, 1),
        ([0.0, 0.0, 0.0, 0.0], 0.2499999, 0),
        ([0.0, 0.0, 0.0, 0.0], JUST_UNDER_1, 3),
        ([LOG0, LOG0, 0.0, 0.0], 0.0, 2),
        ([0.0, 0.0, LOG0, LOG0], JUST_UNDER_1, 1),
        ([LOG0, 0.0, LOG0, 1.0, LOG0], 0.0, 1),
        ([LOG0, 0.0, LOG0, 1.0, LOG0], JUST_UNDER_1, 3),
        ([LOG0, LOG0, 3.0, LOG0], 0.5, 2),
        ([-1e30, 2.0, -1e30], 0.0, 1),
        ([-1e30, 2.0, -1e30], JUST_UNDER_1, 1),
    ],
)
def test_noise_at_the_edges_picks_a_possible_token(logits, noise, token):
    found = sample(torch.tensor([logits]), torch.tensor([noise], dtype=torch.float64))
    assert found.tolist() == [token]


@pytest.mark.usefixtures("summing_up")
@pytest.mark.parametrize("vocabulary", [50, 5_000, 150_000])
def test_impossible_tokens_are_never_chosen_however_sums_are_rounded(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=generator) * 3
    impossible = vocabulary // 5
    logits[:, :impossible] = logits[:, -impossible:] = LOG0
    for noise in (0.0, 2**-53, 0.5, 1 - 2**-52, JUST_UNDER_1):
        found = sample(logits, torch.full((40,), noise, dtype=torch.float64))
        assert (found >= impossible).all() and (found < vocabulary - impossible).all()


@pytest.mark.usefixtures("summing_up")
@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000, 1024])
def test_groups_of_tokens_draw_what_the_plain_running_sum_draws(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(500, vocabulary, generator=generator) * 2
    noise = torch.rand(500, generator=generator, dtype=torch.float64)
    edges = logits.double().softmax(-1).cumsum(-1)
    plain = torch.searchsorted(edges, noise[:, None], right=True).squeeze(-1).clamp(max=vocabulary - 1)
    near = ((edges - noise[:, None]).abs() < 1e-6).any(-1)  # there, fp32 may round to the neighbor
    assert near.sum() < 10
    assert torch.equal(sample(logits, noise)[~near], plain[~near])


@pytest.mark.usefixtures("summing_up")
@pytest.mark.parametrize("top_p", [1e-20, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
    logits[0, 10:] = LOG0
    logits[1, 3] = 40.0  # all of the probability
    logits[2], logits[2, 5:9] = LOG0, 0.0  # a quarter each
    found = top_p_filter(logits, top_p)
    assert torch.equal(found, TopPLogitsWarper(top_p)(None, logits))
    assert not torch.equal(found, top_p_filter(logits, 0.7 if top_p < 0.7 else 0.2))


@pytest.mark.usefixtures("summing_up")
def test_logits_that_are_no_numbers_still_give_a_token():
    found = sample(torch.full((4, 1000), float("nan")), torch.rand(4, dtype=torch.float64))
    assert (found >= 0).all() and (found < 1000).all()


# --- reward adapters and refusals ---


def reward_folder(folder, **options):
    torch.manual_seed(3)
    base = LlamaForSequenceClassification(
        make_model().config.__class__(**{**make_model().config.to_dict()}, num_labels=1)
    )
    base.model.load_state_dict(make_model().model.state_dict())
    form = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "target_modules": ["q_proj"]}
    reward = get_peft_model(base, lora(**form | options))
    moved_from_the_start(reward).save_pretrained(folder)
    return reward.eval()


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "PeftModel"])
@pytest.mark.parametrize(
    ("marks", "moves"),
    [
        ({}, True),
        ({"hf_device_map": {"": "cpu"}}, True),
        ({"hf_device_map": {"model.layers.0": 0, "model.layers.1": "cpu"}}, False),
        ({"is_quantized": True}, False),
    ],
    ids=["loaded", "on one device", "spread", "quantized"],
)
def test_a_model_is_moved_unless_it_is_spread_or_quantized(wrapped, marks, moves):
    base = make_model()
    vars(base).update(marks)
    model = get_peft_model(base, lora()) if wrapped else base
    move_if_movable(model, torch.device("meta"))
    assert {p.device.type for p in model.parameters()} == {"meta" if moves else "cpu"}


def test_a_mounted_reward_model_scores_as_alone_and_leaves_the_trainable_set(tmp_path):
    alone = reward_folder(tmp_path)
    actor = actor_critic(adapted(), kind="mlp")
    before = state_of(actor.policy)
    head = actor.load_reward_adapter("judge", tmp_path)
    after = state_of(actor.policy)
    assert {n: v for n, v in after[0].items() if ".judge." not in n} == before[0]
    added = {n: v for n, v in after[0].items() if ".judge." in n}
    assert added and not any(added.values()) and not head.weight.requires_grad
    assert after[1:] == before[1:]
    check_scores_as_alone(actor, head, alone)
    assert state_of(actor.policy) == after


def check_scores_as_alone(actor, head, alone):
    texts = [prompt + response for prompt, response in ragged_rows()]
    width = max(map(len, texts))
    ids = torch.tensor([t + [PAD] * (width - len(t)) for t in texts])
    with torch.no_grad():
        scores = actor.reward_scores("judge", head, ids, (ids != PAD).long(), PAD)
        for text, score in zip(texts, scores, strict=True):
            assert gap(alone(input_ids=torch.tensor([text])).logits[0, 0], score) < 1e-5


REWARD_ADAPTERS = {
    "DoRA": {"use_dora": True},
    "biases of its own": {"lora_bias": True},
    "rank-stabilized": {"use_rslora": True},
    "minor components": {"init_lora_weights": "mica"},
    "ranks by layer": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 7}},
    "one layer": {"layers_to_transform": [1]},
    "single tokens": {"trainable_token_indices": [4, 9]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole norms": {"modules_to_save": ["score", "norm"]},
    "whole embeddings": {"modules_to_save": ["score", "embed_tokens"]},
}


@pytest.mark.parametrize("options", REWARD_ADAPTERS.values(), ids=REWARD_ADAPTERS)
def test_a_mounted_reward_model_of_any_form_scores_as_alone_and_leaves_actor_and_reference(tmp_path, options):
    alone, rows = reward_folder(tmp_path / "reward", **options), as_batch(ragged_rows())
    actor = actor_critic(adapted(), kind="mlp").eval()

    def say():
        with torch.no_grad():
            with actor.role("reference"):
                reference = actor(*rows).logprobs
            return reference, actor(*rows).logprobs

    before = say()
    head = actor.load_reward_adapter("judge", tmp_path / "reward")
    check_scores_as_alone(actor, head, alone)
    actor.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(make_model(), tmp_path / "saved").eval()
    assert gap_to_plain(actor(*rows), again, ragged_rows()) < 1e-5
    assert all(gap(a, b) < 1e-6 for a, b in zip(say(), before, strict=True))
    assert gap(*before) > 1e-2


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_beside_an_actor_of_any_form_a_reward_model_scores_as_alone_and_both_are_saved(tmp_path, options):
    alone = reward_folder(tmp_path / "reward")
    policy = moved_from_the_start(get_peft_model(make_model(), lora(**options)))
    actor, rows = actor_critic(policy, kind="mlp").eval(), as_batch(ragged_rows())
    with torch.no_grad():
        before = actor(*rows).logprobs
        head = actor.load_reward_adapter("judge", tmp_path / "reward")
        check_scores_as_alone(actor, head, alone)
        assert torch.equal(actor(*rows).logprobs, before)
    actor.save_pretrained(tmp_path / "saved")
    actor.policy.save_pretrained(tmp_path / "judge", selected_adapters=["judge"])
    again = PeftModel.from_pretrained(make_model(), tmp_path / "saved").eval()
    assert gap_to_plain(actor(*rows), again, ragged_rows()) < 1e-5
    score = load_file(tmp_path / "judge" / "judge" / "adapter_model.safetensors")
    assert len(score) == 4  # A and B of two layers
    assert gap_to_plain(actor(*rows), make_model().eval(), ragged_rows()) > 1e-2


def test_an_adapter_that_brings_weights_of_the_base_is_refused_unless_they_are_the_same(tmp_path):
    reward_folder(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights, name = load_file(file), "base_model.model.model.embed_tokens.weight"
    embeddings = make_model().model.embed_tokens.weight.detach()
    save_file({**weights, name: embeddings}, file)
    actor_critic(adapted(), kind="mlp").load_reward_adapter("judge", tmp_path)
    save_file({**weights, name: embeddings + 1}, file)
    with pytest.raises(ValueError, match="has other weights than this base for .*embed_tokens.weight"):
        actor_critic(adapted(), kind="mlp").load_reward_adapter("judge", tmp_path)


def test_a_mounted_reward_model_is_not_written(tmp_path):
    reward_folder(tmp_path / "reward")
    actor = actor_critic(adapted())
    actor.save_pretrained(tmp_path / "before")
    actor.load_reward_adapter("judge", tmp_path / "reward")
    actor.save_pretrained(tmp_path / "after")
    before, after = (tensors_in(tmp_path / f / "adapter_model.safetensors") for f in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not (tmp_path / "after" / "judge").exists()


def test_an_encoder_decoder_is_refused():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        ActorCritic(model, ValueHead(16), ref_model=make_model())


def test_a_model_without_a_language_model_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        ActorCritic(LlamaModel(make_model().config), ValueHead(32), ref_model=make_model())


class Tripled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output


def test_a_head_that_does_more_than_is_known_is_refused():
    with pytest.raises(ValueError, match="Tripled computes its logits in an unsupported way"):
        actor_critic(Tripled(make_model().config))
    assert gap(logits_function(make_model())(torch.ones(1, 32)), make_model().lm_head(torch.ones(1, 32))) == 0


def test_the_tokenizers_vocabulary_is_the_models():
    assert len(make_tokenizer()) == VOCABULARY


def test_switching_to_the_mode_it_is_in_visits_no_module(monkeypatch):
    actor = actor_critic(make_model().eval())  # the base comes as from_pretrained leaves it, the adapter in training
    assert all(module.training for module in actor.train().modules())
    visits, visit = [], nn.Linear.train
    monkeypatch.setattr(nn.Linear, "train", lambda self, mode=True: visits.append(mode) or visit(self, mode))
    actor.train()
    assert not visits
    assert not any(module.training for module in actor.eval().modules()) and visits
    actor.policy.train()  # behind its back
    assert not any(module.training for module in actor.eval().modules())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_casts_to_bf16_what_autocast_is_for_and_no_more(dtype):
    """In a bf16 model autocast would cast thin products again that `lora` computes in fp32."""
    policy = adapted().to(dtype)
    for name, parameter in policy.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    actor = actor_critic(policy)
    ids, noise = torch.arange(4, 16).view(2, 6), torch.rand(2, 5, dtype=torch.float64)
    plainly = actor.sample(ids, torch.ones_like(ids), noise, stop_ids=[EOS], pad_token_id=PAD)
    with torch.autocast("cpu", torch.bfloat16):
        found = actor.sample(ids, torch.ones_like(ids), noise, stop_ids=[EOS], pad_token_id=PAD)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.logprobs, plainly.logprobs) == (dtype == torch.bfloat16)
