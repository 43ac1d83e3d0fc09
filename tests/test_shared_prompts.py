"""Prompts that are read once for all responses to them: the numbers and gradients of repeated prompts."""

from __future__ import annotations

import pytest
import torch
from conftest import Recorder, lora, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import get_peft_model
from test_architectures import FAMILIES, build
from test_frozen_layers import deep_model, top
from test_modeling import VOCABULARY, adapted, moved, plain
from test_packing import HYBRID, OWN, Tokens, actor_critic, numbers, right_aligned
from test_quantized import nf4
from transformers import AutoModelForCausalLM

from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.kernels import cpu_attention, packing
from ppo_plus.kernels.packing import NO_PACKING
from ppo_plus.kernels.prompt_cache import PromptStates, SharedPromptLayer
from ppo_plus.kernels.shared_prompts import (
    PromptBuckets,
    bucket_prefixes,
    common_prefixes,
    make_shared_packing,
)
from ppo_plus.models import backbone_runner
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.training.gradients import index_batch

CPU = torch.device("cpu")
# By prompt: its tokens, and those of each response to it. Windows of the tiny models are shorter than most prompts.
PROMPTS, RESPONSES = (8, 3, 5, 1), ((4, 1, 6), (2, 2, 5), (3, 7, 1), (9,))
PREFIXES = [(i, PROMPTS[i]) for i, sizes in enumerate(RESPONSES) for _ in sizes]


# They have no keys of their own in each layer, or an attention that is no function of transformers.
REPEATED = (*HYBRID, *(family for family in OWN if family not in ("Gemma 2", "gpt-oss")))


def drawn_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()

    return [
        (prompt, draw(n))
        for size, sizes in zip(PROMPTS, RESPONSES, strict=True)
        for prompt in [draw(size)]
        for n in sizes
    ]


ROWS = drawn_rows()
TOKENS = sum(PROMPTS) + sum(n - 1 for sizes in RESPONSES for n in sizes)  # that a pass runs


def sharing(actor) -> ActorCritic:
    actor.runner.enable_shared_prompts(3)
    return actor


def both(actor, rows=ROWS, prefixes=PREFIXES):
    """Numbers and gradients of all weights, shared and repeated, and the tokens of the two passes."""
    *inputs, real = right_aligned(ROWS)
    count, results = Tokens(actor.language_model), []
    for options in ({"prefixes": PREFIXES}, {}):
        actor.zero_grad()
        out = numbers(actor, inputs, **real, **options) * real["response_mask"]
        if any(p.requires_grad for p in actor.parameters()):
            (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        gradients = {n: p.grad.clone() for n, p in actor.named_parameters() if p.grad is not None}
        results.append({"numbers": out.detach(), **gradients})
    return *results, count.seen


def assert_equal(found, expected, atol=1e-5):
    """Numbers, and gradients as one vector, to 1e-5; a tensor whose gradient is lost in that is seen by itself."""
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found.pop("numbers"), expected.pop("numbers"), rtol=0, atol=atol)
    gaps = {name: (found[name] - gradient).abs() for name, gradient in expected.items()}
    total, off = (sum(g.double().square().sum() for g in gradients.values()) for gradients in (expected, gaps))
    assert off**0.5 <= 1e-5 * total**0.5 > 0
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert gaps[name].max() <= 5e-5 * max(gradient.abs().max(), 1e-2 * largest), name


# Which tokens run, and where


def test_tokens_of_a_pass_are_each_prompt_once_and_what_follows_it():
    """Prompts of 2 and 3 tokens with two responses each, and one row that shares nothing; by hand."""
    rows = [[11, 12, 1], [21, 22, 23], [11, 12, 2, 3], [31, 32], [21, 22, 23, 4]]
    ids = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    prefixes, lengths = [(7, 2), (9, 3), (7, 2), (1, 1), (9, 3)], [len(row) for row in rows]
    packing = make_shared_packing(ids != 0, lengths, prefixes)
    prompts, own, alone = [11, 12, 21, 22, 23], [1, 2, 3, 4], [31, 32]
    assert packing.pack(ids)[0].tolist() == prompts + own + alone
    assert torch.equal(packing.unpack(packing.pack(ids)[..., None])[..., 0], ids)
    last = packing.unpack_last(packing.pack(ids)[..., None], 2)[..., 0]
    assert last.tolist() == ids[:, -2:].tolist()
    buckets = packing.attention_buckets(CPU)
    queries, keys = (
        [part.tolist() for part in parts]
        for parts in (buckets.split(packing.pack(ids)), buckets.split_keys(packing.pack(ids)))
    )
    assert queries == [[[0, 11, 12], [21, 22, 23]], [[1, 0], [2, 3], [0, 0], [4, 0]], [[31, 32]]]
    assert keys[1] == [[0, 11, 12, 1, 0], [0, 11, 12, 2, 3], [21, 22, 23, 0, 0], [21, 22, 23, 4, 0]]
    for part, row_keys in zip(buckets.parts, keys, strict=True):
        assert part.mask.tolist() == [[key != 0 for key in row] for row in row_keys]
    assert torch.equal(buckets.merge(buckets.split(packing.pack(ids))), packing.pack(ids))


def test_gradients_of_a_prompt_are_the_sums_of_its_rows():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    packing = make_shared_packing(mask, [3, 4, 2], [(0, 2), (0, 2), (1, 2)])
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(1, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, padded)
    assert torch.autograd.gradcheck(packing.unpack, packed)
    assert torch.autograd.gradcheck(lambda x: packing.unpack_last(x, 2), packed)
    assert torch.autograd.gradcheck(packing.attention_buckets(CPU).split_keys, packed)


@pytest.mark.parametrize(
    ("prefixes", "shares"),
    [([(0, 10), (0, 10)], True), ([(0, 10), (1, 10)], False), ([(0, 1), (0, 1)], False), (None, False)],
)
def test_little_that_is_shared_is_repeated(prefixes, shares):
    packing = make_shared_packing(torch.ones(2, 20), [20, 20], prefixes, 0.05)
    assert (packing is not NO_PACKING) == shares


def test_buckets_have_groups_of_as_many_rows_and_prefixes_of_similar_length():
    prefixes = [(0, 9), (0, 9), (1, 8), (1, 8), (2, 2), (2, 2), (3, 0), (3, 0), (4, 5)]
    buckets = bucket_prefixes([12, 10, 9, 9, 3, 4, 6, 7, 6], prefixes)
    found = {(tuple(map(tuple, b.rows)), tuple(b.prefix_lengths)) for b in buckets}
    assert found == {(((2, 3), (0, 1)), (8, 9)), (((4, 5),), (2,)), (((6,), (8,), (7,)), (6, 6, 7))}


# The numbers of a model


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_gradients_are_those_of_repeated_prompts_whatever_the_architecture(family):
    actor = actor_critic(build(family))
    if family in REPEATED:
        with pytest.warns(UserWarning, match="num_generations=3: .* because its hidden states would differ"):
            sharing(actor)
    else:
        sharing(actor)
    found, expected, tokens = both(actor)
    streams = 2 if family == "Gemma 3n" else 1  # it has two for each token
    assert (tokens[0] == TOKENS * streams) == (family not in REPEATED)
    assert expected["numbers"].std() > 0.05
    assert_equal(found, expected)


@pytest.mark.parametrize("critic", ["shared", "detached", "adapter"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_all_critics_and_recomputed_activations_share(critic, checkpointing):
    policy = adapted()
    if critic == "adapter":
        policy.add_adapter("critic", lora())
        moved(policy, 3, "critic").set_adapter("default")
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_("lora_" in name)
    actor = sharing(actor_critic(policy, critic=critic).train())
    if checkpointing:
        actor.activation_checkpointing_enable()
    found, expected, tokens = both(actor)
    assert tokens[0] == TOKENS < 0.8 * tokens[-1]
    assert_equal(found, expected)


def test_a_quantized_base_shares(tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4())
    found, expected, tokens = both(sharing(actor_critic(moved(get_peft_model(base, lora())))))
    assert tokens[0] == TOKENS
    assert_equal(found, expected, atol=2e-5)


@torch.no_grad()
def test_each_row_is_what_it_is_alone():
    """The oracle is the plain model on one row, in double precision from its logits on."""
    policy = adapted()
    *inputs, real = right_aligned(ROWS)
    found = sharing(actor_critic(policy))(*inputs, 0.7, with_entropy=True, prefixes=PREFIXES, **real)
    for row, (prompt, response) in enumerate(ROWS):
        logprobs, entropy = plain(policy, prompt, response, 0.7)
        n = len(response)
        torch.testing.assert_close(found.logprobs[row, -n:].double(), logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.entropy[row, -n:].double(), entropy, rtol=1e-4, atol=1e-5)
        assert found.logprobs[row, :-n].abs().sum() == found.values[row, :-n].abs().sum() == 0


@torch.no_grad()
def test_a_response_leaves_no_trace_in_its_siblings():
    actor = sharing(actor_critic(adapted()))
    *inputs, real = right_aligned(ROWS)
    before = numbers(actor, inputs, prefixes=PREFIXES, **real)
    inputs[0][2, -RESPONSES[0][2] :] = 7
    after = numbers(actor, inputs, prefixes=PREFIXES, **real)
    others = torch.arange(len(ROWS)) != 2
    assert torch.equal(after[:, others], before[:, others])
    assert (after - before)[:, 2].abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("family", ["Gemma 2", "gpt-oss", "Mistral"])
def test_after_a_shared_pass_the_model_is_what_it_was(family):
    """The name of the attention stays, for activation checkpointing; soft caps and sinks must stay with it."""
    plain_model = build(family)
    ids, options = torch.tensor([[5, 6, 7, 8, 9, 10]]), {"max_new_tokens": 6, "do_sample": False}
    before, generated = plain_model(input_ids=ids).logits, plain_model.generate(input_ids=ids, **options)
    actor = sharing(actor_critic(plain_model))
    *inputs, real = right_aligned(ROWS)
    numbers(actor, inputs, prefixes=PREFIXES, **real)
    assert "packed" in plain_model.config._attn_implementation
    assert torch.equal(plain_model(input_ids=ids).logits, before)
    assert torch.equal(plain_model.generate(input_ids=ids, **options), generated)


def leaking(buckets, x):
    """Rows attend to the own tokens of the row before them."""
    return [
        part if part.shape[1] == mask.queries else part.roll(1, 0)
        for part, mask in zip(split_keys(buckets, x), buckets.parts, strict=True)
    ]


split_keys = PromptBuckets.split_keys


@torch.no_grad()
def test_a_response_that_sees_its_sibling_is_noticed(monkeypatch):
    """Negative control of all of the above."""
    actor = sharing(actor_critic(adapted()))
    *inputs, real = right_aligned(ROWS)
    right = numbers(actor, inputs, prefixes=PREFIXES, **real)
    monkeypatch.setattr(PromptBuckets, "split_keys", leaking)
    assert (numbers(actor, inputs, prefixes=PREFIXES, **real) - right).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_responses_see_each_other_shares_nothing(dtype, monkeypatch):
    assert len(sharing(actor_critic(adapted().to(dtype))).runner.sharing_models) == 1
    monkeypatch.setattr(PromptBuckets, "split_keys", leaking)
    with pytest.warns(UserWarning, match="LlamaForCausalLM .* its hidden states would differ"):
        assert sharing(actor_critic(adapted().to(dtype))).runner.sharing_models == []


def test_compiled_layers_and_switched_off_kernels_repeat_prompts_and_say_so():
    actor = actor_critic(adapted())
    actor.compile_layers(backend="eager")
    with pytest.warns(UserWarning, match="its layers are compiled"):
        sharing(actor)
    with pytest.warns(UserWarning, match="kernels are turned off"):
        sharing(actor_critic(adapted(), use_kernels=False))


@torch.no_grad()
def test_rows_of_a_torn_group_share_what_is_left_of_it():
    """A micro-batch that ran out of memory is cut anywhere."""
    actor = sharing(actor_critic(adapted()))
    ids, mask, length, real = right_aligned(ROWS)
    whole = numbers(actor, (ids, mask, length), prefixes=PREFIXES, **real)
    batch = {"ids": ids, "mask": mask, "prefixes": PREFIXES, **real}
    count = Tokens(actor.language_model)
    for rows in torch.arange(len(ROWS)).split(4):
        part = index_batch(batch, rows)
        inputs = part.pop("ids"), part.pop("mask"), length
        torch.testing.assert_close(numbers(actor, inputs, **part), whole[:, rows], rtol=1e-4, atol=1e-5)
    assert sum(count.seen) == TOKENS + PROMPTS[1] + PROMPTS[2]  # their groups are in two parts


# Decoding


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 3n", "Falcon-H1", "Mamba", "LFM 2", "DeepSeek V3"])
def test_a_prompt_is_prefilled_once_and_its_cache_copied(family):
    actor = actor_critic(build(family))
    prompts = [[5, 6, 7, 8, 9, 10], [8, 9], [15, 16, 17]]
    ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    prompt_of_row, uniforms = torch.tensor([0, 0, 0, 1, 2, 2]), sampling_uniforms(0, 6, 7)
    options = {"stop_ids": [2, *range(10, 16)], "pad_token_id": 0, "temperature": 0.7}
    count = Tokens(actor.language_model)
    found = actor.sample(ids, (ids != 0).long(), uniforms, prompt_of_row, **options)
    once = count.seen[0]
    repeated = ids[prompt_of_row]
    expected = actor.sample(repeated, (repeated != 0).long(), uniforms, **options)
    assert once * 2 == max(count.seen)
    assert torch.equal(found.tokens, expected.tokens) and len({tuple(row) for row in found.tokens.tolist()}) >= 4
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


@pytest.fixture
def plain_products(monkeypatch):
    """Plain attention in fp32, too, where numbers can be compared."""
    for module in (cpu_attention, packing, backbone_runner):
        monkeypatch.setattr(module, "prefer_eager", lambda *_: True)


@pytest.mark.parametrize("family", ["Llama", "Cohere", "GPT-2", "Mistral", "Gemma 3n", "Falcon-H1", "DeepSeek V3"])
def test_a_cache_holds_a_prompt_once_and_the_tokens_stay(plain_products, monkeypatch, family):
    actor, caches, real = actor_critic(build(family)), [], backbone_runner.share_prompts
    actor.runner.enable_shared_prompts(2)
    monkeypatch.setattr(backbone_runner, "share_prompts", lambda cache, rows: caches.append(cache) or real(cache, rows))
    prompts = [[5, 6, 7, 8, 9, 10], [8, 9], [15, 16, 17]]
    ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    prompt_of_row, uniforms = torch.tensor([0, 2, 0, 1, 0, 2]), sampling_uniforms(0, 6, 9)
    options = {"stop_ids": [2, *range(10, 16)], "pad_token_id": 0, "temperature": 0.7}
    found = actor.sample(ids, (ids != 0).long(), uniforms, prompt_of_row, **options)
    assert bool(caches) == bool(actor.runner.cache_sharing_models) == (family in ("Llama", "Cohere", "GPT-2"))
    for layer in caches[0].layers if caches else ():
        assert isinstance(layer, SharedPromptLayer) and layer.prompts.keys.shape[2] == 6
        assert len(layer.prompts.keys) < 3 and len(layer.keys) < 6  # rows left, and prompts with them
    actor.runner.cache_sharing_models = []
    expected = actor.sample(ids, (ids != 0).long(), uniforms, prompt_of_row, **options)
    lengths = (found.tokens != 0).sum(1).tolist()
    assert torch.equal(found.tokens, expected.tokens) and (not caches or len(set(lengths)) > 2)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_an_attention_that_ignores_the_prompts_does_not_share_them(plain_products, monkeypatch):
    actor = actor_critic(build("Llama"))
    merge = PromptStates.merge
    monkeypatch.setattr(PromptStates, "merge", lambda self, x: torch.zeros_like(merge(self, x)))
    actor.runner.enable_shared_prompts(2)
    assert actor.runner.cache_sharing_models == [] and actor.runner.sharing_models


# Reward adapters


@pytest.mark.parametrize(
    ("rows", "prefixes"),
    [
        ([[5, 6, 7, 8], [5, 6, 7], [5, 6, 9], [5, 1, 2]], [(1, 2), (1, 2), (1, 2), (0, 3)]),
        ([[1, 2], [3, 4], [1, 2]], [(0, 2), (1, 2), (0, 2)]),
        ([[1, 2, 3, 4, 5], [1, 9, 9, 9, 9]], [(0, 5), (1, 5)]),
    ],
)
def test_rows_that_begin_alike_are_grouped(rows, prefixes):
    """By hand: half of each row, at least, must be shared."""
    assert common_prefixes(rows) == prefixes


@pytest.mark.parametrize("given", ["text", "ids"])
def test_a_mounted_reward_adapter_reads_a_prompt_once(tmp_path, base, reward_adapter, given):
    prompts = make_prompts(4)
    if given == "ids":
        ids = make_tokenizer()(list(prompts["prompt"]))["input_ids"]
        prompts = Dataset.from_dict({"input_ids": ids})
    results = []
    for shares in (True, False):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        trainer, _, _ = run(
            tmp_path / str(shares), shares, model=model, reward_funcs=str(reward_adapter), train_dataset=prompts,
            config={"max_steps": 1, "response_length": 6}, seen=(seen := Recorder()),
        )  # fmt: skip
        trainer.model.eval()
        batch, adapter = seen.samples[0].completions, trainer.collector.rewards.rewards[0]
        count = Tokens(trainer.model.language_model)
        scores = adapter(batch)
        results.append((torch.tensor(scores), seen.samples[0].prefix_scores, sum(count.seen)))
    (found, prefixes, tokens), (expected, expected_prefixes, more) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prefixes, expected_prefixes, rtol=1e-5, atol=1e-5)
    assert tokens < 0.85 * more and found.std() > 0.01


# Training


def run(folder, shares=True, **options):
    trainer = make_trainer(
        folder,
        callbacks=[options.pop("seen", Recorder())],
        config={
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            **options.pop("config", {}),
        },
        **options,
    )
    if not shares:
        trainer.model.runner.sharing_models = []
    count = Tokens(trainer.model.language_model)
    trainer.train()
    return trainer, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad], sum(count.seen)


@pytest.mark.parametrize(
    "options",
    [{}, {"config": {"critic": "adapter", "entropy_coef": 0.01}}, {"model": deep_model, "peft_config": top(2, 3)},
     {"config": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}}],
    ids=["shared critic", "critic adapter", "cached layers", "half of a group in a micro-batch"],
)  # fmt: skip
def test_training_is_the_same_up_to_rounding_over_fewer_tokens(tmp_path, options):
    def arguments():
        return {name: value() if callable(value) else value for name, value in options.items()}

    shared, weights, tokens = run(tmp_path / "shared", **arguments())
    repeated, expected, more = run(tmp_path / "repeated", shares=False, **arguments())
    assert max((a - b).abs().max() for a, b in zip(weights, expected, strict=True)) < 1e-5
    assert tokens < 0.85 * more
    for trainer in (shared, repeated):
        assert trainer.state.log_history[0]["ppo/initial_ratio_error"] == 0.0
        assert trainer.state.log_history[0]["ppo/policy_loss"] != 0


def test_the_first_ratio_is_1_to_the_bit_in_bf16(tmp_path):
    trainer, _, _ = run(tmp_path, model=make_model().to(torch.bfloat16), config={"bf16": True, "max_steps": 5})
    assert len(trainer.model.runner.sharing_models) == 1
    errors = [row["ppo/initial_ratio_error"] for row in trainer.state.log_history if "ppo/initial_ratio_error" in row]
    assert errors == [0.0, 0.0]
