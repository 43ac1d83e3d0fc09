"""Peak memory of whole rollouts and updates, ours over that of TRL 1.12's PPOTrainer.

    python benchmarks/memory.py [--rollouts 2] [--dtype float32|bfloat16]

What is run is in `ppo_runs.py`. On the CPU, memory is peak resident memory above what the imports take; on a GPU,
the most that torch's allocator handed out (`gpu_allocated`) and held (`gpu_reserved`, which `ratio` is of).

The last line is JSON: `ratio` is our peak over TRL's; `planned_mb` is what the planner says of the tensors alone.
"""

from __future__ import annotations

import argparse

from ppo_runs import EPISODES, MICRO, MINIBATCHES, PROMPT, RESPONSE, TRL_VERSION, install_trl, run


def planned(model: str, dtype: str) -> dict[str, float]:
    """The planner's peak of each phase in MB, by part, at the sizes of the run."""
    from transformers import AutoConfig

    from ppo_plus.memory import DryRun, PlannerConfig

    setup = PlannerConfig(
        prompt_length=PROMPT, response_length=RESPONSE, rollout_batch_size=EPISODES, num_mini_batches=MINIBATCHES,
        quantization={"float32": "fp32", "bfloat16": "bf16"}[dtype],
    )  # fmt: skip
    dry = DryRun(AutoConfig.from_pretrained(model), setup)
    phases = dry.generate(EPISODES), dry.score(EPISODES), dry.learn(MICRO)
    return {phase.name: {name: size / 2**20 for name, size in phase.parts.items()} for phase in phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts with their updates, of each side")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    args = parser.parse_args()
    install_trl()
    from _utils import report, smollm2

    model = args.model or smollm2()
    kinds = ("peak", "gpu_allocated", "gpu_reserved")
    sides = {}
    for side in ("trl", "ours"):
        done = run(side, model, args.dtype, args.rollouts - 1)
        sides[side] = {f"{kind}_mb": done[kind] for kind in kinds if kind in done}
    headline = "gpu_reserved_mb" if "gpu_reserved_mb" in sides["ours"] else "peak_mb"
    result = {
        "ratio": sides["ours"][headline] / sides["trl"][headline],
        "dtype": args.dtype,
        "rollouts": args.rollouts,
        **sides,
        "planned_mb": planned(model, args.dtype),
    }
    report("memory", result, trl=TRL_VERSION)


if __name__ == "__main__":
    main()
