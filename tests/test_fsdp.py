"""A base that FSDP2 shards over two processes (gloo, CPU): the bits of whole copies under DDP, at half the bytes.

accelerate 1.15 has no FSDP on a CPU, and PPOTrainer does not use its plugin: what runs here is what runs on a GPU, but
for the backend.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import classifier, lora, make_config, make_model, make_tokenizer
from peft import PeftModel, get_peft_model
from sharded_runs import RUNS, trained, trainer_of
from support_table import COLUMNS, SHARED
from test_distributed import launch
from transformers import AutoModelForCausalLM

from ppo_plus import PPOConfig
from ppo_plus.report.page import read_run
from ppo_plus.training.validation import check_fsdp

ROOT = Path(__file__).parents[1]
MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}  # bitsandbytes quantizes such layers


TWO_LAYERS = ("shared critic", "a separate critic", "cached lower layers", "tied embeddings, half precision",
              "answers to a prompt, a critic updated twice, recomputed activations",
              "evaluation of uneven prompts, report, samples")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base on disk, and next to it a reward model and a policy that are adapters on it."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    make_model(**MODEL).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    of_scores = lora(task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"], modules_to_save=["score"])
    for name, model, config in (
        ("reward", classifier(folder, seed=3), of_scores),
        ("adapter", AutoModelForCausalLM.from_pretrained(folder), lora()),
    ):
        adapted = get_peft_model(model, config)
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(folder.parent / name)
    return folder


def start_script(name, *arguments):
    """Run a script of this folder in two processes."""
    script = [str(ROOT / "tests" / name), *arguments]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.fixture(scope="module")
def runs(base):
    """All runs, each sharded and with whole copies, one after the other in the same two processes."""
    start_script("sharded_runs.py", str(base.parent))
    return json.loads((base.parent / "results.json").read_text())


def weights(base, name, fsdp):
    return torch.load(base.parent / name / str(fsdp) / "weights.pt")


@pytest.mark.support("B")
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_base_gives_the_bits_of_whole_copies(base, runs, name):
    """Trained weights, and all that is logged: rewards, evaluations, norms."""
    sharded, whole = (runs[f"{name}/{fsdp}"] for fsdp in (True, False))
    assert torch.equal(weights(base, name, True), weights(base, name, False))
    assert sharded["log"] == whole["log"] and len(whole["log"]) >= 7
    assert sharded["wrapper"] == whole["wrapper"] == "DistributedDataParallel"
    assert whole["bytes"] / 2 <= sharded["bytes"] < 0.51 * whole["bytes"]  # odd shapes are padded
    others = [weights(base, other, True) for other in RUNS if other != name]
    assert not any(torch.equal(weights(base, name, True), other) for other in others)  # negative control


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_rank_holds_its_share_and_one_layer(runs, name):
    """And embeddings, last norm and head, which every pass needs at both of its ends."""
    sharded, whole = (runs[f"{name}/{fsdp}"] for fsdp in (True, False))
    layers = 2 if name in TWO_LAYERS else MODEL["num_hidden_layers"]
    rest = whole["bytes"] - layers * whole["layer"]
    bound = 1.02 * (whole["bytes"] + rest + whole["layer"]) / 2
    assert sharded["learning"] <= bound < whole["learning"] == whole["bytes"]
    if name == "layer by layer":
        assert sharded["elsewhere"] <= bound
    else:
        assert sharded["elsewhere"] == whole["bytes"]  # gathered once


@pytest.mark.support("B", "`model.generate`, longer and more often on one process", columns=COLUMNS[1:3])
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_generate_on_ranks_that_decode_unevenly_answers_as_whole_copies_do(runs, name):
    sharded, whole = (runs[f"{name}/{fsdp}"]["answers"] for fsdp in (True, False))
    assert sharded == whole and all(len(answer) == 4 for answers in whole for answer in answers)
    assert any(runs[f"{other}/True"]["answers"] != sharded for other in RUNS)  # negative control


@pytest.mark.slow
def test_layers_of_eight_bits_keep_no_whole_weights_in_their_states(runs):
    """bitsandbytes multiplies by a second reference to each weight, which must not outlive the pass."""
    assert runs["int8/True"]["int8_states"] == 0 < runs["int8/False"]["int8_states"]


@pytest.mark.support("1")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared critic", "nf4", "int8"])
def test_two_processes_train_what_one_trains_with_twice_the_micro_batches(base, runs, name, tmp_path):
    one, other = (trainer_of(name, base, tmp_path / str(seed), gradient_accumulation_steps=4, seed=seed)
                  for seed in (42, 43))  # fmt: skip
    for trainer in (one, other):
        trainer.train()
    two = weights(base, name, True)
    assert (two - trained(one)).abs().max() < 1e-4
    assert (two - trained(other)).abs().max() > 1e-2  # negative control


@pytest.mark.slow
def test_the_report_and_the_adapter_of_a_sharded_run_are_as_plain_as_ever(base, runs):
    folder = base.parent / "evaluation of uneven prompts, report, samples" / "True"
    report = read_run(folder / "report.html")
    assert [len(answers["rows"]) for answers in report["answers"]] == [6, 6, 6]
    final = base.parent / "shared critic" / "True" / "final"
    names = {f.name for f in final.iterdir()}
    assert names == {f.name for f in (base.parent / "shared critic" / "False" / "final").iterdir()}
    policy = PeftModel.from_pretrained(make_model(), final)
    saved = torch.cat([p.flatten() for n, p in policy.named_parameters() if "lora_" in n])
    value_head = 32 + 1  # weight and bias, which are trained after the adapter
    assert torch.equal(saved, weights(base, "shared critic", True)[:-value_head])


@pytest.mark.support("R", SHARED, columns=["sharded"])
@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_same_bits_sharded_or_not(tmp_path):
    whole = launch(tmp_path / "whole", config={"fsdp": True})
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")  # inside the first rollout
    assert not list(Path(checkpoint).glob("*fsdp*")) and not (Path(checkpoint) / "model.safetensors").exists()
    for name, config in (("sharded", {"fsdp": True}), ("copies", {})):
        resumed = launch(tmp_path / name, resume=checkpoint, config=config)
        assert (resumed["sum"], resumed["norm"]) == (whole["sum"], whole["norm"])


# The request, and what is refused


@pytest.fixture
def environment(monkeypatch):
    """Restore the variables that a configuration replaces."""
    for name in ("ACCELERATE_USE_FSDP", "PPO_PLUS_FSDP"):
        monkeypatch.setenv(name, "false")
    return monkeypatch


@pytest.mark.parametrize("asked", [True, "full_shard", "full_shard auto_wrap", "True"])
def test_fsdp_is_requested_as_transformers_does(tmp_path, asked, environment):
    config = make_config(tmp_path, fsdp=asked, fsdp_config={"fsdp_version": 2, "reshard_after_forward": True})
    assert config.fsdp is True and config.fsdp_plugin_args is None
    assert make_config(tmp_path).fsdp is False  # negative control


def test_fsdp_is_requested_as_accelerate_does(tmp_path, environment):
    """Its own FSDP must see nothing of it, in this and in later objects; ours, in each configuration."""
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    environment.setenv("FSDP_VERSION", "2")
    environment.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    for _ in range(2):
        assert make_config(tmp_path).fsdp is True
        assert os.environ["ACCELERATE_USE_FSDP"] == "false"


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("FSDP_VERSION", "1", "Set it to 2, as `--accelerate_config fsdp2`"),
        ("FSDP_OFFLOAD_PARAMS", "true", "Remove it"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "Remove it"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "activation_checkpointing=True in PPOConfig"),
    ],
)
def test_settings_of_accelerate_that_would_do_nothing_are_refused(tmp_path, variable, value, named, environment):
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    environment.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} .* is '{value}'.*{named}"):
        make_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"fsdp": "shard_grad_op"}, "shard_grad_op.*Set fsdp=True"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "version in fsdp_config is 1.*Set it to 2"),
        ({"fsdp": True, "fsdp_config": '{"cpu_offload": true}'}, "cpu_offload in fsdp_config is True.*Remove it"),
        ({"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}, "Remove it"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "activation_checkpointing=True in PPOCon"),
        ({"fsdp": True, "torch_compile": True}, "torch_compile does not work with fsdp"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path, config, named, environment):
    with pytest.raises(ValueError, match=named):
        make_config(tmp_path, **config)


def test_an_accelerator_that_shards_all_weights_is_refused(tmp_path, environment):
    args = make_config(tmp_path, fsdp=True)
    environment.setattr(PPOConfig, "world_size", 2)
    check_fsdp(args)
    environment.setenv("ACCELERATE_USE_FSDP", "true")  # as an Accelerator with a plugin does
    with pytest.raises(ValueError, match="Accelerator that shards all weights"):
        check_fsdp(args)
