"""What PPOTrainer takes for granted about `transformers.Trainer`, asserted on a plain `Trainer`.

Most of these hooks are private. When an upgrade of transformers breaks PPO, the test that fails here says which
promise is gone, before the tests of PPO fail for reasons that are hard to read.
"""

from __future__ import annotations

import inspect
import json
import random

import pytest
import torch
from conftest import make_trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ExportableState

from ppo_plus import PPOTrainer

SIGNATURES = {
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "_wrap_model": ["model", "training", "dataloader"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "set_initial_training_values": ["args", "dataloader"],
    "get_train_dataloader": [],
    "get_optimizer_cls_and_kwargs": ["args", "model"],
    "_clip_grad_norm": ["model"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_save": ["output_dir", "state_dict"],
    "_save_rng_state": ["output_dir"],
    "_load_rng_state": ["checkpoint"],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_load_callback_state": [],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["logs", "start_time"],
    "predict": ["test_dataset", "ignore_keys", "metric_key_prefix"],
    "_determine_best_metric": ["metrics", "trial"],
    "_evaluate": ["trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_prepare_input": ["data"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "create_model_card": [
        "language",
        "license",
        "tags",
        "model_name",
        "finetuned_from",
        "tasks",
        "dataset_tags",
        "dataset",
        "dataset_args",
    ],
}
INHERITED = [
    "_inner_training_loop", "_run_epoch", "create_optimizer", "create_scheduler",
    "_maybe_log_save_evaluate", "_save_optimizer_and_scheduler", "save_model",
]  # fmt: skip
OURS = [cls for cls in PPOTrainer.__mro__ if cls.__module__.startswith("ppo_plus.")]
OVERRIDDEN = [n for cls in OURS for n in vars(cls) if n != "__init__" and callable(getattr(Trainer, n, None))]


def parameters_of(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# By name


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_hooks_have_the_signatures_that_we_know(name):
    assert parameters_of(getattr(Trainer, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_takes_what_trainer_passes(name):
    assert name in SIGNATURES, f"PPOTrainer overrides Trainer.{name}: say here what it relies on"
    # More may follow: `create_model_card` also takes the `dataset_name` of TRL's trainers.
    assert parameters_of(getattr(PPOTrainer, name))[: len(SIGNATURES[name])] == SIGNATURES[name]


@pytest.mark.parametrize("name", INHERITED)
def test_the_loop_is_trainers_own(name):
    assert getattr(PPOTrainer, name) is getattr(Trainer, name)
    assert not any(name in vars(cls) for cls in OURS)


def test_trainer_asks_whether_the_loss_is_scaled():
    assert Trainer.loss_is_scaled_for_ga is None
    assert PPOTrainer.loss_is_scaled_for_ga is True


# By what happens: a Trainer that learns one number, and writes down what is asked of it


class Events(TrainerCallback):
    """Callback events, in the list of the trainer's own."""

    def __init__(self, events):
        self.events = events

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append(("on_step_begin", state.global_step))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.events.append(("on_pre_optimizer_step", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("on_step_end", state.global_step))


class Sampler:
    """A batch sampler that says which epoch it is in."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        for index in range(self.length):
            yield [100 * self.epoch + index]


class Numbers:
    """The dataset whose item is its own index."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


class Loader(DataLoader):
    """Passes the epoch on; a plain DataLoader does not."""

    def set_epoch(self, epoch):
        self.batch_sampler.set_epoch(epoch)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor = nn.Parameter(torch.ones(()))
        self.critic = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (self.actor + self.critic) * x


class Probe(Trainer):
    """A Trainer whose dataloader yields indices and whose micro-batches come from `get_batch_samples` alone."""

    micro_batches_per_epoch = 8

    def __init__(self, tmp_path, callbacks=(), **config):
        defaults = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
            "max_steps": 3, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1, "dataloader_pin_memory": False, "learning_rate": 0.5, "optim": "sgd",
            "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
        }  # fmt: skip
        self.events, self.sampler = [], Sampler(self.micro_batches_per_epoch)
        super().__init__(
            Toy(),
            TrainingArguments(**{**defaults, **config}),
            data_collator=list,
            train_dataset=Numbers(),
            eval_dataset=Numbers(),
            callbacks=[Events(self.events), *callbacks],
        )

    def named(self, *names):
        return [event for event in self.events if event[0] in names]

    def get_train_dataloader(self):
        return Loader(Numbers(), batch_sampler=self.sampler, collate_fn=list)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        drawn = [next(epoch_iterator) for _ in range(num_batches)]
        self.events.append(("get_batch_samples", self.state.global_step, num_batches, drawn, device))
        step = float(self.state.global_step)
        return [{"x": torch.tensor([step, float(i)])} for i in range(num_batches)], torch.tensor(10.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.events.append(("compute_loss", self.state.global_step, inputs["x"].tolist(), num_items_in_batch.item()))
        return model(inputs["x"]).sum() / num_items_in_batch

    def _clip_grad_norm(self, model):
        self.events.append(("_clip_grad_norm", self.state.global_step, model.actor.grad.item()))
        return torch.tensor(123.0)

    def _save(self, output_dir=None, state_dict=None):
        self.events.append(("_save", self.state.global_step, output_dir))
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial):
        self.events.append(("_save_checkpoint", self.state.global_step))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        self.events.append(("_save_rng_state", self.state.global_step, output_dir))
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint):
        self.events.append(("_load_rng_state", self.state.global_step, checkpoint))
        super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.events.append(("_load_from_checkpoint", self.state.global_step, resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        self.events.append(("_load_best_model", self.state.best_global_step, self.state.best_model_checkpoint))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.events.append(("evaluate", self.state.global_step))
        return {"eval_reward": -abs(self.state.global_step - 2.0)}


def test_micro_batches_are_asked_for_once_per_optimizer_step(tmp_path):
    probe = Probe(tmp_path, max_steps=6)
    probe.train()
    asked = probe.named("get_batch_samples")
    assert [event[1] for event in asked] == [0, 1, 2, 3, 4, 5]  # global_step is the step that is about to be made
    assert [event[2] for event in asked] == [2] * 6
    assert [event[3] for event in asked[:4]] == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
    assert [event[3] for event in asked[4:]] == [[[100], [101]], [[102], [103]]]  # the second epoch
    assert {event[4] for event in asked} == {torch.device("cpu")}


def test_whatever_it_returns_is_what_is_learned_from(tmp_path):
    probe = Probe(tmp_path, max_steps=2)
    probe.train()
    assert probe.named("compute_loss") == [
        ("compute_loss", 0, [0.0, 0.0], 10.0),
        ("compute_loss", 0, [0.0, 1.0], 10.0),
        ("compute_loss", 1, [1.0, 0.0], 10.0),
        ("compute_loss", 1, [1.0, 1.0], 10.0),
    ]


def test_a_step_runs_in_the_order_that_ppo_needs(tmp_path):
    probe = Probe(tmp_path, max_steps=1)
    probe.train()
    order = ["get_batch_samples", "on_step_begin", "compute_loss", "compute_loss", "_clip_grad_norm",
             "on_pre_optimizer_step", "on_step_end"]  # fmt: skip
    assert [event[0] for event in probe.events] == order
    assert [event[1] for event in probe.events] == [0] * 6 + [1]


@pytest.mark.parametrize(("scaled", "gradient"), [(True, 0.3), (None, 0.15)])
def test_a_scaled_loss_is_summed_over_micro_batches_and_not_averaged(tmp_path, scaled, gradient):
    probe = Probe(tmp_path, max_steps=2)
    probe.loss_is_scaled_for_ga = scaled
    probe.train()
    # The micro-batches of step 1 hold 1 + 0 and 1 + 1, over 10 items.
    assert probe.named("_clip_grad_norm")[1][2] == pytest.approx(gradient, rel=1e-6)


def test_the_norm_that_clipping_returns_is_logged_and_zero_turns_clipping_off(tmp_path):
    probe = Probe(tmp_path)
    probe.train()
    assert [row["grad_norm"] for row in probe.state.log_history if "loss" in row] == [123.0] * 3
    probe = Probe(tmp_path, max_grad_norm=0.0)
    probe.train()
    assert probe.named("_clip_grad_norm") == []


def test_params_from_the_instance_become_the_optimizers_groups(tmp_path):
    class Grouped(Probe):
        def get_optimizer_cls_and_kwargs(self, args, model=None):
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
            kwargs["params"] = [
                {"params": [self.model.actor], "lr": 1.0},
                {"params": [self.model.critic], "lr": 3.0},
            ]
            return cls, kwargs

    probe = Grouped(tmp_path, max_steps=2, lr_scheduler_type="linear")
    probe.train()
    assert [len(group["params"]) for group in probe.optimizer.param_groups] == [1, 1]
    # Gradients are 0.1 at step 0 and 0.3 at step 1, where the linear schedule is at one half.
    assert probe.model.actor.item() == pytest.approx(1 - 1.0 * (0.05 + 0.15 / 2), rel=1e-5)
    assert probe.model.critic.item() == pytest.approx(1 - 3.0 * (0.05 + 0.15 / 2), rel=1e-5)


def test_max_steps_may_be_set_when_the_initial_values_are_asked_for(tmp_path):
    class Bounded(Probe):
        def set_initial_training_values(self, args, dataloader):
            assert len(dataloader) == self.micro_batches_per_epoch
            args.max_steps = 5
            return super().set_initial_training_values(args, dataloader)

    probe = Bounded(tmp_path, max_steps=-1, num_train_epochs=100)
    probe.train()
    assert (probe.state.global_step, probe.state.max_steps, probe.state.num_train_epochs) == (5, 5, 2)


# Checkpoints


def test_a_checkpoint_is_saved_by_these_hooks_in_this_order(tmp_path):
    probe = Probe(tmp_path, save_strategy="steps", save_steps=2)
    probe.train()
    folder = str(tmp_path / "checkpoint-2")
    saved = [event for event in probe.events if event[0].startswith("_save") and event[1] == 2]
    assert saved == [("_save_checkpoint", 2), ("_save", 2, folder), ("_save_rng_state", 2, folder)]
    probe.save_model(str(tmp_path / "own"))
    assert probe.events[-1] == ("_save", 3, str(tmp_path / "own"))


def test_save_only_model_skips_the_hook_that_saves_progress(tmp_path):
    probe = Probe(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    probe.train()
    assert probe.named("_save") and not probe.named("_save_rng_state")


def test_the_best_model_is_chosen_by_what_evaluate_returns_and_loaded_at_the_end(tmp_path):
    probe = Probe(tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3,
                  load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True)  # fmt: skip
    probe.train()
    assert probe.events[-1] == ("_load_best_model", 2, str(tmp_path / "checkpoint-2"))


@pytest.fixture
def interrupted(tmp_path):
    """A run of 8 steps in 2 epochs of 4, with a checkpoint at each."""
    probe = Probe(tmp_path / "whole", max_steps=8, save_strategy="steps", save_steps=1)
    probe.train()
    return tmp_path / "whole"


def test_weights_are_loaded_first_and_the_clock_is_set_before_micro_batches_are_asked_for(interrupted, tmp_path):
    probe = Probe(tmp_path / "resumed", max_steps=8)
    probe.train(resume_from_checkpoint=str(interrupted / "checkpoint-6"))
    assert probe.events[0][0] == "_load_from_checkpoint"
    assert probe.events[0][2] == str(interrupted / "checkpoint-6")
    asked = probe.named("get_batch_samples")
    assert [event[1] for event in asked] == [6, 7]
    assert asked[0][3] == [[104], [105]]  # epoch 1, after the 4 micro-batches of its two steps


@pytest.mark.parametrize(
    ("step", "order"),
    [
        (6, ["get_batch_samples", "_load_rng_state", "on_step_begin"]),  # in the middle of an epoch
        (4, ["_load_rng_state", "get_batch_samples", "on_step_begin"]),  # between two
    ],
)
def test_the_generators_are_restored_after_get_batch_samples_in_the_middle_of_an_epoch(
    interrupted, tmp_path, step, order
):
    """So what is drawn in there must seed itself, and must put the generators back."""
    probe = Probe(tmp_path / "resumed", max_steps=8)
    probe.train(resume_from_checkpoint=str(interrupted / f"checkpoint-{step}"))
    assert [event[0] for event in probe.events[1:4]] == order


@pytest.mark.parametrize("step", [4, 6])
def test_the_batch_sampler_hears_of_the_epoch_also_when_training_resumes(interrupted, tmp_path, step):
    probe = Probe(tmp_path / "resumed", max_steps=8)
    probe.sampler.epoch = 50
    probe.train(resume_from_checkpoint=str(interrupted / f"checkpoint-{step}"))
    # Through the loader's set_epoch at 4; at 6, the loader is accelerate's and it is the sampler that is reached.
    drawn = [batch for event in probe.named("get_batch_samples") for batch in event[3]]
    assert drawn == [[100 + index] for index in range(2 * (step - 4), 8)]


# Stateful callbacks


class Counter(TrainerCallback, ExportableState):
    def __init__(self, start=0):
        self.start, self.count = start, start

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


def counter_of(trainer) -> Counter:
    return next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "Counter")


@pytest.mark.parametrize(("restore", "count"), [(True, 105), (False, 3)])
def test_a_stateful_callback_is_rebuilt_from_its_state_as_a_new_instance(tmp_path, restore, count):
    """So nobody may hold on to an instance, and constructor arguments must be JSON."""
    Probe(tmp_path / "a", [Counter(100)], max_steps=2, save_strategy="steps", save_steps=2).train()
    given = Counter()
    config = {} if not restore else {"restore_callback_states_from_checkpoint": True}
    probe = Probe(tmp_path / "b", [given], max_steps=5, **config)
    probe.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert counter_of(probe).count == count
    assert (counter_of(probe) is given) == (not restore)


def test_a_checkpoint_without_an_installed_callback_dies_at_the_next_save(tmp_path):
    """Which is why PPOTrainer fills the gap in `_save_checkpoint`; when this fails, that override can go."""
    Probe(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=2).train()
    probe = Probe(tmp_path / "b", [Counter()], max_steps=4, save_strategy="steps", save_steps=1)
    with pytest.raises(KeyError, match="Counter"):
        probe.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_ppo_can_resume_with_a_stateful_callback_that_the_checkpoint_does_not_know(tmp_path):
    make_trainer(tmp_path / "a", config={"max_steps": 2, "save_strategy": "steps", "save_steps": 2}).train()
    trainer = make_trainer(
        tmp_path / "b", config={"max_steps": 4, "save_strategy": "steps", "save_steps": 1}, callbacks=[Counter()]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    state = json.loads((tmp_path / "b" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Counter"]["attributes"] == {"count": 2}


def test_the_control_is_stateful_too_and_is_replaced():
    assert issubclass(TrainerControl, ExportableState)


# What PPOTrainer does with them


def test_ppo_leaves_the_generators_as_they_were_when_it_serves_micro_batches(tmp_path):
    """A resumed run restores them only afterward, an undisturbed one never: both must find the same."""
    trainer = make_trainer(tmp_path, config={"max_steps": 1}, reward_funcs=lambda completions, **_: [
        random.random() + torch.rand(()).item() for _ in completions
    ])  # fmt: skip
    states = []
    get_batch_samples = trainer.get_batch_samples

    def spy(*args):
        before = torch.get_rng_state(), random.getstate()
        served = get_batch_samples(*args)
        states.append((before, (torch.get_rng_state(), random.getstate())))
        return served

    trainer.get_batch_samples = spy
    trainer.train()
    (before, after), *_ = states
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_ppo_serves_one_list_of_micro_batches_and_one_number_of_tokens(tmp_path):
    trainer = make_trainer(tmp_path, config={"max_steps": 1})
    served = []
    get_batch_samples = trainer.get_batch_samples

    def spy(epoch_iterator, num_batches, device):
        served.append((num_batches, *get_batch_samples(epoch_iterator, num_batches, device)))
        return served[-1][1:]

    trainer.get_batch_samples = spy
    trainer.train()
    ((num_batches, micro_batches, tokens),) = served
    assert isinstance(micro_batches, list) and num_batches == len(micro_batches) == 2
    tensors = [value for batch in micro_batches for name, value in batch.items() if name != "seq_lens"]
    assert all(isinstance(value, torch.Tensor) and len(value) == 2 for value in tensors)
    assert all(len(batch["seq_lens"]) == 2 for batch in micro_batches)
    assert all("labels" not in batch for batch in micro_batches)
    assert tokens.item() == sum(batch["action_mask"].sum().item() for batch in micro_batches)
