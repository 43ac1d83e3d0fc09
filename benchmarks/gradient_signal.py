"""How much of a policy gradient is signal? By lambda of GAE, with and without the baseline from prefix scores.

    python benchmarks/gradient_signal.py [--minibatches 40] [--adapter FOLDER]

The demo task of benchmarks/learning.py. The untrained policy, or one with the adapter in FOLDER, answers prompts. Each
minibatch of 16 responses gives a gradient g of the policy's loss for each way to estimate advantages, and from it a
step u = g / sqrt(mean of g² over minibatches), which is as long for all of them, as with Adam. What a step is worth is
judged by the other minibatches: the mean of u_i · t_j over i ≠ j, where t is the gradient with lambda 1 and the
baseline, which has no bias. So noise counts against a way to estimate, and bias does too.

`gain` is that mean over the one of lambda 0.95 without a baseline, values being 0 as a value head's first ones are;
`standard_error` is of this ratio, by the jackknife over minibatches. As noise falls with the root of the number of
responses, a gain of 1.4 is worth twice as many of them. `ratio` is the gain of the recipe's lambda with the baseline,
`kl` how far the policy is from the reference, nats per response.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import learning
import torch
from _utils import report, smollm2
from torch import Tensor
from torch.nn.functional import pad

from ppo_plus import algo as F
from ppo_plus.algo.prefix_reward_baseline import RewardBaseline
from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.models.adapter_files import adapter_weights
from ppo_plus.models.adapter_loading import load_adapter

ROWS = 16  # of a minibatch
DECODED = 64  # rows side by side
CHUNK = 2**18  # parameters at a time
LAMBDAS = (1.0, 0.95, 0.8, 0.65, 0.5, 0.3)
REFERENCE, UNBIASED = "off 0.95", "on 1.0"


def gains(gradients: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of each estimator's gradients `(M, P)`: what its steps are worth, over `REFERENCE`'s, and the standard error."""
    n = len(gradients[UNBIASED])
    worth, without_one = {}, {}
    for name, rows in gradients.items():
        products = torch.zeros(n, n, dtype=torch.float64)
        for g, t in zip(rows.split(CHUNK, 1), gradients[UNBIASED].split(CHUNK, 1), strict=True):
            scale = g.float().square().mean(0).rsqrt().nan_to_num(posinf=0.0)  # LoRA's A learns nothing at first
            products += (t.float() @ (g.float() * scale).T).double()
        products.fill_diagonal_(0.0)
        worth[name] = products.sum() / (n * (n - 1))
        left = products.sum() - products.sum(0) - products.sum(1)
        without_one[name] = left / ((n - 1) * (n - 2))
    found = {}
    for name in gradients:
        ratios = without_one[name] / without_one[REFERENCE]
        error = ((n - 1) / n * ((ratios - ratios.mean()) ** 2).sum()).sqrt()
        found[name] = {"gain": (worth[name] / worth[REFERENCE]).item(), "standard_error": error.item()}
    return found


def measure(trainer: Any, minibatches: int) -> tuple[dict[str, Tensor], float]:
    """Gradients by estimator, `(M, P)` bf16, and the policy's KL to the reference, nats per response."""
    rows, length = minibatches * ROWS, trainer.args.response_length
    noise, prompts = sampling_uniforms(0, rows, length), trainer.train_dataset
    answers = [
        trainer.collector.sample(
            [prompts[i % len(prompts)] for i in range(first, min(first + DECODED, rows))],
            noise[first : first + DECODED], {}, lambda lengths: list(torch.arange(len(lengths)).split(ROWS)),
        )
        for first in range(0, rows, DECODED)
    ]  # fmt: skip

    def all_rows(tensors: list[Tensor]) -> Tensor:
        return torch.cat([pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])

    mask, prefixes = all_rows([a.action_mask for a in answers]), all_rows([a.prefix_scores for a in answers])
    kl = all_rows([(a.logprobs - a.ref_logprobs) * a.action_mask for a in answers])
    scores = torch.cat([a.scores for a in answers])
    rewards = F.shape_rewards(scores, kl, mask, trainer.args.kl_coef, torch.zeros_like(kl))
    none = torch.zeros_like(rewards)
    mc_returns, _ = F.gae(rewards, none, mask, gamma=1.0, lam=1.0)
    values = {"off": none, "on": RewardBaseline().fit_predict(prefixes, mc_returns, mask)}
    advantages = {
        f"{baseline} {lam}": F.whiten(F.gae(rewards, value, mask, gamma=1.0, lam=lam)[0], mask)
        for baseline, value in values.items()
        for lam in LAMBDAS
    }
    gradients: dict[str, list[Tensor]] = {name: [] for name in advantages}
    trained = trainer.model.actor_parameters()
    for first in range(0, rows, ROWS):
        batch, at = answers[first // DECODED], slice(first % DECODED, first % DECODED + ROWS)
        with trainer.accelerator.autocast():
            ids, attention, width = batch.input_ids[at], batch.attention_mask[at], batch.action_mask.shape[1]
            logprobs = trainer.model(ids, attention, width, trainer.args.temperature).logprobs
        for name, advantage in advantages.items():
            of = advantage[first : first + ROWS, :width]
            loss = -(of * logprobs * batch.action_mask[at]).sum() / batch.action_mask[at].sum()
            parts = torch.autograd.grad(loss, trained, retain_graph=True)
            gradients[name].append(torch.cat([part.flatten() for part in parts]).bfloat16())
    return {name: torch.stack(found) for name, found in gradients.items()}, kl.sum(1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minibatches", type=int, default=40)
    parser.add_argument("--adapter", type=Path, help="of a policy that has learned")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--work", type=Path, default=learning.ROOT / "out" / "learning", help="learning.py's")
    parser.add_argument("--dry", action="store_true", help="write no result")
    args = parser.parse_args()
    sys.path.insert(0, str(learning.ROOT / "recipes" / "demo"))
    args.work = args.work.resolve()
    job = {"model": args.model or smollm2(), "work": str(args.work), "folder": str(args.work), "dtype": args.dtype,
           "rollout": 2 * ROWS, "held_out": 128, "seed": 0, "episodes": 1}  # fmt: skip
    learning.child("prepare", job, "prepare.json")
    trainer = learning.our_trainer(job, [])
    if args.adapter:
        load_adapter(trainer.model.policy, "default", adapter_weights(args.adapter), args.adapter, "")
    gradients, kl = measure(trainer, args.minibatches)
    found = gains(gradients)
    recipe = learning.demo_arguments(args.work).ppo["lam"]
    result = {"ratio": found[f"on {recipe}"]["gain"], "minibatches": args.minibatches, "rows": ROWS, "gains": found}
    report("gradient_signal" if args.adapter is None else "gradient_signal_trained", result | {"kl": kl}, not args.dry)


if __name__ == "__main__":
    main()
