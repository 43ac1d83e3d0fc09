"""What users chain together: adapters and critics handed over, runs begun again, evaluations of other data, wishes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    CHAT_TEMPLATE,
    count_e,
    lora,
    make_config,
    make_model,
    make_prompts,
    make_tokenizer,
    make_trainer,
    trained_weights,
)
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaForSequenceClassification, TrainerCallback

from ppo_plus import AdaptiveKLCallback, PPOCallback, PPOConfig, RewardNormalizationCallback
from ppo_plus.models.adapters import lora_scalings
from ppo_plus.models.loading import load_policy
from ppo_plus.rewards import Completions, FunctionReward
from ppo_plus.training.setup import load_policy_from_args

SHORT = {"max_steps": 4, "response_length": 5}


def largest_gap(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


# Adapters and models handed over


@pytest.mark.parametrize("speaks", ["style", "both", "none"])
def test_an_adapter_that_does_not_speak_is_not_trained_unseen(tmp_path, speaks):
    model = get_peft_model(make_model(), lora(init_lora_weights=False))
    model.add_adapter("style", lora(init_lora_weights=False))
    if speaks == "none":
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.set_adapter("style" if speaks == "style" else ["default", "style"])
    with pytest.raises(ValueError, match=r"'default' is the adapter that is trained.*set_adapter\('default'\)"):
        make_trainer(tmp_path, model=model, peft_config=None)
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    trainer = make_trainer(tmp_path, model=model, peft_config=None, config=SHORT)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0.0


def test_models_that_would_freeze_each_other_are_refused(tmp_path):
    torch.manual_seed(1)
    critic = LlamaForSequenceClassification(replace_labels(make_model().config))
    with pytest.raises(ValueError, match="shares trainable weights with the policy"):
        make_trainer(tmp_path, reward_funcs=critic, reward_processing_classes=make_tokenizer(), value_model=critic)
    policy, reference = make_model(), make_model()
    critic.model = reference.model
    with pytest.raises(ValueError, match="value_model and ref_model share their weights"):
        make_trainer(tmp_path, model=policy, value_model=critic, ref_model=reference)
    critic.model = policy.model
    with pytest.raises(ValueError, match="shares trainable weights with the policy"):
        make_trainer(
            tmp_path, model=policy, peft_config=None, reward_funcs=critic, reward_processing_classes=make_tokenizer()
        )


def replace_labels(config):
    config.num_labels = 1
    return config


def test_a_frozen_base_has_the_precision_that_was_asked_for(base):
    def dtype_of(**given):
        return load_policy(str(base), peft_config=lora(), **given).get_base_model().dtype

    assert dtype_of() == torch.float32
    assert dtype_of(frozen_dtype=torch.float16) == torch.float16
    assert dtype_of(frozen_dtype=torch.float16, model_init_kwargs={"dtype": "bfloat16"}) == torch.bfloat16


def test_fp16_on_a_gpu_wants_a_frozen_base_in_fp16(tmp_path, base, monkeypatch):
    args = make_config(tmp_path)
    args.fp16 = True
    assert load_policy_from_args(str(base), args, None, lora()).get_base_model().dtype == torch.float32
    monkeypatch.setattr(PPOConfig, "device", torch.device("cuda"))
    policy = load_policy_from_args(str(base), args, None, lora())
    assert policy.get_base_model().dtype == torch.float16
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    args.fp16 = False
    assert load_policy_from_args(str(base), args, None, lora()).get_base_model().dtype == torch.float32


def test_full_determinism_reaches_cublas_before_a_model_does(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_config(tmp_path)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_config(tmp_path, full_determinism=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_a_path_is_a_name(tmp_path, base):
    by_path = make_trainer(tmp_path, model=Path(base), config=SHORT)
    by_name = make_trainer(tmp_path, model=str(base), config=SHORT)
    by_path.train()
    assert largest_gap(trained_weights(by_path), trained_weights(by_name)) > 0  # control
    by_name.train()
    assert largest_gap(trained_weights(by_path), trained_weights(by_name)) == 0


def test_options_of_an_adapter_are_no_adapter(tmp_path, base):
    with pytest.raises(TypeError, match="peft_config must be a PeftConfig; got dict. Pass LoraConfig"):
        make_trainer(tmp_path, model=str(base), peft_config={"r": 4})


def test_a_folder_with_checkpoints_alone_is_no_model(tmp_path):
    for step in (4, 12):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(ValueError, match="run has checkpoints and no model.*newest is .*checkpoint-12"):
        make_trainer(tmp_path, reward_funcs=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="run has checkpoints and no model"):
        make_trainer(tmp_path, model=tmp_path / "run")


def test_prompts_that_come_later_are_tokenized_and_checked(tmp_path):
    expected = make_trainer(tmp_path, config=SHORT)
    expected.train()
    trainer = make_trainer(tmp_path, config=SHORT, train_dataset=make_prompts().select(range(8)))
    trainer.train_dataset = make_prompts()
    trainer.train()
    assert largest_gap(trained_weights(trainer), trained_weights(expected)) == 0
    trainer.train_dataset = Dataset.from_dict({"prompt": ["a" * 200] * 16})
    with pytest.raises(ValueError, match=r"train_dataset\[0\] has 200 tokens"):
        trainer.train()


# Runs begun again


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(folder, config=SAVING)
    trainer.train()
    return folder, trained_weights(trainer)


def copied(saved, folder, *steps):
    for step in steps:
        shutil.copytree(saved[0] / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{steps[-1]}"


def test_a_finished_run_that_is_resumed_ends_at_once(saved, tmp_path):
    copied(saved, tmp_path, 6)  # 6 of 8 steps of the first epoch
    for _ in range(2):
        trainer = make_trainer(tmp_path, config=SAVING)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        assert largest_gap(trained_weights(trainer), saved[1]) == 0.0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6"]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_damaged_checkpoint_is_named_however_its_path_is_given(saved, tmp_path, kind):
    checkpoint = copied(saved, tmp_path, 5)
    trainer = make_trainer(tmp_path, config=SAVING)
    trainer.train(resume_from_checkpoint=kind(checkpoint))
    assert largest_gap(trained_weights(trainer), saved[1]) == 0.0
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="cannot be resumed"):
        make_trainer(tmp_path, config=SAVING).train(resume_from_checkpoint=kind(checkpoint))


def test_what_is_no_checkpoint_is_told_apart(saved, tmp_path):
    trainer = make_trainer(tmp_path, config=SAVING)
    with pytest.raises(ValueError, match="there is no such folder"):
        trainer.train(resume_from_checkpoint="True")
    with pytest.raises(ValueError, match=r"holds checkpoints and is none. Pass the newest whole one, .*checkpoint-6"):
        trainer.train(resume_from_checkpoint=str(saved[0]))
    trainer.save_model(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"model'.*trainer_state.json.* pass it as `model`"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "model"))
    unfinished = copied(saved, tmp_path, 5)
    (unfinished / "manifest.json").unlink()
    with pytest.raises(ValueError, match="saving was interrupted"):  # the control: a checkpoint, and not a whole one
        trainer.train(resume_from_checkpoint=str(unfinished))


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        (5, {"peft_config": lora(lora_alpha=64)}, r"adapter_scaling \[2.0\] there, \[16.0\] here"),
        (4, {"peft_config": lora(lora_alpha=64)}, "adapter_scaling"),
        (5, {"config": {**SAVING, "temperature": 1.5}}, "temperature 0.7 there, 1.5 here"),
        (4, {"config": {**SAVING, "temperature": 1.5}}, None),  # between two rollouts it may change
    ],
)
def test_what_would_make_another_policy_of_a_checkpoint_is_refused(saved, tmp_path, step, changes, message):
    copied(saved, tmp_path, step)
    trainer = make_trainer(tmp_path, **{"config": SAVING, **changes})
    if message is None:
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        return
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_scalings_are_each_numbers_once():
    config = lora(rank_pattern={"q_proj": 2})
    assert lora_scalings(get_peft_model(make_model(), config)) == [2.0, 4.0]


class Halves(PPOCallback):
    """Not the same before and after a normalization."""

    def on_rewards_computed(self, args, state, control, scores, **kwargs):
        scores.copy_(scores.clamp(max=0.5) / 2)


@pytest.mark.parametrize("first", [RewardNormalizationCallback, Halves])
def test_callbacks_keep_their_order_when_a_run_is_resumed(tmp_path, first):
    def run(folder, first=first, **resume):
        both = [RewardNormalizationCallback(decay=0.5), Halves()]
        callbacks = sorted(both, key=lambda callback: not isinstance(callback, first))
        trainer = make_trainer(tmp_path / folder, config={**SAVING, "max_steps": 12}, callbacks=callbacks)
        trainer.train(**resume)
        return trained_weights(trainer)

    whole = run("whole")
    copied((tmp_path / "whole", None), tmp_path / "resumed", 3)
    assert largest_gap(run("resumed", resume_from_checkpoint=True), whole) == 0
    other = RewardNormalizationCallback if first is Halves else Halves
    assert largest_gap(run("other", other), whole) > 0  # control


def test_options_of_a_callback_that_a_checkpoint_overrules_are_named(tmp_path):
    def run(target):
        callbacks = [AdaptiveKLCallback(target=target, horizon=100)]
        trainer = make_trainer(tmp_path, config={**SAVING, "max_steps": 8}, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=(tmp_path / "checkpoint-3").is_dir())
        return next(c for c in trainer.callback_handler.callbacks if isinstance(c, AdaptiveKLCallback)).target

    assert run(6.0) == 6.0
    for step in range(4, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*uses the options of the checkpoint")
        assert run(6.0) == 6.0
    for step in range(4, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.warns(UserWarning, match="AdaptiveKLCallback uses the options of the checkpoint, .*6.0.*not "):
        assert run(9.0) == 6.0


@pytest.mark.parametrize("stream", [False, True])
def test_episodes_stay_episodes_for_the_next_run(tmp_path, stream):
    prompts = make_prompts().to_iterable_dataset() if stream else make_prompts()
    args = make_config(tmp_path, max_steps=-1, total_episodes=8)
    first = make_trainer(tmp_path, args=args, train_dataset=prompts)
    first.train()
    assert (first.state.global_step, args.max_steps, args.total_episodes) == (4, -1, 8)
    second = make_trainer(tmp_path, args=replace(args, total_episodes=16), train_dataset=prompts)
    second.train()
    assert second.state.global_step == 8
    second.args.num_ppo_epochs = 1
    second.train()
    assert second.state.global_step == 4


def test_training_anew_counts_anew(tmp_path):
    trainer = make_trainer(tmp_path, config=SHORT)
    trainer.train()
    first = logged(trainer, "num_tokens")[-1]
    trainer.train()
    assert logged(trainer, "num_tokens")[-1] < 1.5 * first  # and not the sum of both


class SignalAt(TrainerCallback):
    def __init__(self, trainer_step):
        self.step = trainer_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_is_answered_by_a_checkpoint_though_only_the_best_is_saved(tmp_path):
    config = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 8, "learning_rate": 0.0,
              "value_head_learning_rate": 0.0}  # fmt: skip
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *given: handled.append(given))
    try:
        trainer = make_trainer(tmp_path, config=config, eval_dataset=make_prompts(4), callbacks=[SignalAt(2)])
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handled and trainer.state.global_step == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


class EndEpoch(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == self.step


def test_an_epoch_that_is_ended_inside_a_rollout_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"An epoch was ended inside a rollout .*should_epoch_stop.* = 4"):
        make_trainer(tmp_path, config={"max_steps": 16}, callbacks=[EndEpoch(2)]).train()
    trainer = make_trainer(tmp_path, config={"max_steps": 16}, callbacks=[EndEpoch(4)])
    trainer.train()
    assert trainer.state.global_step == 12  # the second of two epochs is whole


# Evaluations


def fails_at(calls):
    count = iter(range(1000))

    def score(completions, **kwargs):
        if next(count) in calls:
            raise OSError("service is away")
        return [-8.0] * len(completions)

    return score


@pytest.mark.parametrize("others", [[], [lambda completions, **kwargs: [5.0] * len(completions)]])
def test_an_evaluation_without_its_reward_is_no_best_model(tmp_path, others):
    config = {**SHORT, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "on_reward_error": "skip"}
    rewards = [fails_at({4}), *others]  # cheap answers, a rollout, and evaluations after steps 1, 2, 3
    trainer = make_trainer(tmp_path, reward_funcs=rewards, eval_dataset=make_prompts(4), config=config)
    with pytest.warns(UserWarning, match="service is away"):
        trainer.train()
    rewards = {row["step"]: row.get("eval_reward") for row in trainer.state.log_history if "eval_kl" in row}
    expected = -8.0 + 5.0 * len(others)
    assert rewards == {1: expected, 2: expected, 3: None, 4: expected}
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"


def test_what_nobody_scored_has_no_mean(tmp_path):
    trainer = make_trainer(tmp_path, reward_funcs=[count_e, silent], config=SHORT)
    trainer.train()
    assert logged(trainer, "rewards/count_e/mean") and not logged(trainer, "rewards/silent/mean")


def silent(completions, **kwargs):
    return [None] * len(completions)


@pytest.mark.parametrize(("metric", "higher"), [("eval_kl", False), ("kl", False), ("eval_reward", True)])
def test_a_lower_kl_is_the_better_one(tmp_path, metric, higher):
    args = PPOConfig(output_dir=str(tmp_path), metric_for_best_model=metric, load_best_model_at_end=True,
                     eval_strategy="steps", eval_steps=4, save_steps=4, use_cpu=True)  # fmt: skip
    assert args.greater_is_better == higher


def test_other_data_is_evaluated_as_if_it_had_been_passed_to_the_trainer(tmp_path):
    prompts, tokenizer = make_prompts(4), make_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in prompts["prompt"]]
    longest = max(map(len, rows))
    padded = Dataset.from_dict({
        "input_ids": [[0] * (longest - len(ids)) + ids for ids in rows],
        "attention_mask": [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows],
    })  # fmt: skip
    trainer = make_trainer(tmp_path, eval_dataset={"a": prompts, "b": prompts})
    expected = trainer.generate_completions(prompts).input_ids
    stale = prompts.add_column("input_ids", [[4]] * 4)
    for other in (padded, stale, stale.with_format("torch")):
        assert torch.equal(trainer.generate_completions(other).input_ids, expected)
    assert trainer.evaluate("a")["eval_kl"] == trainer.evaluate(prompts)["eval_kl"]
    long = Dataset.from_dict({"prompt": ["a" * 200]})
    with pytest.raises(ValueError, match=r"the dataset to evaluate on\[0\] has 200 tokens"):
        trainer.evaluate(long)


def needs_wanted(completions, wanted, **kwargs):
    return [0.0] * len(completions)


def test_columns_of_evaluations_are_looked_at_before_training(tmp_path):
    with pytest.raises(ValueError, match="columns of held_out"):
        make_trainer(tmp_path, reward_funcs=needs_wanted,
                     eval_dataset={"held_out": make_prompts(4).remove_columns("wanted")})  # fmt: skip
    with pytest.raises(ValueError, match="eval_dataset has a column 'completions'"):
        make_trainer(tmp_path, eval_dataset=make_prompts(4).add_column("completions", ["x"] * 4))


# What reward functions say and get


@pytest.mark.parametrize("name", ["reward", "kl", "completions/mean_length", "ppo/ratio"])
def test_a_reward_function_cannot_log_under_a_name_of_the_trainers(tmp_path, name):
    def score(completions, log_metric, **kwargs):
        log_metric(name, 1000.0)
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=rf"log_metric\('{name}', ...\): that is a metric of PPOTrainer's own"):
        make_trainer(tmp_path, reward_funcs=score, config=SHORT).train()


@pytest.mark.parametrize("values", [["only one"], 1.5, "text"])
def test_a_logged_column_has_a_value_for_each_row(tmp_path, values):
    def score(completions, log_extra, **kwargs):
        log_extra("note", values)
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"log_extra\('note', ...\) takes a list with one value for each of 8 rows"):
        make_trainer(tmp_path, reward_funcs=score, config=SHORT).train()


def test_a_score_beyond_single_precision_is_refused():
    reward = FunctionReward(lambda completions, **kwargs: [3e38, 1e39], "big")
    with pytest.raises(ValueError, match="returned 1e\\+39"):
        reward(Completions(["a", "b"], ["c", "d"], [[4], [4]]))


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_reward_functions_compute_in_the_precision_that_they_wrote(timeout):
    seen = []

    def score(completions, **kwargs):
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return [0.0]

    with torch.autocast("cpu", torch.bfloat16):
        FunctionReward(score, "plain", timeout)(Completions(["a"], ["b"], [[4]]))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # control
    assert seen == [torch.float32]


USER, BEGUN = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because "}
SAID = [{"role": "assistant", "content": "of it"}]


def test_a_reply_that_was_begun_is_read_as_one_message():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    batch = Completions([[USER, BEGUN], [USER]], [SAID, SAID], [[4], [4]])
    assert batch.texts(tokenizer, {}) == [
        "<|user|>why?<eos><|assistant|>because of it<eos>", "<|user|>why?<eos><|assistant|>of it<eos>",
    ]  # fmt: skip
    assert batch.pairs() == [("why?", "because of it"), ("why?", "of it")]
    parts = {"role": "assistant", "content": [{"type": "text", "text": "because "}]}
    assert spoken_of(Completions([[USER, parts]], [SAID], [[4]]).pairs()) == "because  of it"
    assert batch.prompts[0][-1] == BEGUN and batch.completions[0] == SAID  # functions get them apart, as ever


def spoken_of(pairs):
    return pairs[0][1]


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.keys() | list | length }}{{ tool.name }}:{% endfor %}"
    "{{ messages[-1].content }}"
)


@pytest.mark.parametrize(("as_json", "num_keys"), [(False, 1), (True, 2)])  # a null in JSON text is the user's own
def test_reward_models_read_the_tools_that_the_policy_read(tmp_path, as_json, num_keys):
    tools = [[{"name": "add", "day": None}], [{"name": "sub", "day": None}]]
    given = [json.dumps(each) for each in tools] if as_json else tools
    tokenizer = make_tokenizer(TEMPLATE)
    rows = [{"prompt": [USER], "tools": given[i % 2]} for i in range(16)]
    trainer = make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, config=SHORT)
    read = trainer.train_dataset["tools"][:2]
    batch = Completions([[USER], [USER]], [SAID, SAID], [[4], [4]], {"tools": read})
    assert batch.texts(tokenizer, {}) == [f"{num_keys}add:of it", f"{num_keys}sub:of it"]
    as_policy = tokenizer.apply_chat_template([USER], tools=json.loads(read[0]) if as_json else read[0], tokenize=False)
    assert as_policy == f"{num_keys}add:why?"
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "<unk>add:why?"


def test_tools_that_are_no_json_are_named(tmp_path):
    rows = Dataset.from_list([{"prompt": [USER], "tools": "{add"}] * 16)
    with pytest.raises(ValueError, match="tools is '{add'; it must be a list of tools"):
        make_trainer(tmp_path, train_dataset=rows, processing_class=make_tokenizer(TEMPLATE))


# Wishes


class Wish(PPOCallback):
    def __init__(self, event, name):
        self.name, self.seen = name, []
        setattr(self, event, self.wish)

    def wish(self, args, state, control, **kwargs):
        setattr(control, self.name, state.global_step == 4)

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(("should_save", state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append(("should_evaluate", state.global_step))


@pytest.mark.parametrize("event", ["on_rollout_begin", "on_rewards_computed", "on_rollout_end"])
@pytest.mark.parametrize("name", ["should_save", "should_evaluate"])
def test_what_is_wished_for_in_a_rollout_happens_after_its_first_step(tmp_path, event, name):
    wish = Wish(event, name)
    make_trainer(tmp_path, config={"max_steps": 8}, eval_dataset=make_prompts(4), callbacks=[wish]).train()
    assert [seen for seen in wish.seen if seen[0] == name and seen[1] < 8] == [(name, 5)]
