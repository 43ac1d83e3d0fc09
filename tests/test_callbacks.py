"""What listens to rollouts: controllers by hand-computed numbers through real runs, events, states, tables."""

from __future__ import annotations

import builtins
import inspect
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAT_TEMPLATE, lora, make_config, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from transformers import GenerationConfig, TrainerCallback
from trl.trainer.callbacks import LogCompletionsCallback

from ppo_plus import (
    ActorCritic,
    AdaptiveKLCallback,
    CompletionsTableCallback,
    EarlyStoppingOnKLCallback,
    PPOCallback,
    PPOConfig,
    RewardNormalizationCallback,
    Rollout,
    RolloutSettings,
    TrainingHealthCallback,
)
from ppo_plus.callbacks.completions import print_samples
from ppo_plus.rollout.experience import Experience

EXACT = {"rel": 1e-9, "abs": 1e-9}


class Watch(PPOCallback):
    """Keeps what each rollout was, and may set the KL that the callbacks after it see."""

    def __init__(self, kl=None):
        self.kl, self.rollouts, self.metrics = kl, [], []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        if self.kl is not None:
            metrics["kl"] = self.kl[len(self.rollouts)]
        self.rollouts.append(rollout)
        self.metrics.append(dict(metrics))

    @property
    def kl_coefs(self):
        return [m["ppo/kl_coef"] for m in self.metrics]


def run(tmp_path, *callbacks, rollouts=4, config=None, resume=None, **overrides):
    """Train `rollouts` rollouts of 8 responses, one step each, so that a step's number is its rollout's."""
    sizes = {"num_ppo_epochs": 1, "num_mini_batches": 1, "gradient_accumulation_steps": 4}
    config = {**sizes, "max_steps": rollouts, **(config or {})}
    trainer = make_trainer(tmp_path, config=config, callbacks=list(callbacks), **overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def installed(trainer, kind):
    return next(c for c in trainer.callback_handler.callbacks if type(c) is kind)


# The KL coefficient


def test_proportional_control_by_hand(tmp_path):
    """The error kl / 6 - 1 is -1, 0.1, 0.5, -0.1, clipped to 0.2; a rollout is 8 episodes of a horizon of 80."""
    watch = Watch(kl=[0.0, 6.6, 9.0, 5.4])
    trainer = run(tmp_path, watch, AdaptiveKLCallback(target=6.0, horizon=80))
    assert watch.kl_coefs == pytest.approx([0.05, 0.049, 0.04949, 0.0504798], **EXACT)
    assert installed(trainer, AdaptiveKLCallback).kl_coef == pytest.approx(0.049975002, **EXACT)


def test_the_band_by_hand(tmp_path):
    """Halved below 2, doubled above 8, left alone inside and at the ends."""
    watch = Watch(kl=[1.9, 2.0, 8.0, 5.0, 8.1, 9.0])
    trainer = run(tmp_path, watch, AdaptiveKLCallback(band=[2.0, 8.0]), rollouts=6)
    assert watch.kl_coefs == pytest.approx([0.05, 0.025, 0.025, 0.025, 0.025, 0.05], **EXACT)
    assert installed(trainer, AdaptiveKLCallback).kl_coef == pytest.approx(0.1, **EXACT)


def test_the_coefficient_follows_the_kl_that_is_logged(tmp_path):
    watch = Watch()
    run(tmp_path, watch, AdaptiveKLCallback(target=0.5, horizon=16))
    coefficient = 0.05
    for metrics in watch.metrics:
        assert metrics["ppo/kl_coef"] == pytest.approx(coefficient, rel=1e-9)
        coefficient *= 1 + min(0.2, max(-0.2, metrics["kl"] / 0.5 - 1)) * 8 / 16
    assert watch.metrics[0]["kl"] == 0.0  # the first rollout is the reference's own
    assert len({round(c, 6) for c in watch.kl_coefs}) == 4


def test_without_the_callback_the_coefficient_stays(tmp_path):
    watch = Watch()
    run(tmp_path, watch, config={"kl_coef": 0.3})
    assert watch.kl_coefs == [0.3] * 4


def test_the_coefficient_in_force_is_the_price_of_kl_in_the_reward(tmp_path):
    """With gamma and lambda 1 the first return is the sum of rewards: the score less coefficient times KL."""

    class Price(PPOCallback):
        def on_rollout_begin(self, args, state, control, settings, **kwargs):
            settings.kl_coef = 0.7 + state.global_step

    watch = Watch()
    run(tmp_path, Price(), watch, rollouts=3, config={"lam": 1.0})
    assert watch.kl_coefs == pytest.approx([0.7, 1.7, 2.7])
    for rollout, price in zip(watch.rollouts, (0.7, 1.7, 2.7), strict=True):
        assert torch.allclose(rollout.returns[:, 0], rollout.sequence_scores - price * rollout.sequence_kl, atol=1e-5)
    assert watch.rollouts[2].sequence_kl.abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "target=0 and horizon=None must be above 0"),
        ({"horizon": -5}, "horizon=-5 must be above 0"),
        ({"band": (3.0, 1.0)}, r"band=\(3.0, 1.0\) must be \(low, high\)"),
        ({"band": (-1.0, 1.0)}, "0 <= low < high"),
    ],
)
def test_a_controller_that_could_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveKLCallback(**arguments)


# Reward normalization


def two_heights(trainer_state, completions, **kwargs):
    """Half of a rollout low, half high: 1 and 3 (mean 2, variance 1), then 6 and 14 (mean 10, variance 16)."""
    low, high = [(1.0, 3.0), (6.0, 14.0)][min(1, trainer_state.global_step)]
    return [low, high] * (len(completions) // 2)


PLAIN = {"missing_eos_penalty": None}


def test_normalization_by_hand(tmp_path):
    """The first rollout sets mean 2 and variance 1; with decay 0.75 the second moves them to 4 and 4.75."""
    watch = Watch()
    callback = RewardNormalizationCallback(decay=0.75, clip=2.0)
    trainer = run(tmp_path, callback, watch, rollouts=2, reward_funcs=two_heights, config=PLAIN)
    first, second = (rollout.sequence_scores.tolist() for rollout in watch.rollouts)
    assert first == pytest.approx([-1.0, 1.0] * 4, abs=1e-5)
    assert second == pytest.approx([2 / math.sqrt(4.75), 2.0] * 4, abs=1e-5)  # (6 - 4) / 2.18; 10 / 2.18 is clipped
    kept = installed(trainer, RewardNormalizationCallback)
    assert (kept.mean, kept.var) == pytest.approx((4.0, 4.75), abs=1e-6)
    assert [m["reward"] for m in watch.metrics] == pytest.approx([2.0, 10.0])  # the log says what functions gave


def test_without_a_clip_the_score_goes_as_far_as_it_goes(tmp_path):
    watch = Watch()
    callback = RewardNormalizationCallback(decay=0.75, clip=None)
    run(tmp_path, callback, watch, rollouts=2, reward_funcs=two_heights, config=PLAIN)
    assert watch.rollouts[1].sequence_scores[1].item() == pytest.approx(10 / math.sqrt(4.75), abs=1e-5)


def test_responses_without_a_score_take_no_part_in_the_statistics(tmp_path):
    def score(completions, **kwargs):
        return [None, 1.0, 3.0, None, 1.0, 3.0, 1.0, 3.0]

    watch = Watch()
    callback = RewardNormalizationCallback()
    with pytest.warns(UserWarning, match="returned None for 2 of 8"):
        trainer = run(tmp_path, callback, watch, rollouts=1, reward_funcs=score, config=PLAIN)
    kept = installed(trainer, RewardNormalizationCallback)
    assert (kept.mean, kept.var) == pytest.approx((2.0, 1.0), abs=1e-6)
    assert watch.rollouts[0].sequence_scores.tolist() == pytest.approx([0, -1, 1, 0, -1, 1, -1, 1], abs=1e-5)
    assert watch.rollouts[0].action_mask.any(1).tolist() == [False, True, True, False, True, True, True, True]


def test_equal_scores_become_zero_and_not_infinite(tmp_path):
    def score(completions, **kwargs):
        return [5.0] * len(completions)

    watch = Watch()
    run(tmp_path, RewardNormalizationCallback(), watch, rollouts=2, reward_funcs=score, config=PLAIN)
    assert all(rollout.sequence_scores.tolist() == [0.0] * 8 for rollout in watch.rollouts)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_would_never_forget_or_never_remember_is_refused(decay):
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        RewardNormalizationCallback(decay=decay)


# States


def stateful():
    return AdaptiveKLCallback(target=6.0, horizon=80), RewardNormalizationCallback(decay=0.75, clip=2.0)


SAVING = {**PLAIN, "save_strategy": "steps", "save_steps": 2}


def test_states_are_in_the_checkpoint_and_a_resumed_run_goes_on_from_them(tmp_path):
    watch = Watch(kl=[0.0, 6.6, 9.0])
    run(tmp_path, watch, *stateful(), rollouts=3, reward_funcs=two_heights, config=SAVING)
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    saved = json.loads(file.read_text())["stateful_callbacks"]
    assert saved["AdaptiveKLCallback"]["args"] == {"target": 6.0, "horizon": 80, "band": None, "gains": None}
    assert saved["AdaptiveKLCallback"]["attributes"]["kl_coef"] == pytest.approx(0.04949, **EXACT)
    assert saved["RewardNormalizationCallback"]["attributes"] == pytest.approx({"mean": 4.0, "var": 4.75}, abs=1e-6)

    resumed = Watch(kl=[9.0])
    fresh = AdaptiveKLCallback(target=99.0), RewardNormalizationCallback()  # the checkpoint's arguments win
    trainer = run(
        tmp_path / "resumed", resumed, *fresh, rollouts=3, reward_funcs=two_heights, config=SAVING,
        resume=str(tmp_path / "checkpoint-2"),
    )  # fmt: skip
    assert resumed.kl_coefs == watch.kl_coefs[2:]
    assert torch.equal(resumed.rollouts[0].sequence_scores, watch.rollouts[2].sequence_scores)
    assert installed(trainer, AdaptiveKLCallback).kl_coef == pytest.approx(0.0504798, **EXACT)


def test_a_run_that_does_not_restore_states_starts_over(tmp_path):
    """Negative control: without the restored state the coefficient is the configured one again."""
    run(tmp_path, Watch(kl=[0.0, 6.6]), *stateful(), rollouts=2, reward_funcs=two_heights, config=SAVING)
    watch = Watch(kl=[9.0])
    config = {**SAVING, "restore_callback_states_from_checkpoint": False}
    run(
        tmp_path / "resumed", watch, *stateful(), rollouts=3, reward_funcs=two_heights, config=config,
        resume=str(tmp_path / "checkpoint-2"),
    )  # fmt: skip
    assert watch.kl_coefs == [0.05]


def test_training_again_from_the_start_forgets_the_states(tmp_path):
    watch = Watch(kl=[0.0, 0.0])
    trainer = run(tmp_path, watch, *stateful(), rollouts=1, reward_funcs=two_heights, config=PLAIN)
    trainer.train()
    assert watch.kl_coefs == [0.05, 0.05]
    assert installed(trainer, RewardNormalizationCallback).mean == pytest.approx(2.0)


# Scores that a callback changes


def test_a_callback_may_change_scores_in_place(tmp_path):
    class Halve(PPOCallback):
        def on_rewards_computed(self, args, state, control, scores, **kwargs):
            scores.mul_(0.5).add_(100)

    watch = Watch()
    run(tmp_path, Halve(), watch, rollouts=1, reward_funcs=two_heights, config={**PLAIN, "lam": 1.0})
    assert watch.rollouts[0].sequence_scores.tolist() == [100.5, 101.5] * 4
    assert watch.rollouts[0].returns[:, 0].tolist() == pytest.approx([100.5, 101.5] * 4, abs=1e-4)
    assert watch.metrics[0]["reward"] == 2.0


def test_a_callback_may_leave_a_response_out_of_learning(tmp_path):
    class Drop(PPOCallback):
        def on_rewards_computed(self, args, state, control, scores, **kwargs):
            scores[3] = float("nan")

    watch = Watch()
    run(tmp_path, Drop(), watch, rollouts=1)
    assert [i for i, learned in enumerate(watch.rollouts[0].action_mask.any(1)) if not learned] == [3]


def test_each_callback_sees_all_scores_as_the_one_before_left_them(tmp_path):
    class Double(PPOCallback):
        def on_rewards_computed(self, args, state, control, scores, gathered_scores, **kwargs):
            before = gathered_scores.clone()
            scores.mul_(2)
            assert torch.equal(gathered_scores, before)

    watch = Watch()
    callback = RewardNormalizationCallback(clip=None)
    trainer = run(tmp_path, Double(), callback, watch, rollouts=1, reward_funcs=two_heights, config=PLAIN)
    assert installed(trainer, RewardNormalizationCallback).mean == pytest.approx(4.0)  # twice 2
    assert watch.rollouts[0].sequence_scores.tolist() == pytest.approx([-1.0, 1.0] * 4, abs=1e-5)


# Events


class Diary(PPOCallback):
    """Writes down every event with the step it came at, and checks its arguments."""

    def __init__(self):
        self.events, self.trainer = [], None

    def note(self, event, args, state, control, model, processing_class):
        assert isinstance(args, PPOConfig)
        assert isinstance(model, ActorCritic)
        assert state is self.trainer.state
        assert control is self.trainer.control
        assert processing_class is self.trainer.processing_class
        self.events.append((event, state.global_step))

    def on_rollout_begin(self, args, state, control, settings, model, processing_class, **kwargs):
        self.note("rollout begins", args, state, control, model, processing_class)
        assert isinstance(settings, RolloutSettings)
        assert settings.kl_coef == args.kl_coef
        assert not kwargs

    def on_rewards_computed(
        self, args, state, control, scores, gathered_scores, token_rewards, model, processing_class, **kwargs
    ):
        self.note("scores", args, state, control, model, processing_class)
        assert scores.shape == (8,)
        assert token_rewards.shape[0] == 8 and not token_rewards.any()
        assert torch.equal(scores, gathered_scores)
        assert not kwargs

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, model, processing_class, **kwargs):
        self.note("rollout ends", args, state, control, model, processing_class)
        assert isinstance(rollout, Rollout)
        assert isinstance(samples, Experience)
        assert len(rollout) == len(samples) == 8
        assert metrics["reward"] == pytest.approx(samples.scores.mean().item())
        metrics["mine/step"] = float(state.global_step)
        assert not kwargs

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("train begins", state.global_step))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.events.append(("epoch begins", state.global_step))

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append(("step begins", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step ends", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("train ends", state.global_step))


def test_events_come_in_order_with_their_arguments(tmp_path):
    """Sixteen prompts are two rollouts of two steps each, then the second epoch begins."""
    diary = Diary()
    trainer = make_trainer(tmp_path, config={"num_ppo_epochs": 1, "max_steps": 5}, callbacks=[diary])
    diary.trainer = trainer
    trainer.train()
    rollout = ["rollout begins", "scores", "rollout ends"]
    expected = [
        ("train begins", 0), ("epoch begins", 0),
        *((event, 0) for event in rollout), ("step begins", 0), ("step ends", 1), ("step begins", 1), ("step ends", 2),
        *((event, 2) for event in rollout), ("step begins", 2), ("step ends", 3), ("step begins", 3), ("step ends", 4),
        ("epoch begins", 4),
        *((event, 4) for event in rollout), ("step begins", 4), ("step ends", 5),
        ("train ends", 5),
    ]  # fmt: skip
    assert diary.events == expected
    logged = {row["step"]: row["mine/step"] for row in trainer.state.log_history if "mine/step" in row}
    assert logged == {1: 0.0, 3: 2.0, 5: 4.0}


def test_evaluation_fires_no_event_of_a_rollout(tmp_path):
    diary = Diary()
    trainer = make_trainer(tmp_path, callbacks=[diary], eval_dataset=make_prompts(5))
    diary.trainer = trainer
    trainer.evaluate()
    assert diary.events == []


def test_callbacks_of_trainer_that_know_nothing_of_rollouts_are_left_alone(tmp_path):
    from transformers import TrainerCallback

    class Plain(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    plain = Plain()
    run(tmp_path, plain, rollouts=2)
    assert plain.steps == 2


def test_trls_callback_that_generates_gets_answers_and_changes_nothing(tmp_path):
    config = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
    trainers = [make_trainer(tmp_path, config=config, eval_dataset=make_prompts(4)) for _ in range(2)]
    log = LogCompletionsCallback(trainers[0], GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0))
    trainers[0].add_callback(log)
    for trainer in trainers:
        trainer.train()
    watched, plain = (dict(trainer.model.named_parameters()) for trainer in trainers)
    assert all(torch.equal(watched[name], weight) for name, weight in plain.items())
    assert [step for step, _, _ in log.table] == ["4"] * 4 + ["8"] * 4
    tokenizer, (_, prompt, completion) = make_tokenizer(), log.table[-1]
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = trainers[0].model.generate(**inputs, generation_config=log.generation_config)[0]
    assert tokenizer.decode(answer[inputs["input_ids"].shape[1] :], skip_special_tokens=True) == completion


def test_every_event_can_be_overridden_with_keywords_alone():
    """A user's signature may be (self, **kwargs) after the three that Trainer passes by position."""
    for event in ("on_rollout_begin", "on_rollout_progress", "on_rewards_computed", "on_rollout_end"):
        parameters = list(inspect.signature(getattr(PPOCallback, event)).parameters.values())
        assert [p.name for p in parameters[:4]] == ["self", "args", "state", "control"]
        assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD


# Tables of samples


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"num_sample_generations": 0}, []),
        ({"num_sample_generations": 1}, [0]),
        ({"num_sample_generations": 2}, [0, 2]),
        ({"num_sample_generations": 3}, [0, 2, 3]),
        ({"num_sample_generations": 4}, [0, 1, 2, 3]),
        ({"num_sample_generations": 99}, [0, 1, 2, 3]),
        ({"num_sample_generations": 0, "log_completions": True}, [0, 1, 2, 3]),
        ({"num_sample_generations": 1, "log_completions": True}, [0, 1, 2, 3]),
    ],
)
def test_tables_are_spread_over_training(config, steps, tmp_path, capsys):
    run(tmp_path, config={"num_completions_to_print": 1, **config})
    printed = [int(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "Samples at step" in line]
    assert printed == steps


MARKUP = "[bold]x[/bold] [/] [link=file:///]y[/link] :smile: [red"


def test_the_table_prints_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_samples(f"title {MARKUP}", {f"name {MARKUP}": [f"value {MARKUP}", "second"], "reward": ["1.00", "-2.00"]})
    printed = capsys.readouterr().out
    for text in (f"title {MARKUP}", f"name {MARKUP}", f"value {MARKUP}", "second", "1.00", "-2.00"):
        assert text in printed


def test_the_table_prints_text_as_it_is_without_rich(capsys, monkeypatch):
    genuine = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    print_samples("title", {"prompt": [MARKUP], "reward": ["1.00"]})
    assert capsys.readouterr().out == f"title\nprompt: {MARKUP} | reward: 1.00\n"


def test_a_table_holds_prompts_completions_rewards_kl_and_what_functions_logged(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    seen = []

    def score(prompts, completions, log_extra, **kwargs):
        seen.append((prompts, completions))
        log_extra("[why]", [f"[b]because {i}[/b]" for i in range(len(prompts))])
        return [1.25 + i for i in range(len(prompts))]

    config = {"num_completions_to_print": 3, "num_sample_generations": 1}
    rows = Dataset.from_dict({"prompt": [f"[i]q{'abcdefgh'[i]}[/i]" for i in range(8)]})
    run(tmp_path, rollouts=1, config=config, reward_funcs=score, train_dataset=rows)
    printed = capsys.readouterr().out
    prompts, completions = seen[1]  # the first call is about cheap answers
    for i in range(3):
        line = next(line for line in printed.splitlines() if prompts[i] in line)
        for text in (f"{1.25 + i:.2f}", "0.00", f"[b]because {i}[/b]", completions[i].splitlines()[0].strip()):
            assert text in line
    assert not any(prompt in printed for prompt in prompts[3:])
    assert "[why]" in printed


def test_a_table_shows_messages_as_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    rows = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "[hi]"}]] * 8
    run(
        tmp_path, rollouts=1, config={"num_sample_generations": 1}, train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=make_tokenizer(CHAT_TEMPLATE),
    )  # fmt: skip
    printed = capsys.readouterr().out
    for text in ("system: be kind", "user: [hi]", "assistant: "):
        assert text in printed


def test_a_user_may_install_the_table_too(tmp_path, capsys):
    config = {"num_sample_generations": 0, "num_completions_to_print": 1}
    run(tmp_path, CompletionsTableCallback(), rollouts=2, config=config, peft_config=lora(r=2))
    assert capsys.readouterr().out.count("Samples at step 0") == 1


class Rows:
    """As much of a rollout as the watch looks at."""

    def __init__(self, kl):
        self.sequence_kl = kl

    def __len__(self):
        return len(self.sequence_kl)


def watched(tmp_path, **overrides):
    """The warnings of a short run, by their first word."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, **overrides).train()
    return [str(w.message) for w in caught if str(w.message).startswith(("KL", "Entropy", "All ", "Before"))]


def test_a_healthy_run_is_not_warned_about(tmp_path):
    assert watched(tmp_path, config={"max_steps": 12, "learning_rate": 1e-3}) == []


def test_truncated_sampling_is_named_as_the_cause_of_a_negative_kl(tmp_path):
    callback, args = TrainingHealthCallback(), make_config(tmp_path, top_k=1)
    samples = SimpleNamespace(completions=SimpleNamespace(completions=["a", "b"]))
    with pytest.warns(UserWarning, match=r"KL to the reference is -3.10 nats.*top_p, top_k or min_p"):
        callback.on_rollout_end(args, None, None, Rows(torch.tensor([-3.0, -3.2])), samples, {"kl": -3.1, "entropy": 1})


@pytest.mark.parametrize(
    ("metrics", "texts", "words"),
    [
        ({"kl": 80.0, "entropy": 1.0}, ["a", "b"], "80 nats per response; above 50"),
        ({"kl": 1.0, "entropy": 0.001}, ["a", "b"], "Entropy is 0.001 nats per token"),
        ({"kl": 1.0, "entropy": 1.0}, ["a", "a"], "All 2 prompts of a rollout got the same answer"),
        ({"kl": -2.0, "entropy": 1.0}, ["a", "b"], "a KL cannot be negative"),
    ],
)
def test_what_looks_wrong_is_said_once(tmp_path, metrics, texts, words):
    callback, args = TrainingHealthCallback(), make_config(tmp_path)
    samples = SimpleNamespace(completions=SimpleNamespace(completions=texts))
    with pytest.warns(UserWarning, match=words) as caught:
        for _ in range(3):
            callback.on_rollout_end(args, None, None, Rows(torch.tensor([1.0, 1.0])), samples, metrics)
    assert len(caught) == 1


@pytest.mark.parametrize(("kl", "said"), [([-5.0, 3.0], False), ([-1.4, -0.6], False), ([-3.5, -2.5], True)])
def test_what_scatters_around_zero_is_no_negative_kl(tmp_path, kl, said):
    """Of two responses: means of -1, -1 and -3 nats, whose standard errors are 2.8, 0.28 and 0.35."""
    callback, kl = TrainingHealthCallback(), torch.tensor(kl)
    samples = SimpleNamespace(completions=SimpleNamespace(completions=["a", "b"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = {"kl": kl.mean().item(), "entropy": 1.0}
        callback.on_rollout_end(make_config(tmp_path), None, None, Rows(kl), samples, metrics)
    assert [str(w.message).startswith("KL to the reference is -3.00 nats") for w in caught] == [True] * said


def test_a_first_ratio_that_is_not_one_is_named(tmp_path):
    callback = TrainingHealthCallback()
    with pytest.warns(UserWarning, match="ratio .* 1 by 0.40"):
        callback.on_log(None, None, None, logs={"ppo/initial_ratio_error": 0.4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_log(None, None, None, logs={"ppo/initial_ratio_error": 0.01})


def test_an_actor_without_a_gradient_is_named(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora(lora_alpha=0), config={"max_steps": 2})
    with pytest.warns(UserWarning, match="The gradient of the actor is exactly 0, so nothing is learned"):
        trainer.train()


@pytest.mark.parametrize(
    ("alpha", "warm_up"), [(8, 0), (0, 2)], ids=["an actor that learns", "the critic's first steps"]
)
def test_no_gradient_is_missed_where_none_is_due(tmp_path, alpha, warm_up):
    config = {"max_steps": 2, "critic_warmup_steps": warm_up}
    trainer = make_trainer(tmp_path, peft_config=lora(lora_alpha=alpha), config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "gradient of the actor" in str(w.message)]


# Early stop on KL


class SetKL(PPOCallback):
    """Says what the KL of each rollout was, before the callback under test hears of it."""

    def __init__(self, *kl):
        self.kl = list(kl)

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        metrics["kl"] = self.kl[state.global_step // args.steps_per_rollout]


def stopped_at(folder, kl, resume=None, **arguments):
    """The step at which training ended; a rollout is one step."""
    config = {"num_ppo_epochs": 1, "num_mini_batches": 1, "gradient_accumulation_steps": 4, "max_steps": 6}
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(folder, config={**config, **saving},
                           callbacks=[SetKL(*kl), EarlyStoppingOnKLCallback(**arguments)])  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step


@pytest.mark.parametrize(
    ("kl", "patience", "step"),
    [
        ([1, 9, 10.5, 1, 1, 1], 1, 3),
        ([11, 1, 11, 12, 1, 1], 2, 4),
        ([1, 2, float("nan"), 1, 1, 1], 1, 3),
        ([10, 10, 10, 10, 10, 10], 1, 6),
        ([11, 1, 11, 1, 11, 1], 2, 6),
    ],
)
@pytest.mark.filterwarnings("ignore:KL to the reference", "ignore:Training stops")
def test_training_ends_when_kl_stays_too_high(tmp_path, kl, patience, step):
    assert stopped_at(tmp_path, kl, max_kl=10.0, patience=patience) == step


@pytest.mark.filterwarnings("ignore:KL to the reference")
def test_a_resumed_run_goes_on_counting(tmp_path):
    with pytest.warns(UserWarning, match=r"after this step \(4\): KL .* is 11.0 nats.*for 3 consecutive"):
        assert stopped_at(tmp_path, [1, 11, 11, 11, 11, 11], max_kl=10.0, patience=3) == 4
    resumed = str(tmp_path / "checkpoint-3")
    with pytest.warns(UserWarning, match=r"Training stops after this step \(4\)"):
        assert stopped_at(tmp_path / "again", [1, 11, 11, 11, 11, 11], resume=resumed, max_kl=10.0, patience=3) == 4


@pytest.mark.parametrize("arguments", [{"max_kl": 0.0}, {"patience": 0}])
def test_a_bound_that_could_not_be_is_refused(arguments):
    with pytest.raises(ValueError, match="EarlyStoppingOnKLCallback: max_kl="):
        EarlyStoppingOnKLCallback(**arguments)


# Trainer's own events


STOCK = [name for name in vars(TrainerCallback) if name.startswith("on_")]
WITH = {
    "on_log": {"logs"}, "on_evaluate": {"metrics", "samples"}, "on_predict": {"metrics"},
    "on_init_end": set(), "on_push_begin": set(),
}  # fmt: skip


class Journal(TrainerCallback):
    """Notes every event of Trainer's with its keyword arguments, and what is asked for at which step."""

    def __init__(self, asked=None):
        self.events, self.asked = [], asked or {}


def journal_entry(event):
    def note(self, args, state, control, **kwargs):
        self.events.append((event, state.global_step, args, kwargs))
        if event == "on_step_end" and state.global_step in self.asked:
            setattr(control, self.asked[state.global_step], True)

    return note


for stock_event in STOCK:
    setattr(Journal, stock_event, journal_entry(stock_event))


def test_every_event_of_trainer_fires_with_its_arguments(tmp_path):
    journal = Journal()
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = make_trainer(tmp_path, config=config, callbacks=[journal], eval_dataset=make_prompts(3))
    trainer.train()
    trainer.predict(make_prompts(3))
    fired = {event for event, *_ in journal.events}
    # Nothing is pushed here, and prediction steps belong to Trainer's own evaluation loop.
    assert fired == set(STOCK) - {"on_push_begin", "on_prediction_step"}
    always = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"}
    for event, _, args, kwargs in journal.events:
        assert args is trainer.args
        assert kwargs.keys() == always | WITH.get(event, set())
        if event not in ("on_init_end", "on_predict"):
            assert kwargs["model"] is trainer.model and kwargs["processing_class"] is trainer.processing_class
        if event in ("on_step_end", "on_optimizer_step"):
            assert kwargs["optimizer"] is trainer.optimizer and kwargs["lr_scheduler"] is trainer.lr_scheduler
    counts = {event: sum(e == event for e, *_ in journal.events) for event in fired}
    each_step = ("on_step_begin", "on_step_end", "on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")
    assert [counts[event] for event in each_step] == [4] * 5
    assert counts["on_save"] == counts["on_evaluate"] == counts["on_predict"] == counts["on_train_end"] == 1
    (metrics,) = (kwargs["metrics"] for event, _, _, kwargs in journal.events if event == "on_evaluate")
    assert metrics["eval_reward"] == next(r for r in trainer.state.log_history if "eval_reward" in r)["eval_reward"]


@pytest.mark.parametrize(
    ("flag", "event"),
    [("should_save", "on_save"), ("should_evaluate", "on_evaluate"), ("should_log", "on_log")],
)
def test_what_a_callback_asks_for_is_done_at_once_and_once(tmp_path, flag, event):
    journal = Journal({3: flag})
    trainer = make_trainer(
        tmp_path, config={"max_steps": 6, "logging_steps": 100}, callbacks=[journal], eval_dataset=make_prompts(3)
    )
    trainer.train()
    # An evaluation logs too, and so does the end of training.
    assert [step for e, step, *_ in journal.events if e == event and step < 6] == [3]


def test_a_callback_that_asks_to_stop_is_obeyed_in_the_middle_of_a_rollout(tmp_path):
    journal = Journal({3: "should_training_stop"})
    trainer = make_trainer(tmp_path, config={"max_steps": 8}, callbacks=[journal])
    trainer.train()
    assert trainer.state.global_step == 3
    assert [event for event, *_ in journal.events].count("on_train_end") == 1
