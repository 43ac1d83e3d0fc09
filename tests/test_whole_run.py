"""A whole run, written out once more in plain PyTorch: the same prompts must end in the same weights.

The oracle answers, scores and learns one response at a time, without cache, padding or batches, and with loops over
tokens. What it takes from ppo_plus are the random numbers: the first adapter, the noise that decides the tokens, and
which responses are learned from together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import count_e, lora, make_model, make_prompts, make_tokenizer, make_trainer
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from ppo_plus.data.batching import minibatch_indices
from ppo_plus.data.seeding import derive_seed, sampling_uniforms

EOS, RESPONSE, ROLLOUT, EPOCHS, MINIBATCHES, STEPS = 2, 8, 8, 2, 2, 12
SEED = 42


@dataclass(frozen=True)
class Rules:
    """What the run is told, and (for the controls) the small things that are easily done otherwise."""

    temperature: float = 0.7
    kl_coef: float = 0.3
    kl_penalty_in: str = "reward"
    kl_estimator: str = "k1"
    lam: float = 0.95
    gamma: float = 1.0
    missing_eos_penalty: float = 1.0
    cliprange: float = 0.05
    cliprange_value: float = 0.05
    critic: str = "shared"
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    learning_rate: float = 1e-2
    value_head_learning_rate: float = 2e-2
    max_grad_norm: float = 0.05
    weight_decay: float = 0.0
    # Only the controls depart from these.
    score_at: str = "last"
    values_end_in: float = 0.0
    whitening: bool = True
    mean_over: str = "tokens"
    norm_of: str = "each"
    learns_eos: bool = True
    temperature_in_loss: bool = True
    returns_whitened: bool = False
    schedule: str = "linear"

    def config(self) -> dict:
        """As arguments of PPOConfig."""
        told = (
            "temperature", "kl_coef", "kl_penalty_in", "kl_estimator", "lam", "gamma", "missing_eos_penalty",
            "cliprange", "cliprange_value", "critic", "vf_coef", "entropy_coef", "learning_rate",
            "value_head_learning_rate", "max_grad_norm", "weight_decay",
        )  # fmt: skip
        return {name: getattr(self, name) for name in told}


RULES = {
    "shared critic": Rules(),
    "detached critic, discount, KL in the loss": Rules(
        critic="detached", vf_coef=1.0, gamma=0.9, lam=0.7, kl_penalty_in="loss", kl_estimator="k3", temperature=1.0
    ),
    "entropy, weight decay": Rules(entropy_coef=0.05, weight_decay=0.1, max_grad_norm=1e9),
}


def run_by_ppo_plus(folder, rules):
    config = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": MINIBATCHES,
        "num_ppo_epochs": EPOCHS, "response_length": RESPONSE, "max_steps": STEPS, "shuffle_dataset": False,
        "seed": SEED, **rules.config(),
    }  # fmt: skip
    trainer = make_trainer(folder, config=config)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(trainer.model.policy).items()}
    trainer.train()
    return start, weights(trainer.model.policy, trainer.model.value_head.layers[0])


def weights(policy, head):
    found = get_peft_model_state_dict(policy, adapter_name="default")
    return {**found, "head": head.weight, "bias": head.bias}


class ByHand:
    """The oracle."""

    def __init__(self, rules, start):
        self.rules, self.tokenizer = rules, make_tokenizer()
        self.policy = get_peft_model(make_model(), lora()).eval()
        set_peft_model_state_dict(self.policy, start)
        self.head = torch.nn.Linear(32, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.actor = [p for p in self.policy.parameters() if p.requires_grad]
        groups = [
            {"params": self.actor, "lr": rules.learning_rate, "weight_decay": rules.weight_decay},
            {"params": list(self.head.parameters()), "lr": rules.value_head_learning_rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, eps=1e-5)
        self.rates = [group["lr"] for group in groups]
        self.step = 0

    def logits(self, ids):
        return self.policy(torch.tensor([ids])).logits[0].float() / self.rules.temperature

    def answer(self, prompt, noise):
        response = []
        for t in range(RESPONSE):
            sums = self.logits(prompt + response)[-1].double().softmax(-1).cumsum(-1)
            response.append(int((sums <= noise[t]).sum()))
            if response[-1] == EOS:
                break
        return response

    def look(self, prompt, response):
        """Log-probabilities, entropies and values of a response's tokens."""
        out = self.policy(torch.tensor([prompt + response]), output_hidden_states=True)
        before = slice(len(prompt) - 1, -1)
        logits = out.logits[0, before].float()
        logits = logits / self.rules.temperature if self.rules.temperature_in_loss else logits
        logs = logits.log_softmax(-1)
        states = out.hidden_states[-1][0, before]
        states = states.detach() if self.rules.critic == "detached" else states
        return logs[range(len(response)), response], -(logs.exp() * logs).sum(-1), self.head(states)[:, 0]

    @torch.no_grad()
    def collect(self, index):
        rules = self.rules
        noise = sampling_uniforms(derive_seed(SEED, "rollout", index, 0), ROLLOUT, RESPONSE)
        texts = make_prompts()["prompt"]
        begin = index * ROLLOUT % len(texts)
        rollout = []
        for row, text in enumerate(texts[begin : begin + ROLLOUT]):
            prompt = self.tokenizer(text)["input_ids"]
            response = self.answer(prompt, noise[row])
            logs, _, values = self.look(prompt, response)
            with self.policy.disable_adapter():
                reference, _, _ = self.look(prompt, response)
            text = self.tokenizer.decode(response, skip_special_tokens=True)
            score = count_e([], [text])[0] - (0.0 if response[-1] == EOS else rules.missing_eos_penalty)
            rewards = [0.0] * len(response)
            if rules.kl_penalty_in == "reward":
                rewards = [-rules.kl_coef * (a - b).item() for a, b in zip(logs, reference, strict=True)]
            rewards[-1 if rules.score_at == "last" else 0] += score
            advantages, after, following = [], 0.0, rules.values_end_in
            for reward, value in zip(reversed(rewards), reversed(values.tolist()), strict=True):
                after = reward + rules.gamma * following - value + rules.gamma * rules.lam * after
                advantages.insert(0, after)
                following = value
            rollout.append({
                "prompt": prompt, "response": response, "logs": logs.tolist(), "reference": reference,
                "values": values.tolist(), "advantages": advantages,
                "returns": [a + v for a, v in zip(advantages, values.tolist(), strict=True)],
            })  # fmt: skip
        everything = [a for one in rollout for a in one["advantages"]]
        mean = sum(everything) / len(everything)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in everything) / len(everything))
        for one in rollout:
            if rules.whitening:
                one["advantages"] = [(a - mean) / deviation for a in one["advantages"]]
            if rules.returns_whitened:
                one["returns"] = [a + v for a, v in zip(one["advantages"], one["values"], strict=True)]
        return rollout

    def losses(self, one):
        """Of each token of a response."""
        rules, found = self.rules, []
        for t, (log, entropy, value) in enumerate(zip(*self.look(one["prompt"], one["response"]), strict=True)):
            ratio, advantage = (log - one["logs"][t]).exp(), one["advantages"][t]
            bounded = ratio.clamp(1 - rules.cliprange, 1 + rules.cliprange)
            loss = -torch.minimum(ratio * advantage, bounded * advantage)
            old, target = one["values"][t], one["returns"][t]
            near = old + (value - old).clamp(-rules.cliprange_value, rules.cliprange_value)
            loss = loss + rules.vf_coef * 0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2)
            if rules.kl_penalty_in == "loss":
                away = one["reference"][t] - log
                loss = loss + rules.kl_coef * (away.exp() - 1 - away)
            found.append(loss - rules.entropy_coef * entropy)
        return found if rules.learns_eos or one["response"][-1] != EOS else found[:-1]

    def learn(self, minibatch):
        losses = [self.losses(one) for one in minibatch]
        if self.rules.mean_over == "tokens":
            loss = sum(sum(each) for each in losses) / sum(map(len, losses))
        else:
            loss = sum(sum(each) / max(1, len(each)) for each in losses) / len(losses)
        self.optimizer.zero_grad()
        loss.backward()
        head = list(self.head.parameters())
        for clipped in [self.actor, head] if self.rules.norm_of == "each" else [[*self.actor, *head]]:
            torch.nn.utils.clip_grad_norm_(clipped, self.rules.max_grad_norm)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - self.step / STEPS if self.rules.schedule == "linear" else 1)
        self.optimizer.step()
        self.step += 1

    def train(self):
        for index in range(STEPS // (EPOCHS * MINIBATCHES)):
            rollout = self.collect(index)
            for epoch in range(EPOCHS):
                parts = minibatch_indices(ROLLOUT, MINIBATCHES, seed=SEED, rollout_index=index, ppo_epoch=epoch)
                for rows in parts:
                    self.learn([rollout[row] for row in rows.tolist()])
        return weights(self.policy, self.head)


def gap(found, expected, start):
    """The largest difference, as a share of how far training went."""
    start = {**start, "head": torch.zeros(1, 32), "bias": torch.zeros(1)}
    assert found.keys() == expected.keys() == start.keys()
    went = max((found[name] - start[name]).abs().max().item() for name in found)
    return max((found[name] - expected[name]).abs().max().item() for name in found) / went


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {name: run_by_ppo_plus(tmp_path_factory.mktemp("run"), rules) for name, rules in RULES.items()}


@pytest.mark.parametrize("name", RULES)
def test_a_run_in_plain_pytorch_ends_in_the_same_weights(runs, name):
    start, found = runs[name]
    oracle = ByHand(RULES[name], start)
    assert gap(found, oracle.train(), start) < 1e-4
    assert {answer["response"][-1] == EOS for answer in oracle.collect(0)} == {True, False}


SLIPS = {
    "score_at": "first", "values_end_in": 1.0, "whitening": False, "mean_over": "responses", "norm_of": "all",
    "learns_eos": False, "temperature_in_loss": False, "returns_whitened": True, "schedule": "constant",
    "lam": 1.0, "gamma": 0.99, "cliprange": 0.2, "cliprange_value": 0.2, "kl_coef": 0.2, "missing_eos_penalty": 0.5,
    "vf_coef": 0.2, "max_grad_norm": 1.0, "value_head_learning_rate": 1e-2, "entropy_coef": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_each_small_slip_would_be_seen(runs, name):
    start, found = runs["shared critic"]
    slipped = ByHand(replace(RULES["shared critic"], **{name: SLIPS[name]}), start)
    assert gap(found, slipped.train(), start) > 0.05
