"""Passes without padding: the numbers and gradients of padded ones, from real tokens alone."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from conftest import PeakMemory, lora, make_model, make_trainer
from peft import get_peft_model
from test_architectures import FAMILIES, build
from test_modeling import VOCABULARY, adapted, as_batch, moved, plain, ragged_rows
from torch import nn

from ppo_plus import PPOCallback
from ppo_plus.kernels import packing
from ppo_plus.kernels.cpu_attention import PACKED
from ppo_plus.kernels.frozen_layers import decoder_layers, layer_input
from ppo_plus.kernels.packing import NO_PACKING, LengthBuckets, Packing, bucket_by_length, make_packing
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.logprobs import logits_function
from ppo_plus.models.value_head import ValueHead
from ppo_plus.rollout.buffer import LeftPaddedLayout

CPU = torch.device("cpu")
ROWS = ragged_rows(prompts=(7, 3, 1, 5, 12), responses=(4, 6, 2, 1, 9))


def actor_critic(policy, **options):
    options.setdefault("ref_model", None if hasattr(policy, "peft_config") else copy.deepcopy(policy))
    actor = ActorCritic(policy, ValueHead(policy.config.get_text_config().hidden_size), **options).eval()
    torch.manual_seed(1)
    nn.init.normal_(actor.value_head.layers[0].weight, std=0.5)
    return actor


def right_aligned(rows=ROWS, order=None):
    """What a micro-batch holds of these rows: ids, mask, R, and which tokens are real."""
    ids, mask, length = as_batch(rows if order is None else [rows[i] for i in order])
    aligned = LeftPaddedLayout.from_attention_mask(mask, length)
    return (
        aligned.align_tokens(ids),
        aligned.align_tokens(mask),
        aligned.max_response_len,
        {"response_mask": aligned.response_mask, "seq_lens": aligned.seq_lens},
    )


def numbers(actor, inputs, **options):
    out = actor(*inputs, 0.7, with_entropy=True, **options)
    return torch.stack([out.logprobs, out.values, out.entropy])


class Tokens:
    """Counts the tokens that go through a model's first layer."""

    def __init__(self, model):
        self.seen = []
        layer = decoder_layers(model.base_model)[0]
        layer.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, layer, args, kwargs):
        self.seen.append(layer_input(*args, **kwargs).shape[:-1].numel())


# --- to and fro ---


@pytest.mark.parametrize("order", [None, (4, 2, 0, 1, 3)], ids=["", "another order"])
def test_real_tokens_are_packed_row_by_row_and_put_back(order):
    ids, mask, _, real = right_aligned(order=order)
    lengths = [tokens for tokens, _ in real["seq_lens"]]
    found = Packing(mask, lengths)
    x = torch.randn(*mask.shape, 3)
    slow = [x[row, column] for row in range(5) for column in range(mask.shape[1]) if mask[row, column]]
    assert torch.equal(found.pack(x)[0], torch.stack(slow))
    assert torch.equal(found.unpack(found.pack(x)), x * mask[..., None])
    assert found.pack(ids).tolist() == [[i for row in range(5) for i in ids[row, -lengths[row] :].tolist()]]


def test_its_gradients_are_those_of_indexing():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 0]])
    there = Packing(mask, [2, 3, 1])
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(there.pack, padded)
    assert torch.autograd.gradcheck(there.unpack, packed)


@pytest.mark.parametrize(
    ("tokens", "min_padding", "packs"),
    [(96, 0.05, False), (94, 0.05, True), (99, 0.0, True), (100, 0.0, False), (0, 0.0, False)],
)
def test_little_padding_stays(tokens, min_padding, packs):
    mask = torch.ones(4, 25)
    mask.view(-1)[tokens:] = 0
    assert (make_packing(mask, mask.sum(1).int().tolist(), min_padding) is not NO_PACKING) == packs
    assert make_packing(None, [1], min_padding) is NO_PACKING and make_packing(mask, None, min_padding) is NO_PACKING


# --- groups of rows in attention ---


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_group_are_at_least_half_as_long_as_its_longest_and_groups_are_few(seed):
    lengths = torch.randint(0, 200, (17,), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = bucket_by_length(lengths)
    assert sorted(row for group in groups for row in group) == [row for row in range(17) if lengths[row]]
    by_length = [[lengths[row] for row in group] for group in groups]
    assert [length for group in by_length for length in group] == sorted(length for length in lengths if length)
    assert all(group[0] >= group[-1] / 2 for group in by_length)
    # With the next longer row of another group, a group would be too uneven.
    assert all(group[-1] < after[-1] / 2 for group, after in pairwise(by_length))


@pytest.mark.parametrize("lengths", [[3, 1, 7, 2, 7], [1, 2, 4, 8], [5], [2, 0, 9], [6, 6]])
def test_groups_hold_each_row_left_aligned_and_give_it_back(lengths):
    groups, tokens = LengthBuckets(lengths, CPU), torch.arange(1, sum(lengths) + 1).view(1, -1, 1)
    rows = [row[row != 0].tolist() for part in groups.split(tokens) for row in part[..., 0]]
    expected = [part.tolist() for part in tokens[0, :, 0].split(lengths)]
    assert sorted(rows) == sorted(part for part in expected if part)
    for part, rows in zip(groups.split(tokens), groups.parts, strict=True):
        assert torch.equal(part[..., 0] != 0, mask := rows.mask)
        assert mask[:, 0].all() and bool((mask[:, 1:] <= mask[:, :-1]).all())
    assert torch.equal(groups.merge(groups.split(tokens)), tokens)


# --- the model's numbers ---

# Their states run on from row to row.
HYBRID = ("Bamba", "Falcon-H1", "Granite 4", "LFM 2", "Qwen3.5", "Qwen3.5, with vision")
# Not loaded with sdpa, with an attention of their own, or with keys of other layers.
OWN = ("Gemma 2", "BLOOM", "Falcon", "Mamba", "Mamba 2", "gpt-oss", "Gemma 4")
RAGGED = [([5, 6, 7], [8]), ([9] * 12, [10, 11]), ([12], [13, 14, 15]), ([16, 17, 3, 5, 20], [6] * 7)]


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_a_padded_pass_whatever_the_architecture(family):
    actor = actor_critic(build(family))
    packs = family not in (*HYBRID, *OWN)
    assert len(actor.runner.packable_models) == 2 * packs  # the reference is a copy
    *inputs, real = right_aligned(RAGGED)
    count = Tokens(actor.language_model)
    with torch.no_grad():
        found, expected = numbers(actor, inputs, **real), numbers(actor, inputs) * real["response_mask"]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    padded, streams = inputs[0][:, 1:].numel(), 2 if family == "Gemma 3n" else 1  # it has two for each token
    assert count.seen == [n * streams for n in (sum(n - 1 for n, _ in real["seq_lens"]) if packs else padded, padded)]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("critic", ["shared", "detached", "adapter"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_those_of_a_padded_pass(kind, critic, checkpointing):
    results = []
    for packed in (True, False):
        policy = adapted()
        if critic == "adapter":
            policy.add_adapter("critic", lora())
            moved(policy, 3, "critic").set_adapter("default")
            for name, parameter in policy.named_parameters():
                parameter.requires_grad_("lora_" in name)
        torch.manual_seed(4)
        actor = ActorCritic(policy, ValueHead(32, kind), critic=critic).train()
        nn.init.normal_(actor.value_head.layers[-1].weight, std=0.5)
        if checkpointing:
            actor.activation_checkpointing_enable()
        *inputs, real = right_aligned()
        count = Tokens(actor.language_model)
        out = numbers(actor, inputs, **(real if packed else {})) * real["response_mask"]
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        results.append({n: p.grad for n, p in actor.named_parameters() if p.grad is not None} | {"numbers": out})
        assert (set(count.seen) == {inputs[0][:, 1:].numel()}) != packed
    assert results[0].keys() == results[1].keys()
    assert min(g.abs().max() for g in results[1].values()) > 1e-3
    for name, gradient in results[1].items():
        assert (results[0][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@torch.no_grad()
def test_each_row_is_what_it_is_alone():
    """The oracle is the plain model on one row, in double precision from its logits on."""
    policy = adapted()
    actor = actor_critic(policy)
    *inputs, real = right_aligned()
    found = actor(*inputs, 0.7, with_entropy=True, **real)
    for row, (prompt, response) in enumerate(ROWS):
        logprobs, entropy = plain(policy, prompt, response, 0.7)
        n = len(response)
        torch.testing.assert_close(found.logprobs[row, -n:].double(), logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.entropy[row, -n:].double(), entropy, rtol=1e-4, atol=1e-5)
        assert found.logprobs[row, :-n].abs().sum() == found.values[row, :-n].abs().sum() == 0


@torch.no_grad()
def test_tokens_that_were_put_into_the_wrong_rows_would_be_noticed(monkeypatch):
    """Negative control of all of the above: groups that hand back their rows in another order."""
    actor = actor_critic(adapted())
    *inputs, real = right_aligned()
    right = numbers(actor, inputs, **real)
    merge = LengthBuckets.merge
    monkeypatch.setattr(LengthBuckets, "merge", lambda groups, parts: merge(groups, [part.flip(0) for part in parts]))
    assert (numbers(actor, inputs, **real) - right).abs().max() > 1e-2


@torch.no_grad()
def test_a_row_leaves_no_trace_in_its_neighbors():
    actor = actor_critic(adapted())
    *inputs, real = right_aligned()
    before = numbers(actor, inputs, **real)
    inputs[0][2, -real["seq_lens"][2][0] :] = 7
    after = numbers(actor, inputs, **real)
    others = torch.arange(5) != 2
    assert torch.equal(after[:, others], before[:, others])
    assert (after - before)[:, 2].abs().max() > 1e-2


@torch.no_grad()
def test_the_order_of_rows_does_not_matter():
    actor, order = actor_critic(adapted()), [4, 1, 0, 3, 2]
    found = [numbers(actor, batch[:3], **batch[3]) for batch in (right_aligned(), right_aligned(order=order))]
    torch.testing.assert_close(found[0][:, order], found[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_reward_adapter_reads_texts_that_are_padded_on_the_right():
    policy = adapted()
    policy.add_adapter("reward", lora())
    actor, head = actor_critic(moved(policy, 5, "reward")), torch.nn.Linear(32, 1, bias=False)
    ids = torch.randint(4, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    lengths = [9, 2, 4, 1]
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    count = Tokens(actor.language_model)
    found = actor.prefix_rewards("reward", head, ids, mask, lengths)
    expected = actor.prefix_rewards("reward", head, ids, mask) * mask
    assert count.seen == [sum(lengths), mask.numel()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_vocabulary_is_asked_for_response_tokens_alone(monkeypatch):
    seen, scored = [], logits_function

    def counting(model):
        def logits(hidden):
            seen.append(hidden.shape[:-1].numel())
            return scored(model)(hidden)

        return logits

    monkeypatch.setattr("ppo_plus.models.actor_critic.logits_function", counting)
    actor = actor_critic(adapted())
    for asked, padded in ((True, False), (False, True)):
        *inputs, real = right_aligned()
        seen.clear()
        actor(*inputs, 0.7, **(real if asked else {}))
        most = len(ROWS) * inputs[2]
        assert (sum(seen[1:]) == sum(n for _, n in real["seq_lens"]), sum(seen[1:]) == most) == (asked, padded)


@torch.no_grad()
def test_after_a_packed_pass_the_model_is_what_it_was():
    """The name of the attention stays, for what a backward pass computes again; all else must not notice."""
    policy = adapted()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = policy(input_ids=ids).logits
    generated = policy.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    actor = actor_critic(policy)
    *inputs, real = right_aligned()
    actor(*inputs, 0.7, **real)
    assert policy.config._attn_implementation == PACKED
    assert torch.equal(policy(input_ids=ids).logits, before)
    assert torch.equal(policy.generate(input_ids=ids, max_new_tokens=5, do_sample=False), generated)
    padded = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    logits = policy(input_ids=padded[0], attention_mask=padded[1], position_ids=positions).logits
    torch.testing.assert_close(logits[0, 2:], policy(input_ids=ids[:, :2]).logits[0], rtol=1e-4, atol=1e-4)


def test_memory_follows_the_real_tokens():
    """15 short rows and a long one: 157 tokens of 832, and as much less memory, but for what a pass takes anyway."""
    rows = ragged_rows(prompts=(3,) * 16, responses=(5,) * 15 + (50,))
    *inputs, real = right_aligned(rows)
    actor, peaks = actor_critic(adapted()), {}
    for packed in (True, False):
        with PeakMemory() as memory:
            out = actor(*inputs, 0.7, **(real if packed else {}))
            (out.logprobs + out.values).sum().backward()
        peaks[packed] = memory.peak
        actor.zero_grad()
    assert sum(n - 1 for n, _ in real["seq_lens"]) == 157 and inputs[0][:, 1:].numel() == 832
    assert peaks[True] < 0.35 * peaks[False]


# --- training ---


class Spy(PPOCallback):
    def on_rollout_end(self, args, state, control, rollout, **kwargs):
        self.lengths = rollout.lengths()


def trained(folder, packs, **config):
    """A trainer after two rollouts of uneven length, its weights, and the tokens of its passes."""
    spy = Spy()
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **config}
    trainer = make_trainer(folder, config=settings, callbacks=[spy])
    if not packs:
        trainer.model.runner.packable_models = []
    count = Tokens(trainer.model.language_model)
    trainer.train()
    assert int(spy.lengths.max()) > 1.3 * int(spy.lengths.min())
    return trainer, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad], sum(count.seen)


def test_training_is_the_same_up_to_rounding_over_fewer_tokens(tmp_path):
    packed, weights, tokens = trained(tmp_path / "packed", True)
    padded, expected, more = trained(tmp_path / "padded", False)
    start = [p for p in make_trainer(tmp_path / "start").model.parameters() if p.requires_grad]
    moved_by = max((a - b).abs().max() for a, b in zip(expected, start, strict=True))
    off = max((a - b).abs().max() for a, b in zip(weights, expected, strict=True))
    assert off < 1e-5 < 1e-3 < moved_by
    assert tokens < 0.95 * more
    for trainer in (packed, padded):
        assert trainer.state.log_history[0]["ppo/initial_ratio_error"] == 0.0


def test_padding_costs_less_than_a_twentieth_of_the_tokens(tmp_path, monkeypatch):
    """Of all passes that score and learn; what each is given is written down where it is decided."""
    passes = []

    def watched(mask, lengths, min_padding=0.0):
        found = make_packing(mask, lengths, min_padding)
        if min_padding:
            passes.append((sum(lengths), mask.numel() if found is NO_PACKING else sum(lengths), mask.numel()))
        return found

    monkeypatch.setattr("ppo_plus.models.backbone_runner.make_packing", watched)
    trained(tmp_path, True)
    assert len(passes) > 8
    assert all(taken <= real / 0.95 for real, taken, _ in passes)
    assert sum(padded for *_, padded in passes) > 1.15 * sum(real for real, *_ in passes)  # negative control


def test_compiled_layers_keep_their_padding(tmp_path):
    *inputs, real = right_aligned()
    actor = actor_critic(get_peft_model(make_model(), lora()))
    actor.compile_layers(backend="eager")
    count = Tokens(actor.language_model)
    actor(*inputs, 0.7, **real)
    assert set(count.seen) == {inputs[0][:, 1:].numel()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_differ_keep_a_model_padded(monkeypatch, dtype):
    def leaking(*args, **kwargs):  # rows see each other
        out, weights = attention(*args, **kwargs)
        return out.cumsum(1), weights

    attention = packing.AttentionInterface._global_mapping[PACKED]
    monkeypatch.setitem(packing.AttentionInterface._global_mapping, PACKED, leaking)
    assert actor_critic(adapted().to(dtype)).runner.packable_models == []
    monkeypatch.undo()
    assert len(actor_critic(adapted().to(dtype)).runner.packable_models) == 1


def test_a_model_with_dropout_that_is_in_training_is_packed_too():
    """Whether it can be is tried out without dropout, which would make any two passes differ."""
    policy = get_peft_model(make_model(attention_dropout=0.5), lora()).train()
    actor = ActorCritic(policy, ValueHead(policy.config.get_text_config().hidden_size))
    assert len(actor.runner.packable_models) == 1
    assert actor.language_model.training
