"""Collects one rollout: generate, score, log-probabilities and values, reference, rewards, advantages.

Order of operations as in "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031); what differs is said
where it does. Training and evaluation collect with the same code.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .. import algo
from ..algo.prefix_reward_baseline import RewardBaseline
from ..config import PPOConfig
from ..data.chat_templates import find_generation_opening, find_opening_ids, is_conversational, merge_template_kwargs
from ..data.padding import left_pad, pad_id, unpad
from ..data.prompts import Row, to_columns
from ..kernels.batch_backoff import PATIENCE, BatchSize
from ..models.actor_critic import ActorCritic
from ..models.generation import GenerateOutput
from ..rewards import CheapAnswers, Completions, RewardSet
from ..rewards.cheap_answers import PROMPTS, mean_by_kind
from ..rewards.completions import message_texts
from ..utils.devices import sum_dtype
from .buffer import LeftPaddedLayout, Rollout, response_mask
from .decoding import build_logits_processor, decode, decode_completion
from .phases import PhaseTimer, ProgressReporter

# Of the tokens of each row, which rows share a forward pass.
BatchingFn = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Experience:
    """Scored responses, before they become a rollout. Tensors are on the CPU; shapes as in `Rollout`.

    Attributes:
        input_ids: `(N, P + R)` int64.
        attention_mask: `(N, P + R)` int64.
        action_mask: `(N, R)` bool.
        stopped: whether the response ended in a stop token, `(N,)` bool.
        logprobs: `(N, R)` float32, nats, from the same forward pass that the loss uses.
        sampled_logprobs: `(N, R)` float32, nats, as decoding computed them.
        ref_logprobs: `(N, R)` float32, nats.
        values: what the critic says, without the baseline, `(N, R)` float32, reward units.
        entropy: `(N, R)` float32, nats.
        rewards: `(N, F)` float32 by reward function; NaN for None.
        scores: their weighted sum, `(N,)` float32; NaN where no function gave one.
        token_rewards: the part of `scores` that belongs to single tokens, `(N, R)` float32.
        completions: the texts.
        seconds: by phase.
        extra: columns that reward functions logged.
        frozen_hidden_states: as in `Rollout`; None where nobody is going to learn from these samples.
        prefix_scores: what the reward adapters say of the text before each token, `(N, R)` float32; None as above, and
            where nobody asks for it.
        failed: names of reward functions that were left out because they failed.
    """

    input_ids: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    stopped: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    rewards: Tensor
    scores: Tensor
    token_rewards: Tensor
    completions: Completions
    seconds: dict[str, float]
    extra: dict[str, list] = field(default_factory=dict)
    frozen_hidden_states: Tensor | None = None
    prefix_scores: Tensor | None = None
    failed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.action_mask)


class RolloutCollector:
    """Collects rollouts with a model, its rewards and a tokenizer.

    Args:
        model: the actor-critic; its `forward` is the one that the loss uses.
        rewards: what scores responses.
        tokenizer: of the policy.
        args: sizes, sampling, shaping.
        accelerator: autocast and sums over processes.
        stop_ids: ids that end a response.
        report: told at every decode step and forward pass: phase, responses done, responses, tokens done; what it
            raises ends the rollout there.
    """

    def __init__(
        self,
        model: ActorCritic,
        rewards: RewardSet,
        tokenizer: PreTrainedTokenizerBase,
        args: PPOConfig,
        accelerator: Accelerator,
        stop_ids: Sequence[int],
        report: Callable[[str, int, int, int], None] = lambda phase, done, total, tokens: None,
    ) -> None:
        self.model, self.rewards, self.tokenizer, self.args = model, rewards, tokenizer, args
        self.accelerator, self.stop_ids, self.report = accelerator, list(stop_ids), report
        self.logits_processor = build_logits_processor(args)
        micro_batches = args.num_mini_batches * args.gradient_accumulation_steps
        self.forward_batch_size = BatchSize(args.local_rollout_forward_batch_size)
        self.micro_batch_size = BatchSize(args.rollout_batch_size, PATIENCE * micro_batches)
        self.generation_batch_size = BatchSize(args.generation_batch_size or args.local_rollout_forward_batch_size)

    @torch.no_grad()
    def sample(
        self,
        rows: Sequence[Row],
        uniforms: Tensor,
        context: dict[str, Any],
        cut: BatchingFn | None = None,
        score: bool = True,
    ) -> Experience:
        """Answer prompts, score the answers, and look at them with actor, critic and reference.

        Args:
            rows: of a tokenized dataset.
            noise: uniform numbers that decide the sampled tokens, `(N, R)` float64.
            context: handed to reward functions.
            cut: into the micro-batches that are going to be learned from first; None where nobody learns, and nothing
                is kept to go on from. Evaluations may have more rows than there is room for.
            score: whether rewards are called; without, all scores are NaN.
        """
        watch = PhaseTimer()
        self.model.eval()  # in train mode activation checkpointing would drop the cache
        with self.accelerator.autocast():
            prompts = [row["input_ids"] for row in rows]
            generation = self._generate(prompts, uniforms)
            watch.record("generate")
            tokens = generation.tokens
            response_attention_mask = response_mask(tokens, self.stop_ids)
            mask = response_mask(tokens, self.stop_ids, include_stop=self.args.train_on_eos)
            completions, extra = self._completions(rows, tokens, response_attention_mask, context)
            self.report("scoring", 0, len(rows), 0)
            scores = self.rewards(completions) if score else self.rewards.leave_unscored(completions)
            self.report("scoring", len(rows), len(rows), 0)
            input_ids, prompt_mask = left_pad(prompts, pad_id(self.tokenizer))
            input_ids = torch.cat([input_ids, tokens], 1)
            attention_mask = torch.cat([prompt_mask, response_attention_mask.long()], 1)
            prefix_scores = self._prefix_scores(input_ids, attention_mask, response_attention_mask) if cut else None
            watch.record("score")
            # What a row becomes depends on the shape of its pass, in half precision by some percent of a probability.
            # So here it is the pass in which learning looks at that row first.
            passes = cut(attention_mask.sum(1)) if cut else None
            inputs = (input_ids, attention_mask, tokens.shape[1], passes)
            lower = self._lower_states(*inputs) if cut else None
            logprobs, values, entropy = self._forward(*inputs, lower)
            with self.model.reference():
                ref_logprobs, _, _ = self._forward(*inputs, lower, actor=False)
            watch.record("logprobs")
        stopped = torch.isin(tokens, torch.tensor(self.stop_ids)).any(1)
        return Experience(
            input_ids, attention_mask, mask, stopped, logprobs, generation.logprobs, ref_logprobs, values, entropy,
            scores.by_function, scores.total, scores.per_token, completions, watch.seconds, extra, lower,
            prefix_scores, scores.failed,
        )  # fmt: skip

    @torch.no_grad()
    def ask_about_cheap_answers(self, rows: Sequence[Row], context: dict[str, Any]) -> CheapAnswers:
        """Ask reward functions, in one call, about an empty answer and the prompt repeated, to a few prompts.

        Reward models are not asked. The answers are such as the policy could give: they end in EOS, and at
        `response_length`.

        Args:
            rows: of a tokenized dataset; the first few are taken.
            context: handed to reward functions.
        """
        self.model.eval()  # as in a rollout
        rows = rows[:PROMPTS]
        end = [self.tokenizer.eos_token_id]
        answers = [end] * len(rows) + [self._prompt_ids(row) + end for row in rows]
        tokens = pad_sequence(
            [torch.tensor(answer[: self.args.response_length]) for answer in answers],
            batch_first=True,
            padding_value=pad_id(self.tokenizer),
        )
        completions, _ = self._completions([*rows, *rows], tokens, response_mask(tokens, self.stop_ids), context)
        scores = self.rewards.ask_functions(completions)
        return CheapAnswers(self.rewards.names, self.rewards.weights, mean_by_kind(scores))

    def _prompt_ids(self, row: Row) -> list[int]:
        """Token ids of a prompt's text as an answer repeats it: the last message of a conversation, no BOS."""
        prompt = row.get("prompt")
        if prompt is None:
            prompt = self.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        text = message_texts(prompt[-1:])[0] if is_conversational(prompt) else prompt
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def generate_from_reference(self, rows: Sequence[Row], uniforms: Tensor) -> Completions:
        """What the reference answers to prompts that `sample` takes, with the same noise."""
        self.model.eval()
        with self.accelerator.autocast(), self.model.reference():
            tokens = self._generate([row["input_ids"] for row in rows], uniforms).tokens
        return self._completions(rows, tokens, response_mask(tokens, self.stop_ids), {})[0]

    def rollout(
        self, samples: Experience, scores: Tensor, kl_coef: float, baseline: RewardBaseline | None = None
    ) -> Rollout:
        """Rewards per token, advantages and returns.

        A score is what a response earns in all: token-level rewards are paid at their tokens, the rest at the last.

        Args:
            samples: what `sample` returned.
            scores: one per response, `(N,)`; NaN keeps a response out of learning.
            kl_coef: reward units per nat.
            baseline: adds to values where there are prefix scores, and learns from this rollout.
        """
        args = self.args
        scored = ~scores.isnan()
        mask = samples.action_mask & scored[:, None]
        scores = scores.nan_to_num()
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (~samples.stopped)
        kl = algo.kl_estimate(samples.logprobs, samples.ref_logprobs, args.kl_estimator) * mask
        in_reward = kl_coef if args.kl_penalty_in == "reward" else 0.0
        at_tokens = samples.token_rewards * mask
        rewards = algo.shape_rewards(scores - at_tokens.sum(1), kl, mask, in_reward, at_tokens)
        if args.whiten_rewards:
            rewards = algo.whiten(rewards, mask, shift_mean=False, reduce=self.reduce)
        values, value_baselines = samples.values, torch.zeros_like(samples.values)
        if baseline is not None and samples.prefix_scores is not None:
            mc_returns, _ = algo.gae(rewards, torch.zeros_like(rewards), mask, gamma=args.gamma, lam=1.0)
            value_baselines = baseline.fit_predict(samples.prefix_scores, mc_returns, mask, self.reduce)
            values = values + value_baselines
        advantages, returns = algo.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        advantages = algo.whiten(advantages, mask, reduce=self.reduce)
        if args.importance_sampling_cap is not None:
            # A positive factor of the advantage is one of the whole loss of that token.
            weights = algo.truncated_importance_weights(
                samples.logprobs, samples.sampled_logprobs, cap=args.importance_sampling_cap
            )
            advantages = torch.where(mask, advantages * weights, 0.0)
        return Rollout(
            input_ids=samples.input_ids,
            attention_mask=samples.attention_mask,
            action_mask=mask,
            logprobs=samples.logprobs,
            ref_logprobs=samples.ref_logprobs,
            values=values,
            value_baselines=value_baselines,
            advantages=advantages,
            returns=returns,
            sequence_scores=scores,
            sequence_kl=((samples.logprobs - samples.ref_logprobs) * mask).sum(1),
            frozen_hidden_states=samples.frozen_hidden_states,
        )

    @torch.no_grad()
    def recompute_frozen_states(self, rollout: Rollout, passes: list[Tensor]) -> Rollout:
        """A rollout from a checkpoint, which holds no hidden states, with those that it was collected with."""
        self.model.eval()
        with self.accelerator.autocast():
            lower = self._lower_states(rollout.input_ids, rollout.attention_mask, rollout.response_length, passes)
        return replace(rollout, frozen_hidden_states=lower)

    def metrics(self, samples: Experience) -> dict[str, float]:
        """What there is to say about sampled responses, over all processes; NaN for the mean of no score."""
        lengths = samples.action_mask.sum(1).float()
        log_ratio = (samples.logprobs - samples.ref_logprobs) * samples.action_mask
        gap = (samples.logprobs - samples.sampled_logprobs).abs()
        reward, reward_var = self.moments(samples.scores)
        metrics = {
            "reward": reward,
            "reward_std": reward_var**0.5,
            "kl": self.moments(log_ratio.sum(1))[0],
            "entropy": self.moments(samples.entropy, samples.action_mask)[0],
            "completions/mean_length": self.moments(lengths)[0],
            "completions/clipped_ratio": self.moments((~samples.stopped).float())[0],
            "sampling/logp_difference": self.moments(gap, samples.action_mask)[0],
        }
        for name, column in zip(self.rewards.names, samples.rewards.T, strict=True):
            mean, var = self.moments(column)
            metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": var**0.5}
        return metrics

    def explained_variance(self, rollout: Rollout) -> float:
        """How much of the returns' variance the critic foresaw; 1 is all, 0 is none."""
        return algo.explained_variance(rollout.values, rollout.returns, rollout.action_mask, reduce=self.reduce).item()

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over processes; the result is on the tensor's own device."""
        if self.accelerator.num_processes == 1:
            return tensor
        device = self.accelerator.device
        dtype = sum_dtype(device) if tensor.dtype == torch.float64 else tensor.dtype
        return cast(Tensor, self.accelerator.reduce(tensor.to(device, dtype), "sum")).to(tensor)

    def union(self, names: list[str]) -> list[str]:
        """The names that any process has, sorted."""
        return sorted({*names} if self.accelerator.num_processes == 1 else {*gather_object(names)})

    def shared(self, names: list[str]) -> Counter[str]:
        """Count how often each name is on every process."""
        if self.accelerator.num_processes == 1:
            return Counter(names)
        return functools.reduce(operator.and_, map(Counter, gather_object([names])))

    def moments(self, values: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
        """Mean and variance over what is not NaN, or over the mask; over all processes."""
        mask = ~values.isnan() if mask is None else mask
        mean, var = algo.masked_moments(values.nan_to_num(), mask, reduce=self.reduce)
        nothing = torch.nan if self.reduce(mask.sum()) == 0 else 0.0
        return mean.item() + nothing, var.item() + nothing

    def _generate(self, prompts: Sequence[list[int]], uniforms: Tensor) -> GenerateOutput:
        (rows, length), padding = uniforms.shape, pad_id(self.tokenizer)
        tokens = torch.full((rows, length), padding, dtype=torch.int64)
        logprobs = torch.zeros(rows, length)
        order = torch.tensor([len(p) for p in prompts]).argsort(stable=True)
        tally = ProgressReporter("generating", rows, self.report)

        def decode_rows(chunk: Tensor) -> None:
            input_ids, attention_mask = left_pad([prompts[int(i)] for i in chunk], pad_id(self.tokenizer))
            out = self.model.sample(
                input_ids.to(self.accelerator.device),
                attention_mask.to(self.accelerator.device),
                uniforms[chunk],
                stop_ids=self.stop_ids,
                pad_token_id=pad_id(self.tokenizer),
                temperature=self.args.temperature,
                logits_processor=self.logits_processor,
                on_step=tally.decoding(len(chunk)),
            )
            tokens[chunk], logprobs[chunk] = out.tokens.cpu(), out.logprobs.cpu()
            tally.add(len(chunk), int(response_mask(tokens[chunk], self.stop_ids).sum()))

        self.generation_batch_size.run(order, decode_rows)
        longest = int(response_mask(tokens, self.stop_ids).sum(1).max())
        return GenerateOutput(tokens[:, :longest], logprobs[:, :longest])

    def _prefix_scores(
        self, input_ids: Tensor, attention_mask: Tensor, response_attention_mask: Tensor
    ) -> Tensor | None:
        if not self.args.uses_prefix_reward_baseline:
            return None
        sequences = unpad(input_ids, attention_mask)
        found = self.rewards.prefix_scores(sequences)
        if found is None:
            return None
        scores = torch.zeros(response_attention_mask.shape)
        for row, (length, at_tokens) in enumerate(zip(response_attention_mask.sum(1).tolist(), found, strict=True)):
            scores[row, :length] = at_tokens[len(sequences[row]) - length - 1 :][:length]  # as far as the token before
        return scores

    def _lower_states(
        self, input_ids: Tensor, attention_mask: Tensor, response_length: int, passes: list[Tensor] | None
    ) -> Tensor | None:
        if not self.model.num_cached_layers:
            return None
        length = input_ids.shape[1] - 1
        found: list[tuple[Tensor, Tensor]] = []

        def run(ids: Tensor, mask: Tensor, rows: Tensor, aligned: LeftPaddedLayout) -> None:
            states = self.model.frozen_hidden_states(ids, mask, aligned.seq_lens).cpu()
            found.append((rows, aligned.restore_states(states, length)))

        self._map_micro_batches(input_ids, attention_mask, response_length, passes, "frozen_layers", run)
        one = found[0][1]
        states = one.new_zeros(len(input_ids), *one.shape[1:])
        for rows, part in found:
            states[rows] = part
        return states

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        passes: list[Tensor] | None,
        lower: Tensor | None,
        actor: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = (len(input_ids), response_length)
        logprobs, values, entropy = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)

        def run(ids: Tensor, mask: Tensor, rows: Tensor, aligned: LeftPaddedLayout) -> None:
            out = self.model(
                ids,
                mask,
                aligned.max_response_len,
                self.args.temperature,
                with_values=actor,
                with_entropy=actor,
                frozen_hidden_states=None if lower is None else aligned.align_states(lower[rows]).to(ids.device),
                response_mask=aligned.response_mask.to(ids.device),
                seq_lens=aligned.seq_lens,
            )
            logprobs[rows] = aligned.restore_responses(out.logprobs.cpu())
            if actor:
                values[rows] = aligned.restore_responses(out.values.cpu())
                entropy[rows] = aligned.restore_responses(out.entropy.cpu())

        phase = "logprobs" if actor else "reference"
        self._map_micro_batches(input_ids, attention_mask, response_length, passes, phase, run)
        return logprobs, values, entropy

    def _map_micro_batches(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        passes: list[Tensor] | None,
        phase: str,
        run: Callable[[Tensor, Tensor, Tensor, LeftPaddedLayout], None],
    ) -> None:
        tally, device = ProgressReporter(phase, len(input_ids), self.report), self.accelerator.device

        def run_rows(rows: Tensor) -> None:
            aligned = LeftPaddedLayout.from_attention_mask(attention_mask[rows], response_length)
            ids, mask = (aligned.align_tokens(columns[rows]).to(device) for columns in (input_ids, attention_mask))
            run(ids, mask, rows, aligned)
            tally.add(len(rows), int(mask.sum()))

        if passes is None:  # rows of similar length together
            order = attention_mask.sum(1).argsort(stable=True)
            self.forward_batch_size.run(order, run_rows)
            return
        for rows in passes:
            self.micro_batch_size.run(rows, run_rows)

    def _completions(
        self, rows: Sequence[Row], tokens: Tensor, response_attention_mask: Tensor, context: dict[str, Any]
    ) -> tuple[Completions, dict[str, list]]:
        ids = [row[keep].tolist() for row, keep in zip(tokens, response_attention_mask, strict=True)]
        columns, prompt_ids = to_columns(rows), None
        prompts, skip = columns.pop("prompt", None), self.args.skip_special_tokens
        if prompts is None:
            prompt_ids = [row["input_ids"] for row in rows]
            prompts = self.tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
        completions = [
            [{"role": "assistant", "content": decode(self.tokenizer, response, skip)}]
            if is_conversational(prompt)
            else decode_completion(self.tokenizer, row["input_ids"], response, skip)
            for prompt, row, response in zip(prompts, rows, map(self._strip_eos, ids), strict=True)
        ]
        extra: dict[str, list] = {}

        def log_extra(name: str, values: Any) -> None:
            if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != len(rows):
                raise ValueError(f"log_extra({name!r}, ...) takes a list with one value for each of {len(rows)} rows.")
            extra[name] = list(values)

        context = {**context, "log_extra": log_extra}
        openings = [self._find_opening(row) for row in rows]
        opening_ids = [
            find_opening_ids(row["input_ids"], opening, self.tokenizer)
            for row, opening in zip(rows, openings, strict=True)
        ]
        return Completions(prompts, completions, ids, columns, context, prompt_ids, openings, opening_ids), extra

    def _strip_eos(self, response: list[int]) -> list[int]:
        """Drop the EOS that ended a response, where special tokens are kept: a chat template writes its own."""
        if self.args.skip_special_tokens:
            return response
        asked_for = self.args.stop_token_id
        kept = {*asked_for} if isinstance(asked_for, list | tuple) else {asked_for}
        ends = {*self.stop_ids} - kept | {self.tokenizer.eos_token_id}
        return response[:-1] if response and response[-1] in ends else response

    def _find_opening(self, row: Row) -> str:
        prompt = row.get("prompt")
        if not is_conversational(prompt) or prompt[-1]["role"] == "assistant":  # type: ignore[index]
            return ""
        kwargs = merge_template_kwargs(cast(dict, self.args.chat_template_kwargs), row)
        return find_generation_opening(cast(list, prompt), self.tokenizer, kwargs)
