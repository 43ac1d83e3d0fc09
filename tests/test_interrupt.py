"""A signal is noticed within one decoded token, one reward call or one forward pass, and costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
import time
import warnings

import pytest
from conftest import classifier, count_e, lora, make_prompts, make_tokenizer, make_trainer, trained_weights
from test_faults import equal, evaluating, steps

from ppo_plus import PPOCallback
from ppo_plus.report import REPORT, read_run
from ppo_plus.rewards import Completions, FunctionReward, RewardSet
from ppo_plus.training.checkpoint import integrity_error
from ppo_plus.utils.interrupt import Interrupt, Interrupted, interruptible, raise_if_interrupted

CONFIG = {"max_steps": 6, "logging_steps": 1}


@pytest.fixture(autouse=True)
def interrupts_are_listened_to():
    """A shell that runs the tests in the background has told them to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signal(PPOCallback):
    """Sends a signal once a phase at a step has done some work; counts the reports of progress after it."""

    def __init__(self, phase, step=4, tokens=1, evaluating=False):
        self.phase, self.step, self.tokens, self.evaluating = phase, step, tokens, evaluating
        self.sent, self.later = False, 0

    def on_rollout_progress(self, args, state, control, phase, done, total, tokens, **kwargs):
        if self.sent:
            self.later += 1
        elif phase == self.phase and state.global_step == self.step and tokens >= self.tokens:
            self.sent = True
            signal.raise_signal(signal.SIGINT)


def kept(state):
    """What a run has logged, but for clocks."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "train_"))} for row in state.log_history]
    return [row for row in rows if row.keys() - {"epoch", "step", "total_flos"}]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("undisturbed"), config=CONFIG)
    trainer.train()
    return trained_weights(trainer), kept(trainer.state)


def resumed_ends_in_the_same_bits(folder, undisturbed, **overrides):
    assert (
        steps(folder) == [4] and integrity_error(folder / "checkpoint-4") is None
    )  # the step before the second rollout
    trainer = make_trainer(folder, config=CONFIG, **overrides)
    trainer.train(resume_from_checkpoint=True)
    assert equal(trained_weights(trainer), undisturbed[0])
    assert kept(trainer.state) == undisturbed[1]


@pytest.mark.parametrize(("phase", "tokens"), [("generating", 9), ("scoring", 0), ("logprobs", 1), ("reference", 1)])
def test_a_rollout_is_left_within_one_token_or_pass(tmp_path, undisturbed, phase, tokens):
    """All prompts are decoded in one batch: the next token would be the next report."""
    sent = Signal(phase, tokens=tokens)
    trainer = make_trainer(tmp_path, config=CONFIG, callbacks=[sent])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sent.sent and sent.later == 0
    resumed_ends_in_the_same_bits(tmp_path, undisturbed)


class SlowReward:
    """A reward function that takes its time in the second rollout, after it sent a signal."""

    def __init__(self, kind):
        self.kind, self.later, self.cancelled = kind, 0, threading.Event()
        self.rollouts = -1  # the first call is about cheap answers, before the first rollout
        self.__name__ = "count_e"

    def begin(self, log_metric):
        self.rollouts += 1
        log_metric("judge/calls", 1.0)
        if self.rollouts == 2:
            self.thread = threading.current_thread()
            signal.raise_signal(signal.SIGINT)  # handled by the main thread
        return self.rollouts == 2

    def wait(self):
        for _ in range(2000):
            time.sleep(0.01)
            self.later += 1

    def __call__(self, completions, prompts, log_metric, **kwargs):
        if self.kind == "async":
            return self.asynchronous(completions, log_metric)
        if self.kind == "catches all":
            with contextlib.suppress(Exception):
                if self.begin(log_metric):
                    self.wait()
        elif self.begin(log_metric):
            self.wait()
        return count_e(prompts, completions)

    async def asynchronous(self, completions, log_metric):
        if self.begin(log_metric):
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            self.later += 1
        return count_e(None, completions)


@pytest.fixture(scope="module")
def undisturbed_and_logging(tmp_path_factory):
    def logging(completions, prompts, log_metric, **kwargs):
        log_metric("judge/calls", 1.0)
        return count_e(prompts, completions)

    logging.__name__ = "count_e"
    trainer = make_trainer(tmp_path_factory.mktemp("logging"), config=CONFIG, reward_funcs=logging)
    trainer.train()
    return trained_weights(trainer), kept(trainer.state)


@pytest.mark.parametrize("kind", ["sync", "catches all", "thread", "async", "async with a timeout"])
def test_a_reward_function_is_left(tmp_path, undisturbed_and_logging, kind):
    slow = SlowReward(kind.split(" with")[0])
    config = CONFIG | ({"reward_timeout": 60.0} if kind in ("thread", "async with a timeout") else {})
    trainer = make_trainer(tmp_path, config=config, reward_funcs=slow)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert slow.rollouts == 2 and slow.later < 100  # of 2000; a thread is left to itself and counts on
    if "async" in kind:
        assert slow.cancelled.wait(5)
    elif kind != "thread":
        assert slow.later == 0 and slow.thread is threading.main_thread()
    resumed = SlowReward("sync")
    resumed.rollouts = 2
    resumed_ends_in_the_same_bits(tmp_path, undisturbed_and_logging, reward_funcs=resumed)


def test_no_further_reward_is_called(tmp_path, undisturbed):
    """The second of three, which catches whatever is raised: its own call ends, and no other begins."""
    calls = []

    def named(name, swallows=False):
        def function(completions, trainer_state, **kwargs):
            calls.append(name)
            if swallows and trainer_state.global_step == 4:
                with contextlib.suppress(BaseException):
                    signal.raise_signal(signal.SIGINT)
            return [0.0] * len(completions)

        return function

    async def waiting(completions, **kwargs):
        return [0.0] * len(completions)

    functions = [waiting, named("first"), named("second", swallows=True), named("third")]
    trainer = make_trainer(tmp_path, config=CONFIG, reward_funcs=functions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a coroutine that nobody awaited
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        gc.collect()
    assert calls == ["first", "second", "third"] * 2 + ["first", "second"]  # cheap answers, and two rollouts
    assert steps(tmp_path) == [4]


def test_no_further_batch_of_a_reward_model_is_scored(tmp_path, base, undisturbed):
    judge, batches = classifier(base), []
    forward = judge.forward

    def interrupted(*args, **kwargs):
        batches.append(len(kwargs["input_ids"]))
        if len(batches) == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **kwargs)

    config = {**CONFIG, "local_rollout_forward_batch_size": 2}
    trainer = make_trainer(
        tmp_path, config=config, reward_funcs=[count_e, judge], reward_processing_classes=[None, make_tokenizer()]
    )
    judge.forward = interrupted  # after the trials that a new trainer makes
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert batches == [2] * 5  # four of the first rollout, one of the second
    assert steps(tmp_path) == [4]


EVALUATION = {"generation_batch_size": 64, "max_steps": 3, "eval_steps": 2}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    trainer = evaluating(tmp_path_factory.mktemp("evaluated"), **EVALUATION)
    trainer.train()
    return trained_weights(trainer), kept(trainer.state)


@pytest.mark.parametrize("phase", ["generating", "scoring", "logprobs", "reward function"])
def test_an_evaluation_is_left_within_one_token_call_or_pass(tmp_path, phase, evaluated):
    """And is made by the resumed run, to the same history."""
    later = []

    def judge(completions, prompts, trainer_state, **kwargs):
        if phase == "reward function" and trainer_state.global_step == 2 and not later:
            later.append("sent")
            signal.raise_signal(signal.SIGINT)
            later.append("went on")
        return count_e(prompts, completions)

    judge.__name__ = "count_e"
    trainer = evaluating(tmp_path / "parts", **EVALUATION, reward=judge)
    sent = Signal(phase, step=2, tokens=0 if phase == "scoring" else 3)
    trainer.add_callback(sent)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (later == ["sent"]) if phase == "reward function" else (sent.sent and sent.later == 0)
    assert trainer.state.global_step == 2 and steps(tmp_path / "parts") == [2]
    resumed = evaluating(tmp_path / "parts", **EVALUATION)
    resumed.train(resume_from_checkpoint=True)
    assert equal(trained_weights(resumed), evaluated[0]) and kept(resumed.state) == evaluated[1]


def test_a_passed_over_check_would_be_seen(tmp_path, monkeypatch):
    """Negative control: where the event of a token does not raise, the rollout is decoded to its end."""
    monkeypatch.setattr("ppo_plus.training.rollouts.raise_if_interrupted", lambda: None)
    sent = Signal("generating")
    trainer = make_trainer(tmp_path, config=CONFIG, callbacks=[sent])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sent.later > 5


@pytest.mark.parametrize("step", [4, 6])
def test_the_reports_answers_are_left_within_one_token(tmp_path, step, undisturbed):
    """At a rollout, which is then made by the resumed run; and after the last step, which is saved all the same."""
    config = {**CONFIG, "html_report": True}
    sent = Signal("generating", step=step, tokens=3)
    trainer = make_trainer(tmp_path, config=config, callbacks=[sent], eval_dataset=make_prompts(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sent.sent and sent.later == 0
    assert steps(tmp_path) == [step] and integrity_error(tmp_path / f"checkpoint-{step}") is None
    assert [at["step"] for at in read_run(tmp_path / REPORT)["answers"]] == [0, 4][: 1 + (step == 6)]
    resumed = make_trainer(tmp_path, config=config, eval_dataset=make_prompts(3))
    resumed.train(resume_from_checkpoint=True)
    assert equal(trained_weights(resumed), undisturbed[0])
    if step == 4:
        assert [at["step"] for at in read_run(tmp_path / REPORT)["answers"]] == [0, 4, 6]


def test_hidden_states_that_are_looked_at_again_are_left_too(tmp_path):
    """Of a rollout from a checkpoint: nothing was learned since, so nothing is saved."""
    top = {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}
    config = {**CONFIG, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, config={**config, "max_steps": 2}, peft_config=lora(**top)).train()
    before = (tmp_path / "checkpoint-2" / "manifest.json").read_text()
    sent = Signal("frozen_layers", step=2)
    trainer = make_trainer(tmp_path, config=config, peft_config=lora(**top), callbacks=[sent])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    assert sent.sent and sent.later == 0
    assert steps(tmp_path) == [2] and (tmp_path / "checkpoint-2" / "manifest.json").read_text() == before


def test_a_function_that_lives_on_alarms_is_called_in_the_main_thread(tmp_path):
    """As verifiers of mathematics do, to end a search that takes too long."""

    class TooLong(Exception):
        pass

    def stop(*args):
        raise TooLong

    def judge(completions, **kwargs):
        before = signal.signal(signal.SIGALRM, stop)  # a ValueError in any other thread
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            with pytest.raises(TooLong):
                time.sleep(10)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return [float(len(text)) for text in completions]

    trainer = make_trainer(tmp_path, config={"max_steps": 1}, reward_funcs=judge)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_signal_ends_a_reward_function_as_the_first_does_elsewhere(tmp_path, times):
    """The first gives up the rollout; two in a row, as of a launcher and a user, end the process at once."""

    def judge(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 4:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                if times == 2:
                    signal.raise_signal(signal.SIGINT)
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, config=CONFIG, reward_funcs=judge)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps(tmp_path) == ([4] if times == 1 else [])


class TestInterrupt:
    def test_it_is_raised_only_where_it_is_allowed(self):
        interrupt = Interrupt()
        interrupt.received = int(signal.SIGTERM)
        raise_if_interrupted()
        with interruptible():
            interrupt.receive(int(signal.SIGTERM))
        with pytest.raises(Interrupted), interrupt.allow():
            pass
        raise_if_interrupted()

    def test_the_handler_raises_in_functions_of_users_only(self):
        interrupt, reached = Interrupt(), []
        with pytest.raises(Interrupted), interrupt.allow():
            interrupt.receive(int(signal.SIGTERM))
            reached.append("our own code goes on to the next check")
            raise_if_interrupted()
        interrupt = Interrupt()
        with pytest.raises(Interrupted), interrupt.allow(), interruptible():
            interrupt.receive(int(signal.SIGTERM))
            reached.append("not reached")
        assert len(reached) == 1

    def test_another_thread_is_not_interrupted(self):
        """A trainer may run in a thread of its own, while the main thread's is interrupted."""
        interrupt, outcome = Interrupt(), []

        def other():
            raise_if_interrupted()
            outcome.append("went on")

        with contextlib.suppress(Interrupted), interrupt.allow():
            interrupt.received = int(signal.SIGTERM)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert outcome == ["went on"]

    def test_a_loop_that_a_function_blocks_does_not_hold_up_the_next_one(self):
        never, interrupt = threading.Event(), Interrupt()

        async def blocks(completions, **kwargs):
            interrupt.received = int(signal.SIGTERM)
            never.wait(20)

        async def answers(completions, **kwargs):
            return [1.0] * len(completions)

        batch = Completions(prompts=["a"], completions=["b"], completion_ids=[[1]])
        began = time.monotonic()
        with pytest.raises(Interrupted), interrupt.allow():
            RewardSet([FunctionReward(blocks, "blocks")], None)(batch)
        assert RewardSet([FunctionReward(answers, "answers")], None)(batch).total.tolist() == [1.0]
        assert time.monotonic() - began < 10
        never.set()
