"""The run report: what stands in the page, that it survives a resume, and that a browser shows it."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from conftest import classifier, count_e, lora, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_plus import PPOCallback
from ppo_plus.report import REPORT, callback, fixed_prompts, plot_curves, read_run, write_page
from ppo_plus.report.__main__ import main
from ppo_plus.report.curves import MAX_POINTS, curves
from ppo_plus.report.page import to_script_json
from ppo_plus.report.samples import (
    MAX_PROMPTS,
    MAX_RESPONSES,
    MAX_TOKENS,
    completions_snapshot,
    token_texts,
    token_view,
)
from ppo_plus.rewards import Completions
from ppo_plus.rollout.buffer import Rollout
from ppo_plus.rollout.experience import Experience

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- & \u2028"


class Recorder(PPOCallback):
    """Keeps rollouts and the coefficients they were penalized with."""

    def __init__(self):
        self.rollouts = []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.rollouts.append((state.global_step, rollout, samples, metrics["ppo/kl_coef"]))


def trained(tmp_path, config=None, **overrides):
    trainer = make_trainer(tmp_path, config={"html_report": True, **(config or {})}, **overrides)
    trainer.train()
    return trainer


class Page(HTMLParser):
    """Scripts and tags of a page; every opened element must be closed."""

    VOID = {"meta", "!doctype"}

    def __init__(self, text):
        super().__init__()
        self.open, self.scripts, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def page_with(data):
    return f'<script type="application/json" id="data">{data}</script>'


# What is no JSON, or is none of a run.
NO_RUNS = (
    "{", "[" * 100_000, "null", "[]", "3", "{}", '{"format":"1","runs":[]}', '{"format":1,"runs":1}',
    '{"format":1,"runs":[1]}', '{"format":1,"runs":[{}]}', '{"format":1,"runs":[{"settings":{},"curves":[]}]}',
    "9" * 5000,
)  # fmt: skip


class TestPage:
    def test_hostile_text_stays_text(self, tmp_path):
        run = example_run()
        write_page(tmp_path / REPORT, [run])
        page = Page((tmp_path / REPORT).read_text())
        assert len(page.scripts) == 2
        assert json.loads(page.scripts[0])["runs"][0]["name"] == HOSTILE
        assert not any(tag == "img" for tag, _ in page.tags)

    def test_without_escaping_it_would_not(self, tmp_path):
        """Negative control: the parser above sees what gets out of a script."""
        escaped = to_script_json({"name": HOSTILE})
        template = f'<script type="application/json">{escaped}</script>'
        assert len(Page(template).scripts) == 1
        with pytest.raises(AssertionError):
            assert len(Page(template.replace(escaped, json.dumps({"name": HOSTILE}))).scripts) == 1

    def test_numbers_that_json_has_not_become_null(self):
        read = json.loads(to_script_json([math.nan, math.inf, -math.inf, 0.123456789, 3, None, True]))
        assert read == [None, None, None, 0.12346, 3, None, True]

    def test_nothing_is_loaded_from_anywhere(self, tmp_path):
        write_page(tmp_path / REPORT, [example_run()])
        for _, attributes in Page((tmp_path / REPORT).read_text()).tags:
            assert not attributes.keys() & {"src", "href"}

    def test_no_half_of_a_page_is_left(self, tmp_path):
        (tmp_path / REPORT).write_text("before")
        with pytest.raises(ValueError, match="circular|Circular|recursion"):
            circular: list = []
            circular.append(circular)
            try:
                write_page(tmp_path / REPORT, [{"a": circular}])
            except RecursionError as error:
                raise ValueError("recursion") from error
        assert [file.name for file in tmp_path.iterdir()] == [REPORT]
        assert (tmp_path / REPORT).read_text() == "before"

    def test_nothing_is_left_aside_where_the_page_cannot_be(self, tmp_path):
        (tmp_path / REPORT).mkdir()
        with pytest.raises(IsADirectoryError):
            write_page(tmp_path / REPORT, [example_run()])
        assert [file.name for file in tmp_path.iterdir()] == [REPORT]

    @pytest.mark.parametrize("text", ["", "<html></html>", "\udcff", *map(page_with, NO_RUNS)])
    def test_another_page_is_named(self, tmp_path, text):
        (tmp_path / REPORT).write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"report\.html is not the report of one run"):
            read_run(tmp_path / REPORT)

    def test_a_newer_page_is_named(self, tmp_path):
        write_page(tmp_path / REPORT, [example_run()])
        text = (tmp_path / REPORT).read_text()
        (tmp_path / REPORT).write_text(text.replace('{"format":1', '{"format":2'))
        with pytest.raises(ValueError, match="newer ppo_plus"):
            read_run(tmp_path / REPORT)


class TestRun:
    def test_page_says_what_happened(self, tmp_path):
        recorder = Recorder()
        trainer = trained(tmp_path, callbacks=[recorder], config={"max_steps": 12, "kl_coef": 0.3})
        run = read_run(tmp_path / REPORT)
        assert (run["step"], run["max_steps"], run["settings"]["kl_coef"]) == (12, 12, 0.3)

        logged = [row for row in trainer.state.log_history if "reward" in row]
        steps, rewards = run["curves"]["reward"]
        assert steps == [row["step"] for row in logged]
        assert rewards == pytest.approx([row["reward"] for row in logged], rel=1e-4)
        assert {"kl", "entropy", "clip_ratio/policy", "critic/explained_variance", "learning_rate"} <= run[
            "curves"
        ].keys()
        for phase in ("generate", "score", "logprobs", "learn"):
            steps, speeds = run["curves"][f"speed/{phase}"]
            assert steps == [3, 7, 11]
            assert min(speeds) > 0

        assert [view["step"] for view in run["rollouts"]] == [0, 4, 8]
        for view, (_, rollout, samples, kl_coef) in zip(run["rollouts"], recorder.rollouts, strict=True):
            self.check_tokens(view, rollout, samples, kl_coef)

    def check_tokens(self, view, rollout, samples, kl_coef):
        assert view["total"] == len(view["responses"]) == len(rollout) == 8
        scores = [response["score"] for response in view["responses"]]
        assert scores == pytest.approx(sorted(rollout.sequence_scores.tolist(), reverse=True), rel=1e-4)
        rows = rollout.sequence_scores.argsort(descending=True, stable=True).tolist()
        for row, response in zip(rows, view["responses"], strict=True):
            length = int(rollout.action_mask[row].sum())
            assert response["length"] == len(response["tokens"]) == length
            spoken = "".join(response["tokens"]).replace("<eos>", "")
            assert (
                spoken.replace("<pad>", "").replace("<bos>", "").replace("<unk>", "")
                == samples.completions.completions[row]
            )
            for name, numbers in {"advantage": rollout.advantages, "value": rollout.values}.items():
                assert response[name] == pytest.approx(numbers[row, :length].tolist(), abs=1e-4)
            assert sum(response["kl"]) == pytest.approx(float(rollout.sequence_kl[row]), abs=2e-3)
            expected = float(rollout.sequence_scores[row]) - kl_coef * float(rollout.sequence_kl[row])
            assert sum(response["reward"]) == pytest.approx(expected, abs=2e-3)

    def test_the_same_prompts_are_answered_over_time(self, tmp_path):
        trainer = trained(tmp_path, {"report_rewards": True}, eval_dataset=make_prompts(4))
        before, middle, after = read_run(tmp_path / REPORT)["answers"]
        assert (before["step"], middle["step"], after["step"]) == (0, 4, 8)
        now = trainer.generate_completions(make_prompts(4))
        assert [row["answer"] for row in after["rows"]] == now.completions.completions
        assert [row["reward"] for row in after["rows"]] == now.scores.tolist()
        assert [row["prompt"] for row in before["rows"]] == [row["prompt"] for row in after["rows"]]
        assert [row["kl"] for row in before["rows"]] == pytest.approx([0.0] * 4, abs=1e-4)
        assert before["rows"] != after["rows"]

    @pytest.mark.parametrize("asked", [False, True])
    def test_reward_functions_are_called_for_the_report_only_if_asked_for(self, tmp_path, asked):
        calls = []

        def judge(prompts, completions, **kwargs):
            calls.append(len(prompts))
            return count_e(prompts, completions)

        trained(tmp_path, {"report_rewards": asked, "max_steps": 8}, reward_funcs=judge)
        # About cheap answers once, rollouts of 8, and the fixed prompts between them.
        assert calls == ([8, 6, 8, 6, 8, 6] if asked else [8, 8, 8])
        answered = read_run(tmp_path / REPORT)["answers"]
        assert [at["step"] for at in answered] == [0, 4, 8]
        rewards = [row["reward"] for at in answered for row in at["rows"]]
        assert len(rewards) == 18 and all((reward is not None) == asked for reward in rewards)

    def test_reward_models_score_the_fixed_prompts_anyway(self, tmp_path, base):
        judge = classifier(base)
        trained(tmp_path, {"max_steps": 4}, reward_funcs=judge, reward_processing_classes=make_tokenizer())
        rewards = [row["reward"] for at in read_run(tmp_path / REPORT)["answers"] for row in at["rows"]]
        assert len(rewards) == 12 and all(math.isfinite(reward) for reward in rewards)

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_reward_is_shown_at_the_token_where_it_was_paid(self, tmp_path, whole):
        def first(completion_ids, **kwargs):
            return [[1.0] + [0.0] * (len(ids) - 1) for ids in completion_ids]

        def last(completion_ids, **kwargs):
            return [2.0] * len(completion_ids)

        config = {"max_steps": 1, "kl_coef": 0.0, "missing_eos_penalty": 0.5}
        recorder = Recorder()
        trained(tmp_path, config, reward_funcs=[first, last] if whole else first, callbacks=[recorder])
        ((_, rollout, samples, _),) = recorder.rollouts
        shown = [response["reward"] for response in read_run(tmp_path / REPORT)["rollouts"][0]["responses"]]
        rows = rollout.sequence_scores.argsort(descending=True, stable=True).tolist()
        for row, rewards in zip(rows, shown, strict=True):
            at_the_end = 2.0 * whole - 0.5 * (not samples.stopped[row])
            expected = [1.0] + [0.0] * (len(rewards) - 1)
            expected[-1] += at_the_end
            assert rewards == pytest.approx(expected, abs=1e-4)

    def test_training_does_not_notice(self, tmp_path):
        weights = []
        for report in (True, False):
            torch.manual_seed(0)
            folder = tmp_path / str(report)
            config = {"html_report": report, "report_rewards": report}
            trainer = make_trainer(folder, config=config, peft_config=lora(lora_dropout=0.1))
            trainer.train()
            weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
            assert (folder / REPORT).exists() == report
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    @pytest.mark.parametrize("stop", [6, 8])
    def test_resuming_goes_on_with_the_page(self, tmp_path, stop, monkeypatch):
        """Killed at step 10, resumed from a checkpoint before: as if nothing had happened."""
        monkeypatch.setattr(callback, "MAX_WRITE_FRACTION", math.inf)  # a page at every log
        config = {"max_steps": 12, "save_strategy": "steps", "save_steps": stop}
        trained(tmp_path / "whole", config)

        class Kill(PPOCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 10:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", config, callbacks=[Kill()])
        assert read_run(tmp_path / "parts" / REPORT)["step"] == 10 > stop
        trainer = make_trainer(tmp_path / "parts", config={"html_report": True, **config})
        trainer.train(resume_from_checkpoint=True)
        whole, parts = (read_run(tmp_path / name / REPORT) for name in ("whole", "parts"))
        for run in (whole, parts):
            run["curves"] = {name: curve for name, curve in run["curves"].items() if not name.startswith("speed")}
            run.pop("name"), run.pop("speed")
        assert [at["step"] for at in parts["answers"]] == [0, 4, 8, 12]
        assert parts == whole

    @pytest.mark.parametrize("event", ["on_step_begin", "on_rollout_begin"])
    @pytest.mark.parametrize("comes", [True, False])
    def test_a_signal_does_not_wait_for_the_last_answers(self, tmp_path, event, comes):
        """Whoever sends it may have the process killed seconds later; a resumed run answers at its own end."""
        config = {"max_steps": 12, "save_strategy": "steps", "save_steps": 12}

        def at_step_4(self, args, state, control, **kwargs):
            if comes and state.global_step == 4:
                signal.raise_signal(signal.SIGTERM)

        received = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        try:
            trained(tmp_path, config, callbacks=[type("Interrupt", (PPOCallback,), {event: at_step_4})()])
        finally:
            signal.signal(signal.SIGTERM, before)
        assert len(received) == comes
        run = read_run(tmp_path / REPORT)
        ends = {"on_step_begin": 5, "on_rollout_begin": 4}[event] if comes else 12
        assert run["step"] == ends
        answered = [at["step"] for at in run["answers"]]
        # At step 4 there is a rollout, and the prompts are answered after it where it is made.
        assert answered == ([0, 4, 8, 12] if not comes else [0, 4] if event == "on_step_begin" else [0])

    def test_a_new_run_in_the_same_folder_starts_anew(self, tmp_path):
        trained(tmp_path, {"max_steps": 8})
        trained(tmp_path, {"max_steps": 4})
        run = read_run(tmp_path / REPORT)
        assert [at["step"] for at in run["answers"]] == [0, 4]
        assert max(run["curves"]["learning_rate"][0]) == 4

    def test_a_damaged_page_does_not_stop_a_resumed_run(self, tmp_path):
        config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
        trained(tmp_path, config)
        (tmp_path / REPORT).write_text("<html>")
        trainer = make_trainer(tmp_path, config={"html_report": True, **config, "max_steps": 8})
        with pytest.warns(UserWarning, match="report starts empty at step 4"):
            trainer.train(resume_from_checkpoint=True)
        run = read_run(tmp_path / REPORT)
        assert run["curves"]["reward"][0][0] < 4  # curves come from the checkpoint
        assert [view["step"] for view in run["rollouts"]] == [4]

    def test_a_page_that_cannot_be_written_does_not_end_the_run(self, tmp_path):
        class Blocked(PPOCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step in (4, 16):
                    (tmp_path / REPORT).unlink()
                    (tmp_path / REPORT).mkdir()
                if state.global_step == 12:
                    (tmp_path / REPORT).rmdir()

        config = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
        with pytest.warns(UserWarning) as caught:
            trainer = trained(tmp_path, config, callbacks=[Blocked()])
        said = [str(w.message) for w in caught if "could not be written" in str(w.message)]
        assert len(said) == 2  # whenever it begins, and not with each page
        assert all(f"The run report {tmp_path / REPORT} could not be written" in message for message in said)
        assert trainer.state.global_step == 20

    def test_the_next_page_has_what_was_not_written(self, tmp_path, monkeypatch):
        full, whole = iter([True] * 3), Path.write_bytes

        def write_bytes(self, data):
            if REPORT in self.name and next(full, False):
                whole(self, data[:100])
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole(self, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        with pytest.warns(UserWarning, match="could not be written.*No space left"):
            trained(tmp_path, {"max_steps": 8, "save_strategy": "steps", "save_steps": 1})
        assert next(full, None) is None
        run = read_run(tmp_path / REPORT)
        assert [view["step"] for view in run["rollouts"]] == [0, 4] and run["curves"]["reward"][0][0] == 1
        assert not list(tmp_path.glob(f".{REPORT}*"))

    def test_what_is_no_failure_to_write_is_not_hidden(self, tmp_path, monkeypatch):
        monkeypatch.setattr(callback, "write_page", lambda path, runs: runs[1])
        with pytest.raises(IndexError):
            trained(tmp_path, {"max_steps": 1})

    @pytest.mark.parametrize("text", [page_with(data) for data in NO_RUNS])
    def test_a_page_of_another_form_does_not_stop_a_resumed_run(self, tmp_path, text):
        (tmp_path / REPORT).write_text(text)
        report = callback.RunReportCallback(lambda prompts: None, list(make_prompts(1)))
        trainer = make_trainer(tmp_path)
        trainer.state.global_step = 4
        with pytest.warns(UserWarning, match="report starts empty at step 4"):
            report.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        assert report.run["answers"] == []

    def test_a_page_that_cannot_be_read_does_not_stop_a_resumed_run(self, tmp_path, monkeypatch):
        def read_text(self, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        write_page(tmp_path / REPORT, [example_run()])
        monkeypatch.setattr(Path, "read_text", read_text)
        report = callback.RunReportCallback(lambda prompts: None, list(make_prompts(1)))
        trainer = make_trainer(tmp_path)
        trainer.state.global_step = 4
        with pytest.warns(UserWarning, match="report starts empty at step 4.*Permission denied"):
            report.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def test_only_the_first_process_writes(self, tmp_path):
        class Second(PPOCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                state.is_world_process_zero = False

        trainer = make_trainer(tmp_path, config={"html_report": True})
        trainer.callback_handler.callbacks.insert(0, Second())
        trainer.train()
        assert not (tmp_path / REPORT).exists()


def texts(rows):
    return [row["prompt"] for row in rows]


class TestFixedPrompts:
    def test_evaluation_where_reward_functions_can_score_it(self):
        train = Dataset.from_dict({"prompt": ["a", "b"], "input_ids": [[1], [2]], "wanted": ["x", "y"]})
        held_out = Dataset.from_dict(
            {"prompt": ["c", "c", "d"], "input_ids": [[3], [3], [4]], "wanted": ["x", "x", "y"]}
        )
        assert texts(fixed_prompts(train, held_out)) == ["c", "d"]
        assert texts(fixed_prompts(train, {"some": held_out, "other": train})) == ["c", "d"]
        assert texts(fixed_prompts(train, held_out.remove_columns("wanted"))) == ["a", "b"]
        assert texts(fixed_prompts(train, None)) == ["a", "b"]

    def test_rows_of_a_stream_keep_their_keys_and_types(self):
        rows = [
            {"prompt": [{"role": "assistant", "content": "", "tool_calls": [call]}], "input_ids": [i]}
            for i, call in enumerate([{"city": "Rome"}, {"a": 1}])
        ]
        arrow = Dataset.from_list(rows)
        assert arrow[0]["prompt"][0]["tool_calls"][0] == {"city": "Rome", "a": None}  # why no dataset is made of them
        rows.append({"prompt": [{"role": "user", "content": "x", "n": {"a": "one"}}], "input_ids": [2]})
        assert fixed_prompts(IterableDataset.from_generator(lambda: iter(rows)), None) == rows


def byte_tokenizer():
    """One token per byte, as byte-level BPE falls back to for rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class TestTokenTexts:
    def test_characters_of_several_tokens(self):
        tokenizer = byte_tokenizer()
        text = "né 你好 🙂!"
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        texts = token_texts(tokenizer, ids)
        assert texts == ["n", "", "é", " ", "", "", "你", "", "", "好", " ", "", "", "", "🙂", "!"]

    def test_a_character_cut_by_the_end(self):
        tokenizer = byte_tokenizer()
        assert token_texts(tokenizer, tokenizer.encode("aé")[:-1]) == ["a", "\ufffd"]

    def test_special_tokens_are_shown(self):
        tokenizer = make_tokenizer()
        assert token_texts(tokenizer, [*tokenizer.encode("a b"), 2]) == ["a", " ", "b", "<eos>"]


def big_rollout(rows, length):
    torch.manual_seed(0)
    names = ("logprobs", "ref_logprobs", "values", "value_baselines", "advantages", "returns")
    numbers = {n: torch.randn(rows, length) for n in names}
    tokenizer = make_tokenizer()
    ids = torch.randint(4, len(tokenizer), (rows, length + 1))
    mask = torch.ones(rows, length, dtype=torch.bool)
    shared = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "action_mask": mask}
    rollout = Rollout(**shared, **numbers, sequence_scores=torch.randn(rows), sequence_kl=torch.randn(rows))
    texts = Completions(["p" * 5000] * rows, ["c" * 5000] * rows, ids[:, 1:].tolist(), {}, {})
    samples = Experience(
        **shared, stopped=mask[:, 0], sampled_logprobs=numbers["logprobs"], entropy=numbers["values"],
        logprobs=numbers["logprobs"], ref_logprobs=numbers["ref_logprobs"], values=numbers["values"],
        rewards=torch.randn(rows, 1), scores=rollout.sequence_scores, token_rewards=torch.zeros(rows, length),
        completions=texts, seconds={},
    )  # fmt: skip
    return rollout, samples, tokenizer


class TestSize:
    def test_a_long_run_of_long_responses_stays_below_two_megabytes(self, tmp_path):
        trainer = make_trainer(tmp_path)
        rollout, samples, tokenizer = big_rollout(64, 1500)
        view = token_view(rollout, samples, tokenizer, trainer.args, kl_coef=0.1, step=0)
        assert len(view["responses"]) == MAX_RESPONSES
        assert {len(response["tokens"]) for response in view["responses"]} == {MAX_TOKENS}
        assert view["responses"][0]["length"] == 1500
        few = completions_snapshot(samples, 0)
        few["rows"] = few["rows"][:MAX_PROMPTS]
        history = [
            {"step": i, "reward": 0.123456 * i, "kl": 0.1, "entropy": 1.0, "speed/learn": 2.0} for i in range(50_000)
        ]
        run = example_run() | {
            "rollouts": [view] * callback.MAX_ROLLOUTS,
            "answers": [few] * (callback.NUM_SNAPSHOTS + 1),
            "curves": curves(history),
        }
        write_page(tmp_path / REPORT, [run])
        assert (tmp_path / REPORT).stat().st_size < 2_000_000

    def test_highest_and_lowest_score_are_shown(self, tmp_path):
        rollout, samples, tokenizer = big_rollout(50, 3)
        view = token_view(rollout, samples, tokenizer, make_trainer(tmp_path).args, kl_coef=0.1, step=0)
        scores = [response["score"] for response in view["responses"]]
        assert (scores[0], scores[-1]) == (rollout.sequence_scores.max().item(), rollout.sequence_scores.min().item())
        assert scores == sorted(scores, reverse=True)


class TestCurves:
    def test_neighbors_are_averaged(self):
        history = [{"step": i, "reward": float(i % 2)} for i in range(4 * MAX_POINTS)]
        steps, values = curves(history)["reward"]
        assert len(steps) == len(values) == MAX_POINTS
        assert steps[:2] == [1.5, 5.5]
        assert set(values) == {0.5}

    def test_a_long_history_costs_no_pattern_per_number(self, monkeypatch):
        """The whole history is read again for each page, so a page of a long run must stay cheap."""
        history = [{"step": i, "reward": 1.0, "kl": 0.1, "loss": 0.1} for i in range(1000)]
        tried = []
        real = re.sub
        monkeypatch.setattr(re, "sub", lambda *args, **kwargs: tried.append(args) or real(*args, **kwargs))
        assert len(curves(history)["reward"][0]) <= MAX_POINTS
        assert len(tried) <= 4

    def test_what_is_drawn(self):
        history = [
            {"step": 1, "reward": 1.0, "loss": 3.0, "kl": math.nan},
            {"step": 2, "eval_reward": 2.0, "eval_held_out_reward": 4.0, "eval_rewards/f/mean": 9.0},
        ]
        assert curves(history) == {
            "reward": [[1], [1.0]], "eval_reward": [[2], [2.0]], "eval_held_out_reward": [[2], [4.0]],
        }  # fmt: skip

    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib")
        history = [{"step": i, "reward": i / 3, "kl": i / 2, "eval_reward": i / 4} for i in range(5)]
        path = plot_curves(history, tmp_path / "new" / "curves.png")
        assert path == tmp_path / "new" / "curves.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 10_000

    def test_no_curves_no_picture(self, tmp_path):
        assert plot_curves([{"step": 1, "train_runtime": 3.0}], tmp_path / "curves.png") is None
        assert not list(tmp_path.iterdir())

    def test_without_matplotlib_it_is_said_once(self, tmp_path, monkeypatch, recwarn):
        from ppo_plus.report import curves as module

        monkeypatch.setitem(sys.modules, "matplotlib", None)
        module._has_matplotlib.cache_clear()
        for _ in range(2):
            assert plot_curves([{"step": 1, "reward": 3.0}], tmp_path / "curves.png") is None
        assert len([w for w in recwarn if "matplotlib is missing" in str(w.message)]) == 1
        module._has_matplotlib.cache_clear()


class TestComparison:
    def test_runs_in_one_page(self, tmp_path, capsys):
        for name in ("one", "two"):
            write_page(tmp_path / name / REPORT, [example_run()])
        main([str(tmp_path / "one"), str(tmp_path / "two" / REPORT), "--output", str(tmp_path / "both.html")])
        data = json.loads(Page((tmp_path / "both.html").read_text()).scripts[0])
        assert [run["name"] for run in data["runs"]] == [str(tmp_path / "one"), str(tmp_path / "two" / REPORT)]
        assert "2 runs" in capsys.readouterr().out

    def test_a_folder_without_a_report_is_named(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main([str(tmp_path)])
        assert f"{tmp_path / REPORT} does not exist" in capsys.readouterr().err

    @pytest.mark.parametrize("data", NO_RUNS)
    def test_a_damaged_report_is_named(self, tmp_path, capsys, data):
        (tmp_path / REPORT).write_text(page_with(data))
        assert f"{tmp_path / REPORT} is not the report of one run" in self.refused(capsys, tmp_path)

    @pytest.mark.parametrize("taken", ["folder", "folder/below"])
    def test_an_output_that_cannot_be_written_is_named(self, tmp_path, capsys, taken):
        write_page(tmp_path / "run" / REPORT, [example_run()])
        (tmp_path / "folder").mkdir() if taken == "folder" else (tmp_path / "folder").write_text("a file")
        said = self.refused(capsys, tmp_path / "run", "--output", tmp_path / taken)
        assert f"--output {tmp_path / taken} " in said
        assert ("is a folder: pass a file, such as" in said) == (taken == "folder")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]

    @pytest.mark.parametrize("output", [REPORT, f"../run/{REPORT}"])
    def test_a_comparison_does_not_take_the_place_of_a_report(self, tmp_path, capsys, monkeypatch, output):
        run = tmp_path / "run"
        run.mkdir()
        write_page(run / REPORT, [example_run()])
        before = (run / REPORT).read_bytes()
        monkeypatch.chdir(run)
        assert "would overwrite the report of" in self.refused(capsys, run, "--output", output)
        assert (run / REPORT).read_bytes() == before
        main([str(run), "--output", "other.html"])
        assert (run / "other.html").is_file()

    def test_a_full_disk_is_named(self, tmp_path, capsys, monkeypatch):
        def write_bytes(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        write_page(tmp_path / REPORT, [example_run()])
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        assert "cannot be written ([Errno 28] No space left" in self.refused(capsys, tmp_path, "--output", "c.html")

    def refused(self, capsys, *arguments):
        """The one line that a command ends in."""
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        assert stop.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("ppo-plus report: error: ")
        return line

    def test_as_a_command(self, tmp_path):
        write_page(tmp_path / REPORT, [example_run()])
        command = [sys.executable, "-m", "ppo_plus.report", str(tmp_path), "--output", str(tmp_path / "c.html")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (tmp_path / "c.html").is_file()
        assert "RuntimeWarning" not in done.stderr


# --- in a browser ---

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=2000", "--window-size=1280,2400",
)  # fmt: skip
# A visitor: switches to each quantity, points at a token and at a curve, and writes down what it saw.
VISIT = """<script>
{
const charts = document.querySelectorAll("figure svg[role=img]"), tip = () => document.getElementById("tip").innerText;
const seen = {title: document.title, charts: charts.length, shades: {}, tips: []};
for (const input of document.querySelectorAll("input[name=quantity]")) {
  input.click();
  seen.shades[input.value] = [...document.querySelectorAll("[data-i]")].map(s => getComputedStyle(s).backgroundColor);
}
seen.tokens = [...document.querySelectorAll("[data-i]")].map(s => s.textContent);
const point = (node, x, y) =>
  node.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: x, clientY: y}));
point(document.querySelector("[data-i]"), 40, 40);
seen.tips.push(tip());
const box = charts[0].getBoundingClientRect();
point(charts[0], box.right - 10, box.top + 20);
seen.tips.push(tip());
const text = document.querySelector(".tokens");
text.focus();
text.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
seen.tips.push(tip());
seen.table = document.querySelector("tbody").innerText;
seen.wide = document.documentElement.scrollWidth > innerWidth;
console.log("SEEN " + encodeURIComponent(JSON.stringify(seen)));
}
</script>"""


def example_run():
    """A run as the page takes it, every text of it hostile."""
    response = {
        "prompt": HOSTILE, "score": 1.5, "total_kl": 0.7, "length": 5, "tokens": [HOSTILE, " b", "\n", ""],
        "advantage": [-2.0, 0.0, 1.0, 2.0], "value": [0.1, 0.2, 0.3, 0.4], "kl": [0.1, -0.2, 0.3, 0.5],
        "reward": [-0.01, 0.02, -0.03, 1.5], "logprob": [-0.1, -0.2, -0.3, -0.4],
    }  # fmt: skip
    row = {"prompt": HOSTILE, "answer": HOSTILE, "reward": 0.25, "kl": 0.0}
    names = ["reward", "eval_reward", "eval_held_out_reward", "kl", "speed/generate", "speed/learn", "learning_rate"]
    return {
        "name": HOSTILE,
        "settings": {"model": HOSTILE, "kl_coef": 0.05},
        "step": 30,
        "max_steps": 40,
        "answers": [{"step": step, "rows": [row]} for step in (0, 30)],
        "rollouts": [{"step": 28, "total": 64, "responses": [response, {**response, "score": -1.0}]}],
        "curves": {name: [[4, 8, 30], [0.5, 0.25 + i, 3.75 + i]] for i, name in enumerate(names)},
    }


def visit(page, tmp_path, *flags):
    """What the browser printed about a page, as lines."""
    profile = tmp_path / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
class TestInABrowser:
    def seen(self, tmp_path, runs):
        page = tmp_path / "visited.html"
        write_page(page, runs)
        page.write_text(page.read_text().replace("</body>", VISIT + "</body>"))
        (line,) = visit(page, tmp_path, "--dump-dom")  # nothing else: no error, no warning
        return json.loads(unquote(line.split("SEEN ")[1].split('"')[0]))

    def test_shown_and_pointed_at(self, tmp_path):
        seen = self.seen(tmp_path, [example_run()])
        assert seen["title"].startswith("PPO: </script>")  # as text
        assert seen["charts"] == 4
        assert seen["tokens"][1:] == [" b", "↵\n", "·", HOSTILE, " b", "↵\n", "·"]
        assert "Advantage\n−2" in seen["tips"][0] and "Probability\n0.905" in seen["tips"][0]
        assert "step 30" in seen["tips"][1] and "training" in seen["tips"][1] and "3.75" in seen["tips"][1]
        assert "evaluation, held_out" in seen["tips"][1]
        assert "1 of 5" in seen["tips"][2]
        assert "owned" in seen["table"]
        assert not seen["wide"]

    def test_colors_say_sign_and_size(self, tmp_path):
        shades = self.seen(tmp_path, [example_run()])["shades"]
        assert set(shades) == {"advantage", "value", "kl", "reward"}
        parsed = [[float(x) for x in shade[shade.index("(") + 1 : -1].split(",")] for shade in shades["advantage"][:4]]
        negative, zero, small, large = parsed
        assert negative[2] > negative[0] and large[0] > large[2]  # blue and orange
        assert zero[3] == 0
        assert 0 < small[3] < large[3] == negative[3]
        assert len({tuple(s) for s in shades.values()}) == 4

    def test_several_runs(self, tmp_path):
        other = {**example_run(), "name": "other", "settings": {"kl_coef": 0.1}, "rollouts": [], "answers": []}
        seen = self.seen(tmp_path, [example_run(), other])
        assert "other: training" in seen["tips"][1]

    def test_a_run_of_the_trainer_and_its_picture(self, tmp_path):
        trained(tmp_path, {"max_steps": 8}, eval_dataset=make_prompts(4), reward_funcs=count_e)
        for scheme in ("light", "dark"):
            picture = tmp_path / f"{scheme}.png"
            dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
            assert visit(tmp_path / REPORT, tmp_path, *dark, f"--screenshot={picture}") == []
            pixels = torch.from_numpy(pytest.importorskip("matplotlib.image").imread(picture))
            assert pixels.shape[:2] == (2400, 1280)
            paper = pixels[2, 2, :3].mean()
            assert (paper > 0.9) == (scheme == "light")
            ink = ((pixels[..., :3].mean(-1) - paper).abs() > 0.5).float().mean()
            assert 0.005 < ink < 0.3

    def test_an_error_would_be_seen(self, tmp_path):
        """Negative control of the above."""
        write_page(tmp_path / REPORT, [{**example_run(), "rollouts": None}])
        (line,) = visit(tmp_path / REPORT, tmp_path, "--dump-dom")
        assert "TypeError" in line
