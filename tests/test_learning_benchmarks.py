"""The arithmetic of the benchmarks of learning; their runs are long and measured apart."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_config, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import critic_pieces
import kl_control
import reward_model
from reward_model import reliability
from verifiable import EXAMPLES, HIGHEST, LOWEST, SIDES, Checker, run, sums


def logit(probability):
    return math.log(probability / (1 - probability))


class TestReliability:
    def test_by_hand(self):
        """Four pairs at 0.75, three of them right, are calibrated."""
        error, curve = reliability([logit(0.75)] * 3 + [-logit(0.75)])
        assert error == pytest.approx(0, abs=1e-9)
        assert [(b["count"], b["observed"]) for b in curve] == [(4, 0.25), (4, 0.75)]
        assert [b["predicted"] for b in curve] == pytest.approx([0.25, 0.75])

    def test_too_sure(self):
        """All at 0.95, half of them right: 0.45 off."""
        error, _ = reliability([logit(0.95), -logit(0.95)])
        assert error == pytest.approx(0.45)

    def test_extreme_gaps(self):
        assert reliability([1000.0, -1000.0])[0] == pytest.approx(0.5)


def test_a_run_that_was_kept_is_not_repeated(tmp_path, monkeypatch):
    runs = []

    def process(command, **kwargs):
        runs.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=f'{{"accuracy": {len(runs) / 4}}}\n')

    monkeypatch.setattr(reward_model.subprocess, "run", process)
    given = {"model": "base", "dtype": None, "pairs": 8, "eval_pairs": 4, "tokens": 16, "keep": tmp_path / "kept"}
    args, more = argparse.Namespace(**given), argparse.Namespace(**given | {"pairs": 9})
    asked = [("ours", 0, args), ("ours", 0, args), ("ours", 1, args), ("trl", 0, args), ("ours", 0, more)]
    assert [reward_model.child(*each)["accuracy"] for each in asked] == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert reward_model.child("ours", 1, args) == {"accuracy": 0.5}
    reward_model.child("ours", 0, argparse.Namespace(**given | {"keep": None}))
    assert len(runs) == 5


class TestSums:
    def test_wanted_is_the_sum(self):
        tasks = sums(200, seed=0, held_out=False)
        for prompt, wanted in zip(tasks["prompt"], tasks["wanted"], strict=True):
            *examples, question = prompt.split("\n")
            assert len(examples) == EXAMPLES
            for line in examples:
                left, right = line.split(" = ")
                assert sum(map(int, left.split(" + "))) == int(right)
            operands = [int(x) for x in question.removesuffix(" =").split(" + ")]
            assert min(operands) >= LOWEST and max(operands) <= HIGHEST
            assert str(sum(operands)) == wanted

    def test_held_out_sums_are_never_trained_on(self):
        pairs = {}
        for held_out in (True, False):
            pairs[held_out] = {
                line.split(" = ")[0].removesuffix(" =")
                for seed in range(3)
                for prompt in sums(300, seed, held_out)["prompt"]
                for line in prompt.split("\n")
            }
        assert len(pairs[True]) > 100
        assert not pairs[True] & pairs[False]

    def test_the_same_seed_gives_the_same_sums(self):
        assert sums(5, 0, True) == sums(5, 0, True)
        assert sums(5, 0, True) != sums(5, 1, True)


class TestChecker:
    def test_exactly_right_and_counted(self):
        checker = Checker()
        right = checker([" 42", "42.", " 4", " 142"], [[1, 2, 3], [1], [1], [1, 2]], ["42"] * 4)
        assert right == [1.0, 0.0, 0.0, 0.0]
        checker([" 42"], [[1, 2]], ["42"])
        assert checker.curve == [{"tokens": 7, "reward": 0.25}, {"tokens": 9, "reward": 1.0}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model that reads bytes, as a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>").save_pretrained(folder)
    make_model(vocab_size=257, eos_token_id=256, pad_token_id=256, bos_token_id=None).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("side", SIDES)
def test_every_side_generates_until_its_tokens_are_spent(tiny, side):
    given = argparse.Namespace(model=tiny, seed=0, tokens=350, prompts=128, dtype="float32", held_out=4)
    result = run(side, given)
    assert result["steps"] == 8  # two generations of 64, learned from in 2 x 2 steps
    assert len(result["curve"]) == 2
    assert 350 <= result["tokens"] == result["curve"][-1]["tokens"] <= 2 * 64 * 5


# --- pieces of the critic, and controllers of the KL ---


def test_each_variant_removes_one_piece_of_the_preset(tmp_path):
    default = make_config(tmp_path)
    for name, removed in critic_pieces.WITHOUT.items():
        args = make_config(tmp_path, **critic_pieces.VARIANTS[name])
        assert {option: getattr(args, option) for option in removed} == {o: getattr(default, o) for o in removed}
        kept = critic_pieces.SAO.keys() - removed.keys()
        assert {o: getattr(args, o) for o in kept} == {o: critic_pieces.SAO[o] for o in kept}
    removed_anywhere = {option for removed in critic_pieces.WITHOUT.values() for option in removed}
    assert critic_pieces.SAO.keys() - removed_anywhere == {"critic", "critic_backbone_learning_rate"}


def test_the_table_of_controllers_by_hand():
    """Of four runs, 5.2 and 6.6 are within 15 % of 6, 8.0 of 8, and 9.6 is not."""
    runs = {target: [{"curve": [{"kl": 0.0, "reward": 0.0}, {"kl": kl, "reward": 1.0}]} for kl in of]
            for target, of in {6.0: [5.2, 6.6], 8.0: [8.0, 9.6]}.items()}  # fmt: skip
    found = kl_control.table(runs)
    assert found["within_15_percent"] == 0.75
    assert found["targets"]["8.0"]["kl_over_target"] == pytest.approx([1.0, 1.2])
    assert found["targets"]["6.0"]["reward_spread"] == {"mean": 1.0, "sd": 0.0}


@pytest.mark.slow
def test_the_pieces_run_on_a_random_model():
    command = [sys.executable, critic_pieces.__file__, "--tiny", "--variants", "default", "sao"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert set(json.loads(done.stdout.splitlines()[-1])["variants"]) == {"default", "sao"}
