"""Scoring on one backbone: PEFT's mixed-adapter batches, all roles in one pass, against a pass for each role.

    python benchmarks/mixed_adapters.py [--rows 16] [--repeats 3] [--dtype float32|bfloat16]

The roles are policy (log-probabilities, values, entropy), reference (log-probabilities, adapter off) and reward (a
score from a second adapter), each on the same rows. Separately they are three passes with the adapter switched between;
mixed, one pass over three times the rows with an adapter name per row (`__base__` is none). Both give the same numbers,
which is checked first, to 1e-4 relative in fp32. The two are run in turn, the first of each not counted. On a CPU the
seconds are those that this process computed, summed over its threads, so that other processes do not count.

The last line is JSON; `ratio` is mixed over separate, of median seconds: below 1, mixing pays.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from _utils import report, smollm2
from ppo_runs import PROMPT, RESPONSE, lora
from transformers import AutoModelForCausalLM

from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.critic import CriticSpec
from ppo_plus.models.loading import build_actor_critic, load_policy
from ppo_plus.models.logprobs import chunked_logprobs, logits_function


def actor_with_reward(model: str, dtype: str) -> tuple[ActorCritic, torch.Tensor]:
    """An actor-critic with a second adapter, both away from zero, and a score head."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    policy = load_policy(base.to("cuda" if torch.cuda.is_available() else "cpu"), peft_config=lora())
    policy.add_adapter("reward", lora())
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    actor = build_actor_critic(policy, critic=CriticSpec()).to(policy.device)
    torch.nn.init.normal_(actor.value_head.layers[0].weight, std=0.02)
    head = torch.nn.Linear(base.config.get_text_config().hidden_size, 1, bias=False, device=policy.device)
    torch.nn.init.normal_(head.weight, std=0.02)
    return actor.eval(), head


@torch.no_grad()
def separate(actor: ActorCritic, head: torch.nn.Linear, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    output = actor(ids, mask, RESPONSE, with_entropy=True)
    with actor.role("reference"):
        reference = actor(ids, mask, RESPONSE, with_values=False).logprobs
    scores = actor.reward_scores("reward", head, ids, mask)
    return [output.logprobs, output.values, output.entropy, reference, scores]


@torch.no_grad()
def mixed(actor: ActorCritic, head: torch.nn.Linear, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    rows = len(ids)
    names = ["default"] * rows + ["__base__"] * rows + ["reward"] * rows
    with actor.policy.base_model._enable_peft_forward_hooks(adapter_names=names):
        hidden = actor.runner.run(actor.language_model, ids.repeat(3, 1), mask.repeat(3, 1)).last_hidden_state
    actors, references, rewards = hidden.split(rows)
    targets, before = ids[:, -RESPONSE:], slice(-RESPONSE - 1, -1)
    logits = logits_function(actor.language_model)
    logprobs, entropy = chunked_logprobs(logits, actors[:, before], targets, 1.0, True)
    reference, _ = chunked_logprobs(logits, references[:, before], targets, 1.0, False)
    values = actor.value_head(actors[:, before])
    scores = torch.nn.functional.linear(rewards[:, -1], head.weight.to(rewards.dtype)).squeeze(-1).float()
    return [logprobs, values, entropy, reference, scores]


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest number of each kind."""
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(one, other, strict=True))


def seconds(function, *args) -> float:
    if not torch.cuda.is_available():
        started = time.process_time()
        function(*args)
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    function(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="responses per pass of one role")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    args = parser.parse_args()
    actor, head = actor_with_reward(args.model or smollm2(), args.dtype)
    ids = torch.randint(100, actor.num_embeddings, (args.rows, PROMPT + RESPONSE)).to(actor.device)
    batch = (actor, head, ids, torch.ones_like(ids))
    gap = distance(separate(*batch), mixed(*batch))
    if args.dtype == "float32" and gap > 1e-4:
        raise SystemExit(f"mixed and separate passes differ by {gap:.1e} relative: nothing to compare")
    runs = [(seconds(separate, *batch), seconds(mixed, *batch)) for _ in range(args.repeats)]
    apart, together = (statistics.median(side) for side in zip(*runs, strict=True))
    result = {
        "ratio": together / apart,
        "separate_seconds": apart,
        "mixed_seconds": together,
        "relative_difference": gap,
        "rows": args.rows,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
    }
    report(f"mixed_adapters_{args.dtype}", result)


if __name__ == "__main__":
    main()
