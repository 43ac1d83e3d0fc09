"""Responses from a vLLM server, over HTTP to a fake that computes with transformers and PEFT (vllm_server.py)."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from agents import add, make_tool_model, questions, right_sum, tool_tokenizer
from conftest import lora, make_config, make_model, make_prompts, make_trainer
from peft import IA3Config, PeftModel
from test_distributed import alone, launch
from vllm_server import FakeVLLM

from ppo_plus import PPOCallback
from ppo_plus.rollout.vllm_client import EngineError, RefusedError, VLLMClient
from ppo_plus.utils.interrupt import Interrupt, Interrupted

CHECK = 4  # completions of the comparison before training
ROWS = 8  # completions of a rollout


@pytest.fixture
def fake():
    with FakeVLLM(make_model()) as server:
        yield server


def make_run(tmp_path, fake, config=None, **overrides):
    options = {"use_vllm": True, "vllm_server_base_url": fake.url, "vllm_server_timeout": 200.0, **(config or {})}
    return make_trainer(tmp_path, config=options, **overrides)


def completions(fake):
    return [payload for path, payload in fake.requests if path == "/v1/completions"]


def rollouts(trainer):
    return [row for row in trainer.state.log_history if "reward" in row]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


# The distribution


def test_the_server_samples_from_the_policy_before_and_after_updates(tmp_path, fake):
    trainer = make_run(tmp_path, fake)
    trainer.train()
    gaps = [row["sampling/logp_difference"] for row in rollouts(trainer)]
    assert len(gaps) == 2 and max(gaps) < 1e-5
    assert all(row["ppo/initial_ratio_error"] == 0 for row in rollouts(trainer))
    assert fake.adapters == {}
    assert not list(tmp_path.glob("vllm-adapter-*"))


def test_a_server_that_answers_with_an_earlier_adapter_is_seen(tmp_path, fake):
    """Negative control of the above."""
    fake.stale = True
    trainer = make_run(tmp_path, fake)
    with pytest.warns(UserWarning, match="sampling/logp_difference"):
        trainer.train()
    first, second = (row["sampling/logp_difference"] for row in rollouts(trainer))
    assert first < 1e-5 and second > 0.1


def test_importance_weights_correct_what_the_server_samples_otherwise(tmp_path, fake):
    """As for decoding in the trainer, which test_trainer.py tests with the same offsets."""
    fake.edit = lambda body: body | {"choices": [shift(body["choices"][0], -0.1)]}
    advantages = {}
    for cap in (None, 2.0):
        trainer = make_run(tmp_path, fake, {"max_steps": 1, "importance_sampling_cap": cap})
        trainer.train()
        advantages[cap] = trainer._progress.rollout.advantages
    factor = torch.tensor(0.1).exp()
    torch.testing.assert_close(advantages[2.0], advantages[None] * factor, rtol=1e-4, atol=1e-5)


def shift(choice, by):
    logprobs = [value + by for value in choice["logprobs"]["token_logprobs"]]
    return choice | {"logprobs": {"token_logprobs": logprobs}}


def test_the_masked_objective_trains_on_the_servers_log_probabilities(tmp_path, fake):
    trainer = make_run(tmp_path, fake, {"max_steps": 1, "objective": "masked", "cliprange_high": 5.0})
    trainer.train()
    ours = make_run(tmp_path, fake, {"max_steps": 1})
    ours.train()
    mask = trainer._progress.rollout.action_mask
    torch.testing.assert_close(trainer._progress.rollout.logprobs[mask], ours._progress.rollout.logprobs[mask])


# Requests


def test_a_request_has_what_the_trainers_own_decoding_uses(tmp_path, fake):
    config = {"max_steps": 1, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "temperature": 0.8, "stop_token_id": 14}
    trainer = make_run(tmp_path, fake, config)
    trainer.train()
    rollout, check = completions(fake)[CHECK:], completions(fake)[:CHECK]
    assert len(rollout) == ROWS
    for payload in rollout:
        names = ("top_p", "top_k", "min_p", "temperature", "max_tokens", "ignore_eos", "repetition_penalty")
        assert [payload[name] for name in names] == [0.9, 7, 0.01, 0.8, 8, True, 1.0]
        assert sorted(payload["stop_token_ids"]) == [2, 14]
    assert {(p["top_p"], p["top_k"], p["min_p"]) for p in check} == {(1.0, 0, 0.0)}
    prompts = [trainer.train_dataset[i]["input_ids"] for i in range(len(trainer.train_dataset))]
    assert all(payload["prompt"] in prompts for payload in rollout)
    assert len({payload["model"] for payload in rollout}) == 1


def test_a_row_has_the_same_seed_in_every_run_and_no_other_rows(tmp_path, fake):
    seeds = []
    for _ in range(2):
        fake.requests.clear()
        make_run(tmp_path, fake).train()
        seeds.append({(tuple(p["prompt"]), p["seed"]) for p in completions(fake)[CHECK:]})
    assert seeds[0] == seeds[1] and len({seed for _, seed in seeds[0]}) == 2 * ROWS
    fake.requests.clear()
    make_run(tmp_path, fake, {"seed": 7}).train()
    assert not {seed for _, seed in seeds[0]} & {p["seed"] for p in completions(fake)[CHECK:]}


def test_responses_to_a_prompt_have_their_own_seeds(tmp_path, fake):
    make_run(tmp_path, fake, {"max_steps": 1, "num_generations": 2}).train()
    rollout = completions(fake)[CHECK:]
    assert len({payload["seed"] for payload in rollout}) == ROWS
    assert sorted(tuple(p["prompt"]) for p in rollout)[::2] == sorted(tuple(p["prompt"]) for p in rollout)[1::2]


def test_a_row_that_has_to_end_earlier_asks_for_fewer_tokens(tmp_path, fake):
    trainer = make_run(tmp_path, fake)
    uniforms = torch.rand(3, 5, dtype=torch.float64)
    uniforms[1, 2:] = torch.nan
    engine, caches, ended = trainer.collector.engine, [None] * 3, {}
    with engine.serve(trainer.model):
        output = engine.generate([[5], [6], [7, 8]], uniforms, turn_caches=caches, on_row_end=ended.__setitem__)
    assert {row: ids.tolist() for row, ids in ended.items()} == {
        row: output.tokens[row, : len(ids)].tolist() for row, ids in ended.items()
    } and sorted(ended) == [0, 1, 2]
    assert sorted((len(p["prompt"]), p["max_tokens"]) for p in completions(fake)[-3:]) == [(1, 2), (1, 5), (2, 5)]
    assert output.tokens.shape == output.logprobs.shape == (3, 5) and caches == [None] * 3


def test_tools_are_called_between_turns_of_the_server(tmp_path):
    with FakeVLLM(make_tool_model(), max_model_len=512) as fake:
        trainer = make_run(
            tmp_path, fake, {"max_steps": 1, "response_length": 150, "max_tool_calling_iterations": 2},
            model=make_tool_model(), tools=[add], reward_funcs=right_sum, train_dataset=questions(),
            processing_class=tool_tokenizer(),
        )  # fmt: skip
        trainer.train()
    (row,) = rollouts(trainer)
    assert row["tools/call_frequency"] > 0 and row["sampling/logp_difference"] < 1e-5
    assert len(completions(fake)) > CHECK + ROWS


def test_evaluation_and_the_report_ask_the_server(tmp_path, fake):
    config = {"max_steps": 1, "html_report": True, "eval_win_rate": True}
    trainer = make_run(tmp_path, fake, config, eval_dataset=make_prompts(3))
    trainer.train()
    asked = len(completions(fake))
    assert asked > CHECK + ROWS  # the report's answers
    trainer.evaluate()
    models = [payload["model"] for payload in completions(fake)[asked:]]
    assert len(models) == 6 and models.count("base") == 3  # the reference is the base
    trainer.evaluate()  # whose answers are kept
    assert len(completions(fake)) == asked + 9


def test_the_reference_of_a_continued_adapter_is_that_adapter(tmp_path, fake):
    policy = make_run(tmp_path, fake).model.policy
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    policy.save_pretrained(tmp_path / "adapter")
    continued = PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"), is_trainable=True)
    trainer = make_run(
        tmp_path, fake, {"max_steps": 4, "eval_win_rate": True}, model=continued, peft_config=None,
        eval_dataset=make_prompts(3),
    )  # fmt: skip
    trainer.train()
    fake.requests.clear()
    trainer.evaluate()
    names = [payload["model"] for payload in completions(fake)]
    assert len({*names}) == 2 and "base" not in names
    rows = trainer._evaluator._shard_for_rank(trainer.eval_dataset)[0]
    with trainer.model.role("reference"):
        assert trainer.collector.compare_engine(rows, torch.rand(3, 5, dtype=torch.float64), [0.7])[0] < 1e-5
    assert rollouts(trainer)[0]["kl"] == pytest.approx(0, abs=1e-4)


# Failures


def test_a_failure_in_a_rollout_saves_and_the_run_resumes_to_the_same_bits(tmp_path, fake):
    whole = make_run(tmp_path / "whole", fake)
    whole.train()
    fake.completions, fake.fail_from = 0, CHECK + ROWS + 3  # in the second rollout
    trainer = make_run(tmp_path / "run", fake)
    with pytest.raises(EngineError, match=r"step 4.*resume_from_checkpoint"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-4" / "manifest.json").is_file()
    fake.fail_from = None
    resumed = make_run(tmp_path / "run", fake)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_failure_in_the_first_rollout_leaves_nothing_to_save(tmp_path, fake):
    fake.fail_from = CHECK + 1
    trainer = make_run(tmp_path, fake)
    with pytest.raises(EngineError, match="step 0"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not list(tmp_path.glob("vllm-adapter-*"))


def test_a_failure_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, fake):
    config = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 4}
    fake.fail_from = CHECK + ROWS + 2
    trainer = make_run(tmp_path, fake, config, eval_dataset=make_prompts(3))
    with pytest.raises(EngineError, match="step 4"):
        trainer.train()
    fake.fail_from = None
    resumed = make_run(tmp_path, fake, config, eval_dataset=make_prompts(3))
    resumed.train(resume_from_checkpoint=True)
    assert [row for row in resumed.state.log_history if "eval_reward" in row]


def test_a_failure_at_the_end_costs_the_last_answers_of_the_report_alone(tmp_path, fake):
    class Break(PPOCallback):
        def on_rollout_end(self, *args, **kwargs):
            fake.fail_from = 0

    trainer = make_run(tmp_path, fake, {"max_steps": 4, "html_report": True}, callbacks=[Break()])
    trainer.train()
    assert trainer.state.global_step == 4 and (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda body: {"choices": [{"text": "a"}]}, "no token ids"),
        (lambda body: {"object": "error"}, "no token ids"),
        (lambda body: {"choices": [body["choices"][0] | {"token_ids": [9999] * 8}]}, "9999.*vocabulary"),
    ],
)
def test_an_answer_that_is_none_is_named(tmp_path, fake, edit, says):
    trainer = make_run(tmp_path, fake)
    fake.edit = edit
    with pytest.raises(EngineError, match=says):
        trainer.train()


def test_a_response_that_the_server_cuts_is_named(tmp_path, fake):
    trainer = make_run(tmp_path, fake)
    fake.stop_early = 3
    with pytest.raises(EngineError, match="3 of 8 tokens"):
        trainer.train()


# Several processes


@pytest.mark.slow
def test_two_processes_share_a_server_and_stop_together_when_it_fails(tmp_path, fake):
    config = {"use_vllm": True, "vllm_server_base_url": fake.url}
    weights, _ = alone(tmp_path / "one", seed=42, **config)
    fake.requests.clear()
    launch(tmp_path / "two", config={"gradient_accumulation_steps": 2, **config})
    assert (torch.load(tmp_path / "two" / "weights.pt") - weights).abs().max() < 1e-4
    assert sum(path == "/v1/load_lora_adapter" for path, _ in fake.requests) == 3  # the comparison, and two rollouts
    assert len({payload["seed"] for payload in completions(fake)}) == CHECK + 4 * ROWS
    fake.completions, fake.fail_from = 0, 2 * CHECK + 2 * ROWS + 2
    with pytest.raises(AssertionError, match="step 4"):
        launch(tmp_path / "broken", config={"gradient_accumulation_steps": 2, **config})
    assert (tmp_path / "broken" / "checkpoint-4" / "manifest.json").is_file() and fake.adapters == {}
    fake.fail_from = None
    launch(tmp_path / "broken", config={"gradient_accumulation_steps": 2, **config}, resume=True)
    assert (torch.load(tmp_path / "broken" / "weights.pt") - weights).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("gather_all", [True, False], ids=["gathered", "layer by layer"])
def test_a_sharded_base_hands_over_the_adapter_that_is_whole(tmp_path, fake, gather_all):
    config = {"use_vllm": True, "vllm_server_base_url": fake.url, "html_report": True}
    weights, _ = alone(tmp_path / "one", seed=42, **config)
    fake.requests.clear()
    sharded = {"gradient_accumulation_steps": 2, "fsdp": True, "ds3_gather_for_generation": gather_all}
    log = launch(tmp_path / "two", config={**sharded, **config})["log"]
    assert (torch.load(tmp_path / "two" / "weights.pt") - weights).abs().max() < 1e-4
    assert max(row["sampling/logp_difference"] for row in log) < 1e-5


# The client


@pytest.mark.parametrize("parallel", [1, 3])
def test_completions_come_in_order_and_at_most_so_many_at_a_time(fake, parallel):
    fake.respond = slow_echo(fake)
    client, arrived = VLLMClient(fake.url, 10.0), []
    requests = [{"prompt": [i], "max_tokens": 1} for i in range(7)]
    found = client.complete(requests, parallel, lambda index, completion: arrived.append((index, completion)))
    assert [completion.ids for completion in found] == [[i, 1] for i in range(7)]
    assert sorted(arrived, key=lambda pair: pair[0]) == list(enumerate(found))
    assert fake.most == parallel


def ignore(index, completion):
    """Do nothing with a completion."""


def slow_echo(fake):
    """Answer [prompt, 1], the later prompts sooner; count requests that overlap."""
    fake._lock, counter, fake.running, fake.most = threading.Semaphore(100), threading.Lock(), 0, 0

    def respond(path, payload):
        with counter:
            fake.running += 1
            fake.most = max(fake.most, fake.running)
        (prompt,) = payload["prompt"]
        time.sleep(0.1 - 0.01 * prompt)
        with counter:
            fake.running -= 1
        return 200, {"choices": [{"token_ids": [prompt, 1], "logprobs": {"token_logprobs": [0.0, -1.0]}}]}

    return respond


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [(400, RefusedError, "refused.*because"), (404, RefusedError, "refused"), (500, EngineError, "500 because"),
     (503, EngineError, "generation_batch_size"), (429, EngineError, "generation_batch_size"),
     (None, EngineError, "cannot be reached .*[Dd]isconnected")],
)  # fmt: skip
def test_states_of_http_are_sentences(fake, status, kind, says):
    fake.respond = lambda path, payload: (status, {"error": {"message": "because"}})
    with pytest.raises(kind, match=says) as raised:
        VLLMClient(fake.url, 5.0).complete([{}, {}], 2, ignore)
    assert fake.url in str(raised.value) and type(raised.value) is kind


def test_a_server_that_does_not_answer_in_time_is_named(fake):
    fake.respond = lambda path, payload: time.sleep(2) or (200, {})
    with pytest.raises(EngineError, match="vllm_server_timeout=0.2"):
        VLLMClient(fake.url, 0.2).complete([{}], 1, ignore)


def test_a_server_that_is_not_there_is_waited_for(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
    client, waited = VLLMClient(url, 1.5), time.monotonic()
    with pytest.raises(EngineError, match=url):
        client.wait_until_up()
    assert time.monotonic() - waited > 1
    with pytest.raises(EngineError, match=url):
        make_trainer(tmp_path, config={"use_vllm": True, "vllm_server_base_url": url, "vllm_server_timeout": 0.1})


def test_a_server_that_starts_while_it_is_waited_for_is_used(fake):
    answers = iter([503, 503, 200])
    fake.respond = lambda path, payload: (next(answers), {})
    with pytest.warns(UserWarning, match="vllm_server_timeout=20.0") as warned:
        VLLMClient(fake.url, 20.0).wait_until_up()
    assert next(answers, None) is None and len(warned) == 1


def test_a_signal_ends_the_wait_for_answers(fake):
    asked, released = threading.Event(), threading.Event()
    fake.respond = lambda path, payload: (asked.set(), released.wait(20), (200, {}))[2]
    interrupt = Interrupt()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: interrupt.receive(number))
    threading.Thread(target=lambda: (asked.wait(10), os.kill(os.getpid(), signal.SIGUSR1)), daemon=True).start()
    try:
        with interrupt.allow(), pytest.raises(Interrupted):
            VLLMClient(fake.url, 60.0).complete([{}], 1, ignore)
    finally:
        released.set()
        signal.signal(signal.SIGUSR1, before)


# Refused before training


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        ({"use_vllm": True, "vllm_mode": "colocate"}, "vllm_mode", "colocate"),
        ({"use_vllm": True, "vllm_mode": "here"}, "vllm_mode", "here"),
        ({"use_vllm": True, "vllm_server_base_url": "localhost:8000"}, "vllm_server_base_url", "localhost:8000"),
        ({"use_vllm": True, "vllm_server_base_url": "http://me:secret@localhost:8000"}, "vllm_server_base_url", "user"),
        ({"use_vllm": True, "vllm_server_port": 0}, "vllm_server_port", "0"),
        ({"use_vllm": True, "vllm_server_timeout": 0}, "vllm_server_timeout", "0"),
        ({"vllm_server_base_url": "http://localhost:8000"}, "vllm_server_base_url", "use_vllm=False"),
        ({"vllm_server_port": 8001}, "vllm_server_port", "8001"),
    ],
)
def test_fields_are_refused_by_name(tmp_path, config, field, value):
    with pytest.raises(ValueError, match=f"{field}.*{value}|{value}.*{field}"):
        make_config(tmp_path, **config)


def test_the_address_has_two_forms(tmp_path):
    parts = make_config(tmp_path, use_vllm=True, vllm_server_host="10.0.0.1", vllm_server_port=9)
    whole = make_config(tmp_path, use_vllm=True, vllm_server_base_url="https://name/vllm/", vllm_server_port=9)
    assert (parts.vllm_url, whole.vllm_url) == ("http://10.0.0.1:9", "https://name/vllm")


def rollout(prompts, trainer):
    raise AssertionError


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"peft_config": None, "ref_model": make_model}, "use_vllm.*peft_config"),
        ({"peft_config": lora(use_dora=True)}, "use_dora=True"),
        ({"peft_config": lora(modules_to_save=["lm_head"])}, "modules_to_save=.*lm_head"),
        ({"peft_config": lora(trainable_token_indices=[1])}, "trainable_token_indices"),
        ({"peft_config": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])}, "IA3"),
        ({"rollout_func": rollout}, "use_vllm.*rollout_func"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_before_the_server_is_asked(tmp_path, fake, overrides, says):
    overrides = {name: value() if value is make_model else value for name, value in overrides.items()}
    with pytest.raises(ValueError, match=says):
        make_run(tmp_path, fake, **overrides)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"version": "0.9.2"}, "0.9.2"),
        ({"loads_adapters": False}, "--enable-lora"),
        ({"max_model_len": 100}, "--max-model-len.*128.*max_prompt_length=92"),
    ],
)
def test_a_server_without_what_a_run_needs_is_refused_before_weights_are_loaded(
    tmp_path, fake, monkeypatch, attributes, says
):
    vars(fake).update(attributes)
    monkeypatch.setattr("ppo_plus.trainer.load_actor_critic", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=says):
        make_run(tmp_path, fake)


def test_prompts_that_are_cut_fit_into_a_smaller_server(tmp_path, fake):
    fake.max_model_len = 100
    make_run(tmp_path, fake, {"max_prompt_length": 92})
    with pytest.raises(ValueError, match="max_prompt_length=92 .*now 93"):
        make_run(tmp_path, fake, {"max_prompt_length": 93})


def test_a_server_of_lower_rank_is_refused(tmp_path, fake):
    fake.max_rank = 2
    with pytest.raises(EngineError, match="--max-lora-rank must be at least r=4"):
        make_run(tmp_path, fake)


def test_a_server_with_log_probabilities_at_temperature_1_is_refused(tmp_path, fake):
    fake.raw = True
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        make_run(tmp_path, fake, {"temperature": 0.7})
    make_run(tmp_path, fake, {"temperature": 1.0})  # where both are the same


@pytest.mark.parametrize("base", [make_model(seed=1), make_model(vocab_size=60)], ids=["seed", "vocabulary"])
def test_a_server_of_another_base_is_refused(tmp_path, base):
    with FakeVLLM(base) as fake, pytest.raises((ValueError, EngineError), match="another vocabulary|same base"):
        make_run(tmp_path, fake)


def test_a_server_in_lower_precision_is_named(tmp_path):
    with FakeVLLM(make_model().bfloat16()) as fake, pytest.warns(UserWarning, match="--dtype float32"):
        make_run(tmp_path, fake)


def test_what_is_no_vllm_server_is_named(tmp_path, fake):
    fake.respond = lambda path, payload: (200, {"version": "0.32.0"})
    with pytest.raises(EngineError, match="no vLLM server"):
        make_run(tmp_path, fake)


def test_the_folder_of_the_adapter_is_in_the_output_folder(tmp_path, fake):
    make_run(tmp_path, fake)
    (payload,) = [payload for path, payload in fake.requests if path == "/v1/load_lora_adapter"]
    assert Path(payload["lora_path"]).parent == tmp_path
