"""benchmarks/learning.py: its arithmetic by hand, and all of it on a tiny model and invented reviews."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "recipes" / "demo")]

import gradient_signal  # noqa: E402
import learning  # noqa: E402

from ppo_plus import PPOConfig  # noqa: E402
from ppo_plus.rollout.advantages import build_rollout  # noqa: E402


def curve(*points):
    """Of (seconds, reward, kl)."""
    more = {"vader": 0.5, "distinct_2": 0.75, "repetition_3": 0.0, "tokens": 24.0, "episodes": 32}
    return [{"seconds": s, "reward": r, "kl": kl, **more} for s, r, kl in points]


OURS = curve((0, 0.0, 0.0), (10, 1.0, 1.0), (20, 3.0, 5.0))
TRLS = curve((0, 0.0, 0.0), (20, 1.0, 4.0), (40, 2.0, 6.0))


class TestWhere:
    def test_between_points_on_the_straight_line(self):
        found = learning.where(OURS, "reward", 2.0)
        assert (found["seconds"], found["reward"], found["kl"]) == (15, 2.0, 3.0)

    def test_at_the_begin_at_a_point_and_never(self):
        assert learning.where(OURS, "reward", -1.0) == OURS[0]
        assert learning.where(OURS, "reward", 1.0)["seconds"] == 10
        assert learning.where(OURS, "reward", 3.1) is None

    def test_first_of_several(self):
        up_and_down = curve((0, 0, 0), (10, 2, 2), (20, 0, 1), (30, 4, 3))
        assert learning.where(up_and_down, "reward", 1.0)["seconds"] == 5


class TestAgainstTRL:
    def test_by_hand(self):
        """Ours is at TRL's final 2.0 after 15 of its 40 s, at 3 of its 6 nats."""
        result = learning.against_trl({"trl": [TRLS, TRLS], "ours": [OURS, OURS]})
        assert result["time_ratio_to_trl_final_reward"] == pytest.approx(15 / 40)
        assert result["kl_ratio"] == pytest.approx(3 / 6)
        assert result["final"]["trl"]["reward"] == {"mean": 2.0, "sd": 0.0}

    def test_the_frontier_is_at_equal_kl(self):
        """Up to 5 nats, which both reach; there ours has 3.0, TRL 1.5."""
        last = learning.against_trl({"trl": [TRLS], "ours": [OURS]})["frontier"][-1]
        assert last == {"kl": 5.0, "trl": {"mean": 1.5, "sd": None}, "ours": {"mean": 3.0, "sd": None}}

    def test_ratios_are_of_means_over_seeds(self):
        slow = curve((0, 0.0, 0.0), (60, 2.0, 6.0))
        result = learning.against_trl({"trl": [TRLS, slow], "ours": [OURS, OURS]})
        assert result["time_ratio_to_trl_final_reward"] == pytest.approx(30 / 100)

    def test_a_seed_that_does_not_get_there_leaves_no_ratio(self):
        """Negative control: sides exchanged."""
        result = learning.against_trl({"trl": [TRLS, OURS], "ours": [OURS, TRLS]})
        assert result["time_ratio_to_trl_final_reward"] is None
        assert result["seconds_to_trl_final_reward"] == [15.0, None]


def test_table_of_an_ablation_by_hand():
    run = {"curve": OURS, "log": {"explained_variance": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8]}}
    other = {"curve": TRLS, "log": {"explained_variance": [0.5]}}
    table = learning.ablation_table({"a": [run, other], "b": [other]})
    assert table["equal_kl"] == 5.0
    assert table["variants"]["a"]["reward"] == pytest.approx({"mean": 2.5, "sd": 0.5**0.5})
    assert table["variants"]["a"]["reward_at_equal_kl"]["mean"] == pytest.approx((3.0 + 1.5) / 2)
    assert table["variants"]["a"]["explained_variance"]["mean"] == pytest.approx((0.7 + 0.5) / 2)
    assert table["variants"]["b"]["seeds"] == 1 and table["variants"]["b"]["reward"]["sd"] is None


def test_each_table_has_the_default_and_variants_of_one_change():
    known = {f.name for f in fields(PPOConfig)} | {"adaptive_kl", "reward_normalization", "value_model"}
    for rows in learning.ABLATIONS.values():
        assert next(iter(rows.values())) == "default"
        assert set(rows.values()) <= set(learning.VARIANTS)
    assert learning.VARIANTS["default"] == {}
    assert {name for changes in learning.VARIANTS.values() for name in changes} <= known
    used = {variant for rows in learning.ABLATIONS.values() for variant in rows.values()}
    assert used == set(learning.VARIANTS)


def benchmark(world, monkeypatch, work, *arguments):
    """What `learning.py` prints last."""
    monkeypatch.setenv("PPO_PLUS_CACHE", str(world / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), "--dry", "--model", str(world / "tiny")]
    command += ["--work", str(work), "--dtype", "float32", "--held-out", "8", "--rollout", "8"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + "".join(f.read_text()[-3000:] for f in Path(work).rglob("*.log"))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_ablations_run_and_are_not_run_again(world, monkeypatch, tmp_path):
    options = ["--episodes", "16", "--seeds", "0", "--jobs", "2", "--ablations", "value_head"]
    result = benchmark(world, monkeypatch, tmp_path, *options)
    assert list(result["tables"]["value_head"]["variants"]) == ["linear", "mlp"]
    run = tmp_path / "default-0"
    curve = json.loads((run / "curve.json").read_text())["curve"]
    assert [point["episodes"] for point in curve] == [8, 16]
    assert all(point["kl"] != 0.0 for point in curve)
    (start,) = json.loads((tmp_path / "start.json").read_text())["curve"]
    assert (start["episodes"], start["seconds"], start["kl"]) == (0, 0.0, 0.0)

    before = [(run / file).stat().st_mtime_ns for file in ("run.json", "curve.json")]
    assert benchmark(world, monkeypatch, tmp_path, *options)["tables"] == result["tables"]
    assert [(run / file).stat().st_mtime_ns for file in ("run.json", "curve.json")] == before


def job_of(world, monkeypatch, **given):
    """A run of 24 episodes, with the reward model that all tests share."""
    monkeypatch.setenv("PPO_PLUS_CACHE", str(world / "cache"))
    work = world / "work"
    job = {
        "model": str(world / "tiny"), "work": str(work), "folder": str(work), "dtype": "float32", "rollout": 8,
        "held_out": 8, "unit": "episodes", "points": [8, 16, 24], "episodes": 10**6, "seed": 0, "changes": {},
    }  # fmt: skip
    if not (work / "merged").is_dir():
        work.mkdir()
        learning.prepare(job)
    return job | given


@pytest.mark.parametrize("variant", learning.VARIANTS)
def test_every_variant_trains(world, monkeypatch, tmp_path, variant):
    changes = learning.VARIANTS[variant]
    result = learning.ours(job_of(world, monkeypatch, folder=str(tmp_path), changes=changes))
    assert [point["episodes"] for point in result["points"]] == [8, 16, 24]
    assert (tmp_path / "2" / "adapter_model.safetensors").is_file()
    assert result["points"][0]["seconds"] < result["points"][1]["seconds"]
    steered = len(set(result["log"]["kl_coef"])) > 1
    assert steered == ("adaptive_kl" in changes)


def test_a_run_that_ends_before_its_budget_is_an_error(world, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="before its budget"):
        learning.ours(job_of(world, monkeypatch, folder=str(tmp_path), episodes=8))


def test_the_merged_reward_model_scores_as_the_adapter(world, monkeypatch):
    """TRL gets the same rewards, up to the bf16 of its weights; the bare base (negative control) gives others."""
    job = job_of(world, monkeypatch)
    merged = AutoModelForSequenceClassification.from_pretrained(f"{job['work']}/merged", dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, f"{job['work']}/reward_model")
    ids = torch.randint(4, 40, (6, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (model.eval()(input_ids=ids).logits[:, 0] for model in (adapter, merged))
        with adapter.disable_adapter():
            bare = adapter(input_ids=ids).logits[:, 0]
    assert (found - wanted).abs().max() < 0.05 * wanted.std()
    assert (bare - wanted).abs().max() > 0.5 * wanted.std()


class TestGradientSignal:
    def drawn(self, noise, bias=0.0, minibatches=24):
        """Gradients around a direction, with noise of parameters of unequal size."""
        rng = torch.Generator().manual_seed(0)
        size = torch.linspace(0.5, 2.0, 400)
        signal, other = torch.randn(2, 400, generator=rng) * size
        other -= (other @ signal) / (signal @ signal) * signal
        return signal + bias * other + noise * size * torch.randn(minibatches, 400, generator=rng)

    def test_by_loops(self):
        gradients = {"off 0.95": self.drawn(4.0), "on 1.0": self.drawn(2.0), "on 0.5": self.drawn(1.0)}

        def worth(name, kept):
            g = gradients[name]
            steps = g / (g**2).mean(0) ** 0.5
            pairs = [float(steps[i] @ gradients["on 1.0"][j]) for i in kept for j in kept if i != j]
            return sum(pairs) / len(pairs)

        found, n = gradient_signal.gains(gradients), 24
        for name in gradients:
            assert found[name]["gain"] == pytest.approx(worth(name, range(n)) / worth("off 0.95", range(n)), rel=1e-5)
        left = torch.tensor([worth("on 0.5", k) / worth("off 0.95", k)
                             for k in ([i for i in range(n) if i != gone] for gone in range(n))])  # fmt: skip
        error = ((n - 1) / n * ((left - left.mean()) ** 2).sum()) ** 0.5
        assert found["on 0.5"]["standard_error"] == pytest.approx(error.item(), rel=0.02)

    def test_noise_and_bias_cost_and_size_does_not(self):
        found = gradient_signal.gains({
            "off 0.95": self.drawn(4.0), "larger": 10 * self.drawn(4.0), "quieter": self.drawn(2.0),
            "biased": self.drawn(4.0, bias=8.0), "noise": self.drawn(4.0) - self.drawn(0.0), "on 1.0": self.drawn(4.0),
        })  # fmt: skip
        gain = {name: row["gain"] for name, row in found.items()}
        assert gain["larger"] == pytest.approx(1.0, rel=1e-5) and gain["quieter"] > 1.5
        assert gain["biased"] < 0.6 and abs(gain["noise"]) < 0.2

    def test_parameters_that_learn_nothing_count_nothing(self):
        plain = {"off 0.95": self.drawn(4.0), "on 1.0": self.drawn(1.0)}
        still = {name: torch.cat([rows, torch.zeros(24, 9)], 1) for name, rows in plain.items()}
        assert gradient_signal.gains(still)["on 1.0"] == pytest.approx(gradient_signal.gains(plain)["on 1.0"])


def test_measured_gradients_are_those_of_the_trainer(world, monkeypatch, tmp_path):
    """Without a baseline, and with nothing in the loss but the policy."""
    given = {"prefix_reward_baseline": False, "vf_coef": 0.0, "importance_sampling_cap": None, "cliprange_value": None}
    job = job_of(world, monkeypatch, folder=str(tmp_path), rollout=32)
    found, kl = gradient_signal.measure(learning.our_trainer(job, []), 2)
    assert kl == pytest.approx(0, abs=1e-4)
    trainer = learning.our_trainer(job, [], **given)
    noise = gradient_signal.sampling_uniforms(0, 32, trainer.args.response_length)
    samples = trainer.collector.sample([trainer.train_dataset[i] for i in range(32)], noise, {})
    reduce, args = trainer.collectives.sum, trainer.args
    rollout = build_rollout(samples, samples.scores, args.kl_coef, args, reduce)
    trained = trainer.model.actor_parameters()
    for minibatch in range(2):
        inputs = rollout.micro_batch(torch.arange(16 * minibatch, 16 * minibatch + 16))
        loss = trainer.compute_loss(trainer.model, inputs)
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
        assert wanted.abs().max() > 0
        assert torch.allclose(found["off 0.95"][minibatch].float(), wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max())
        assert not torch.allclose(
            found["on 0.95"][minibatch].float(), wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max()
        )
