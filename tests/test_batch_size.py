"""Batch sizes shrink when memory runs out and grow back, and accumulating gradients holds one set of them."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from conftest import PeakMemory, lora, make_model, make_trainer, trained_weights
from datasets import Dataset
from test_faults import DiesInBackward

from ppo_plus.kernels.batch_backoff import MAX_PATIENCE, PATIENCE, BatchSize, is_out_of_memory
from ppo_plus.memory import DryRun, PlannerConfig
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.backbone_runner import BackboneRunner


class Card:
    """Runs out of memory beyond so many rows; records the sizes of all passes."""

    def __init__(self, fits):
        self.fits, self.tried = fits, []

    def __call__(self, rows):
        self.tried.append(len(rows))
        if len(rows) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory (as if)")


def passes(size, card, count, rows=8):
    """The sizes that each of so many passes over all rows has tried."""
    found = []
    for _ in range(count):
        card.tried = []
        size.run(torch.arange(rows), card)
        found.append(card.tried)
    return found


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_a_size_grows_back_after_a_passing_lack_of_memory():
    size, card = BatchSize(8), Card(fits=2)
    assert passes(size, card, 1) == [[8, 4, 2, 2, 2, 2]]
    card.fits = 8
    assert passes(size, card, 2 * PATIENCE + 2) == [[2] * 4] * PATIENCE + [[4] * 2] * PATIENCE + [[8]] * 2
    assert size.rows == 8  # and no larger, however long it fits
    assert passes(size, card, 10, rows=20) == [[8, 8, 4]] * 10


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_a_size_that_stays_too_large_is_tried_ever_less():
    size, card = BatchSize(8), Card(fits=4)
    found = passes(size, card, 1000)
    failed = [i for i, tried in enumerate(found) if 8 in tried]
    gaps = [b - a for a, b in itertools.pairwise(failed)]
    assert gaps[:4] == [PATIENCE + 1, 2 * PATIENCE + 1, 4 * PATIENCE + 1, 8 * PATIENCE + 1]
    assert max(gaps) == MAX_PATIENCE + 1
    assert sum(map(len, found)) < 1.02 * 2 * len(found)  # two passes of four rows, and hardly any more


def test_each_smaller_size_is_warned_of_once():
    size, card = BatchSize(8), Card(fits=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        passes(size, card, 30)
    said = [str(w.message) for w in caught]
    assert [text for text in said if "Out of memory" in text] == said
    assert [text.split()[9] for text in said] == ["4", "2"]


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_every_row_is_processed_once_whatever_the_sizes():
    size, done = BatchSize(8), []
    for most in (8, 3, 8, 8, 8, 1, 8, 8):

        def process(rows, most=most):
            if len(rows) > most:
                raise torch.OutOfMemoryError
            done.extend(rows.tolist())

        size.run(torch.arange(11), process)
        assert done == list(range(11))
        done.clear()


def test_what_accelerate_takes_for_a_lack_of_memory_is_another_set():
    """Why its `should_reduce_batch_size` is not used: it misses the driver's words and cuBLAS's."""
    from accelerate.utils.memory import should_reduce_batch_size

    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        assert is_out_of_memory(RuntimeError(text)) and not should_reduce_batch_size(RuntimeError(text))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."))


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_a_rollout_decodes_all_prompts_at_once_again(tmp_path):
    trainer, sizes = make_trainer(tmp_path, config={"max_steps": 16}), []
    sample = trainer.model.sample

    def once(ids, *args, **kwargs):
        sizes.append(len(ids))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("another process had the memory")
        return sample(ids, *args, **kwargs)

    trainer.model.sample = once
    trainer.train()
    assert sizes == [8, 4, 4] + [4, 4] * PATIENCE + [8]


def dies_once(monkeypatch, at, phase):
    """The `at`-th pass that learns runs out of memory; returns the rows of all that learn."""
    forward, run, sizes = ActorCritic.forward, BackboneRunner.run, []

    def counting(self, input_ids, *args, **kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(input_ids))
            if phase == "forward" and len(sizes) == at:
                raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return forward(self, input_ids, *args, **kwargs)

    def dying(self, *args, **kwargs):
        out = run(self, *args, **kwargs)
        if phase == "backward" and torch.is_grad_enabled() and len(sizes) == at:
            out.last_hidden_state = DiesInBackward.apply(out.last_hidden_state)
        return out

    monkeypatch.setattr(ActorCritic, "forward", counting)
    monkeypatch.setattr(BackboneRunner, "run", dying)
    return sizes


FOUR = {"max_steps": 2, "num_mini_batches": 1, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("undisturbed"), config=FOUR)
    trainer.train()
    return trained_weights(trainer), trainer.state.log_history


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("spoil", [False, True])
def test_a_later_micro_batch_that_dies_has_the_step_begun_anew(tmp_path, monkeypatch, undisturbed, phase, spoil):
    """Its gradients and metrics count once; negative control: the earlier micro-batches are not run again."""
    sizes = dies_once(monkeypatch, 3, phase)
    trainer = make_trainer(tmp_path, config=FOUR)
    if spoil:
        monkeypatch.setattr(trainer._accumulator, "_restart", lambda model, *args: model.zero_grad())
    with pytest.warns(UserWarning, match=r"reduced to 1 rows"):
        trainer.train()
    expected, expected_log = undisturbed
    found = trained_weights(trainer)
    apart = max((found[name] - expected[name]).abs().max() for name in expected)
    assert (apart < 1e-5) != spoil
    if spoil:
        return
    assert sum(sizes) == 2 * 8 + sum(sizes[:3])  # two steps of 8 rows, and what was given up
    for row, expected_row in zip(trainer.state.log_history, expected_log, strict=True):
        for name in ("loss", "grad_norm", "critic/grad_norm", "ppo/ratio", "ppo/value_loss", "clip_ratio/policy"):
            assert row.get(name) == pytest.approx(expected_row.get(name), abs=1e-4)


class TestPeak:
    """Bytes of a micro-batch above the parameters and the gradients of those before it."""

    SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}

    def peaks(self, tmp_path, monkeypatch, keep=False):
        config = {"max_steps": 1, "optim": "sgd", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        trainer = make_trainer(tmp_path, model=make_model(**self.SIZES), peft_config=None, config=config)
        step, found = trainer.training_step, []

        def measured(model, inputs, tokens):
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            kept = [p.grad for p in trained] if keep else []
            for parameter in trained if keep else []:
                parameter.grad = None
            known = [*trainer.model.parameters(), *trainer.model.buffers(), *inputs.values()]
            known += [p.grad for p in trained if p.grad is not None] + [g for g in kept if g is not None]
            known = [tensor for tensor in known if isinstance(tensor, torch.Tensor)]
            with PeakMemory(known) as memory:
                loss = step(model, inputs, tokens)
            found.append(memory.peak)
            return loss

        monkeypatch.setattr(trainer, "training_step", measured)
        trainer.train()
        return found, sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)

    def test_accumulating_holds_one_set_of_gradients(self, tmp_path, monkeypatch):
        found, one_set = self.peaks(tmp_path, monkeypatch)
        assert max(found[1:]) < 0.5 * one_set  # activations, and the gradient of a layer before it is added

    def test_a_second_set_would_be_seen(self, tmp_path, monkeypatch):
        """Negative control: the gradients before a pass are put aside, as they were."""
        found, one_set = self.peaks(tmp_path, monkeypatch, keep=True)
        assert min(found[1:]) > one_set

    @pytest.mark.parametrize("rows", [2, 6])
    def test_the_planner_counts_what_a_micro_batch_holds(self, tmp_path, monkeypatch, rows):
        """One set of gradients, Adam's two moments, and the activations of the pass."""
        sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
        model = make_model(**sizes, eos_token_id=499)
        config = {
            "max_steps": 1, "num_mini_batches": 1, "per_device_train_batch_size": rows, "response_length": 40,
            "gradient_accumulation_steps": 3, "cache_frozen_layers": False, "stop_token_id": None,
        }  # fmt: skip
        prompts = Dataset.from_dict({"prompt": ["abcdefgh" * 3] * 32})
        trainer = make_trainer(tmp_path, model=model, peft_config=lora(), config=config, train_dataset=prompts)
        trainer.model.runner.sdpa_models = []  # the planner plans for a card
        step, found = trainer.training_step, []

        def measured(model, inputs, tokens):
            known = [*trainer.model.parameters(), *trainer.model.buffers()]
            known += [p.grad for p in trainer.model.parameters() if p.grad is not None]
            with PeakMemory([*known, *(x for x in inputs.values() if isinstance(x, torch.Tensor))]) as memory:
                loss = step(model, inputs, tokens)
            found.append((inputs["action_mask"].shape, memory.peak))
            return loss

        monkeypatch.setattr(trainer, "training_step", measured)
        trainer.train()
        assert [shape for shape, _ in found] == [(rows, 40)] * 3
        setup = PlannerConfig(prompt_length=24, response_length=40, quantization="fp32", lora_r=4, reward="none")
        parts = DryRun(model.config, setup).learn(rows).parts
        assert max(peak for _, peak in found[1:]) == pytest.approx(parts["activations"] + parts["logits"], rel=0.05)
        trained = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
        assert (parts["gradients"], parts["optimizer"]) == (trained, 2 * trained)
