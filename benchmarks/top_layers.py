"""LoRA on the top layers alone: what it saves that the layers below run once per rollout, and what it saves in all.

    python benchmarks/top_layers.py [--top 10 5] [--prompt 64] [--repeats 3] [--dtype bfloat16|float32]

The scoring and learning passes of one update of vs_trl.py (SmolLM2-135M, 32 episodes with responses of 48 tokens, 4
PPO epochs in micro-batches of 16), with LoRA on all layers, and on the top k with and without `cache_frozen_layers`:

    score   a pass as reward model through all layers, one each as actor and reference; cached, the lower layers once
    learn   8 forward and backward passes

Not in it: generation, which is the same, and the optimizer. The sides take turns. The last line is JSON: `ratio` is
uncached over cached seconds of both phases for the first k, `ratio_to_all_layers` all-layer LoRA over cached.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from _utils import benchmark_parser, chosen_model, medians, report
from peft import LoraConfig
from ppo_runs import EPISODES, EPOCHS, MICRO, RESPONSE, lora
from transformers import AutoConfig

from ppo_plus import ActorCritic, ValueHead
from ppo_plus.models.loading import load_policy

LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def top_lora(layers: int, top: int) -> LoraConfig:
    config = lora()
    config.target_modules, config.layers_to_transform = set(LINEAR), list(range(layers - top, layers))
    return config


class Passes:
    """The passes of one update by one policy."""

    def __init__(self, model: str, dtype: str, adapter: LoraConfig, cached: bool, prompt: int) -> None:
        policy = load_policy(model, peft_config=adapter, model_init_kwargs={"dtype": dtype})
        self.model = ActorCritic(policy, ValueHead(policy.config.hidden_size))
        if cached:
            self.model.enable_frozen_layer_cache()
        if torch.cuda.is_available():
            self.model.cuda()
        draw = torch.Generator().manual_seed(0)
        vocabulary = policy.config.vocab_size
        self.ids = torch.randint(0, vocabulary, (EPISODES, prompt + RESPONSE), generator=draw).to(self.model.device)
        self.lower: torch.Tensor | None = None

    def score(self) -> None:
        model, ids, mask = self.model.eval(), self.ids, torch.ones_like(self.ids)
        with torch.no_grad():
            model.language_model.base_model(input_ids=ids, use_cache=False)
            self.lower = model.frozen_hidden_states(ids, mask) if model.num_cached_layers else None
            model(ids, mask, RESPONSE, with_entropy=True, frozen_hidden_states=self.lower)
            with model.role("reference"):
                model(ids, mask, RESPONSE, with_values=False, frozen_hidden_states=self.lower)

    def learn(self) -> None:
        self.model.train()
        for rows in torch.arange(EPISODES).split(MICRO) * EPOCHS:
            ids = self.ids[rows]
            lower = None if self.lower is None else self.lower[rows]
            out = self.model(ids, torch.ones_like(ids), RESPONSE, frozen_hidden_states=lower)
            (out.logprobs.sum() + out.values.sum()).backward()


def measured(model: str, dtype: str, tops: list[int], prompt: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds by phase of each side, medians of turns."""
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    sides = {"all_layers": Passes(model, dtype, lora(), False, prompt)}
    for top in tops:
        for name, cached in (("cached", True), ("uncached", False)):
            sides[f"top_{top}_{name}"] = Passes(model, dtype, top_lora(layers, top), cached, prompt)
    works: dict[str, Callable[[], object]] = {}
    for name, side in sides.items():
        works |= {f"{name}.score": side.score, f"{name}.learn": side.learn}
    found = medians(works, repeats)
    return {name: {phase: found[f"{name}.{phase}"] for phase in ("score", "learn")} for name in sides}


def main() -> None:
    parser = benchmark_parser(__doc__, "counted turns of each side")
    parser.add_argument("--top", type=int, nargs="+", default=[10, 5], help="layers with LoRA, from the top")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tops = chosen_model(args, f"{folder}/model"), [1] if args.tiny else args.top
        sides = measured(model, args.dtype, tops, args.prompt, args.repeats)
    total = {name: sum(phases.values()) for name, phases in sides.items()}
    ratios = {
        f"top_{top}": {
            "ratio": total[f"top_{top}_uncached"] / total[f"top_{top}_cached"],
            "ratio_to_all_layers": total["all_layers"] / total[f"top_{top}_cached"],
        }
        for top in tops
    }
    result = {**ratios[f"top_{tops[0]}"], **ratios, "dtype": args.dtype, "prompt": args.prompt, "seconds": sides}
    report("top_layers", result, write=not args.tiny)


if __name__ == "__main__":
    main()
