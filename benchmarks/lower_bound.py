"""One PPO update against its own floor: the arithmetic it cannot do without, on the bare model, in the same run.

    python benchmarks/lower_bound.py [--repeats 3] [--dtype bfloat16|float32]

The update is the one of vs_trl.py: SmolLM2-135M with LoRA, 32 episodes of 14 + 48 tokens, a reward adapter, 4 PPO
epochs x 2 minibatches of 16. Its floor, for the same numbers of tokens and without any adapter:

    generate   one prefill and 47 decode steps of 32 rows with static shapes, logits of the last position, argmax
    score      three forward passes over 32 x 62 tokens (reward, policy, reference), logits of 2 x 48 positions
    learn      8 forward and backward passes over 16 x 62 tokens with the logits of 48: activation gradients through
               the frozen base, down to the embeddings, as LoRA needs them in its lowest layer; no weight gradients

Not in the floor: LoRA's own products, sampling, the optimizer, losses, text and rewards, and the second look of the
reward adapter at responses whose text has other tokens than were sampled (here about half of them). It is measured
with both of transformers' attention paths, and the faster counts in each phase. After each update the floor is run;
the first of both is not counted. The last line is JSON: `ratio` is the update's seconds over the floor's, of medians.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from _utils import PhaseClock, benchmark_parser, by_phase, chosen_model, report, seconds
from ppo_runs import EPISODES, EPOCHS, MICRO, PROMPT, RESPONSE, our_trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from ppo_plus.models.backbone import backbone_interface

ATTENTION = ("eager", "sdpa")
CHUNK = 256  # tokens


class Floor:
    """The bare model, and the three phases of an update on it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(100, 40000, (EPISODES, PROMPT + RESPONSE), generator=draw).to(model.device)

    @torch.no_grad()
    def generate(self) -> None:
        cache = StaticCache(config=self.model.config, max_cache_len=PROMPT + RESPONSE)
        past = {backbone_interface(self.model).cache_name: cache}
        step = self.ids[:, :PROMPT]
        for _ in range(RESPONSE):
            out = self.model(input_ids=step, use_cache=True, logits_to_keep=1, **past)
            step = out.logits.argmax(-1)

    @torch.no_grad()
    def score(self) -> None:
        for with_logits in (False, True, True):
            hidden = self.model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state
            if with_logits:
                for part in self.chunks(hidden):
                    self.model.lm_head(part)

    def learn(self) -> None:
        for ids in self.ids.split(MICRO) * EPOCHS:
            states = self.model.get_input_embeddings()(ids).requires_grad_()
            hidden = self.model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state
            leaf = hidden.detach().requires_grad_()
            for part, targets in zip(self.chunks(leaf), ids[:, -RESPONSE:].flatten().split(CHUNK), strict=True):
                torch.nn.functional.cross_entropy(self.model.lm_head(part).float(), targets).backward()
            hidden.backward(leaf.grad)

    def chunks(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The states that predict the response, a few at a time: logits of all of them would go through slow memory."""
        return hidden[:, -RESPONSE - 1 : -1].reshape(-1, hidden.shape[-1]).split(CHUNK)

    def phases(self) -> dict[str, Callable[[], None]]:
        return {"generate": self.generate, "score": self.score, "learn": self.learn}


def measured(model: str, dtype: str, repeats: int, folder: str) -> tuple[list[dict], dict[str, list[dict]]]:
    """Seconds by phase of each update, and of each floor by attention path."""
    bare: dict[str, list[dict]] = {attention: [] for attention in ATTENTION}
    floor = Floor(AutoModelForCausalLM.from_pretrained(model, dtype=dtype))

    def run_floor() -> None:
        for attention, rows in bare.items():
            floor.model.set_attn_implementation(attention)
            rows.append({phase: seconds(work) for phase, work in floor.phases().items()})

    clock = PhaseClock(between=run_floor)
    trainer = our_trainer(model, dtype, repeats, folder, clock)
    floor.model.to(trainer.args.device)
    floor.ids = floor.ids.to(trainer.args.device)
    trainer.train()
    assert set(clock.tokens) == {EPISODES * RESPONSE}, f"responses ended early: {clock.tokens}"
    return clock.rows[1:], {attention: rows[1:] for attention, rows in bare.items()}


def main() -> None:
    args = benchmark_parser(__doc__, "counted updates").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = chosen_model(args, f"{folder}/model")
        updates, floors = measured(model, args.dtype, args.repeats, folder)
    update, by_attention = by_phase(updates), {name: by_phase(rows) for name, rows in floors.items()}
    floor = {phase: min(by_attention[name][phase] for name in ATTENTION) for phase in ("generate", "score", "learn")}
    floor["total"] = sum(floor.values())
    result = {
        "ratio": update["total"] / floor["total"],
        "ratio_by_phase": {phase: update[phase] / floor[phase] for phase in floor},
        "dtype": args.dtype,
        "update_seconds": update,
        "floor_seconds": floor,
        "floor_seconds_by_attention": by_attention,
        "update_seconds_each": [row["total"] for row in updates],
    }
    report("lower_bound", result, write=not args.tiny)


if __name__ == "__main__":
    main()
