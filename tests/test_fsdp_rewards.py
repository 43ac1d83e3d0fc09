"""A reward model on a base that FSDP2 shards over two processes (gloo, CPU): the bits of whole copies under DDP."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from sharded_reward_runs import RUNS, trained, trainer_of
from test_fsdp import MODEL, start_script

from ppo_plus import RewardConfig, RewardTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded_rewards") / "base"
    make_model(**MODEL).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base):
    """All runs, each sharded and with whole copies, one after the other in the same two processes."""
    start_script("sharded_reward_runs.py", str(base.parent))
    return json.loads((base.parent / "results.json").read_text())


def weights(base, *folder):
    return torch.load(base.parent.joinpath(*folder, "weights.pt"))


@pytest.mark.support("B")
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_base_gives_the_bits_of_whole_copies(base, runs, name):
    """Trained weights, and all that is logged: losses, accuracies, evaluations of an odd number of pairs."""
    sharded, whole = (runs[f"{name}/{fsdp}"] for fsdp in (True, False))
    assert torch.equal(weights(base, name, "True"), weights(base, name, "False"))
    assert sharded["log"] == whole["log"] and len(whole["log"]) >= 9
    assert sharded["wrapper"] == whole["wrapper"] == "DistributedDataParallel"
    others = [weights(base, other, "True") for other in RUNS if other != name]
    assert not any(torch.equal(weights(base, name, "True"), other) for other in others)  # negative control


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_rank_holds_half_of_the_base_and_gathers_a_layer(runs, name):
    sharded, whole = (runs[f"{name}/{fsdp}"] for fsdp in (True, False))
    assert whole["bytes"] / 2 <= sharded["bytes"] < 0.51 * whole["bytes"]  # odd shapes are padded
    for phase in ("learning", "elsewhere"):  # evaluations run layer by layer too: all ranks have as many batches
        assert sharded[phase] < 0.8 * whole[phase] and whole[phase] == whole["bytes"]


@pytest.mark.support("1")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a reward model", "a reward model on nf4"])
def test_two_processes_train_what_one_trains_with_twice_the_micro_batches(base, runs, name, tmp_path):
    two = weights(base, name, "True")
    for seed in (42, 43):
        one = trainer_of(name, base, tmp_path / str(seed), gradient_accumulation_steps=4, seed=seed)
        one.train()
        difference = (two - trained(one)).abs().max()
        assert difference < 1e-4 if seed == 42 else difference > 1e-2  # negative control


@pytest.mark.support("R", "`RewardTrainer` on fp32", columns=["sharded"])
@pytest.mark.slow
def test_a_checkpoint_resumes_to_the_same_bits_sharded_or_not(base, runs):
    expected = weights(base, "a reward model", "True")
    for fsdp in ("True", "False"):
        assert torch.equal(weights(base, "resumed", fsdp), expected)
    before = load_file(base.parent / "a reward model" / "True" / "checkpoint-3" / "adapter_model.safetensors")
    after = load_file(base.parent / "a reward model" / "True" / "final" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.slow
def test_what_is_saved_is_as_plain_as_ever(base, runs):
    sharded, whole = (base.parent / "a reward model" / fsdp / "final" for fsdp in ("True", "False"))
    assert {file.name for file in sharded.iterdir()} == {file.name for file in whole.iterdir()}
    for name in ("reward_model.json", "adapter_config.json"):
        assert json.loads((sharded / name).read_text()) == json.loads((whole / name).read_text())
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (sharded, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_a_reward_model_that_is_trained_as_a_whole_is_not_sharded(tmp_path, monkeypatch):
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", fsdp=True)
    with pytest.raises(ValueError, match="fsdp=True .* over processes, and there is one: .*ppo-plus reward"):
        RewardTrainer("no model", args)
    monkeypatch.setattr(RewardConfig, "world_size", 2)
    with pytest.raises(ValueError, match="fsdp=True shards the frozen base .*pass peft_config"):
        RewardTrainer("no model", args)


@pytest.mark.parametrize("option", ["torch_compile", "activation_offloading"])
def test_options_that_do_not_work_on_sharded_weights_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"RewardConfig: {option} does not work with fsdp"):
        RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", fsdp=True, **{option: True})
