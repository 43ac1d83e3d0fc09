"""Sample and score responses: generate, rewards, log-probabilities and values, reference log-probabilities.

The order of operations is that of "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031). Training and
evaluation use the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .. import algo
from ..config import PPOConfig
from ..data.padding import left_pad, pad_id, unpad
from ..data.prompts import Row
from ..data.seeding import derive_seed, isolated_rng, sampling_uniforms
from ..kernels.batch_backoff import PATIENCE, BatchSize
from ..models.actor_critic import ActorCritic
from ..models.generation import GenerateOutput
from ..models.turn_cache import TurnCache, tokens_after
from ..rewards import CheapAnswers, Completions, RewardSet
from ..rewards.cheap_answers import PROMPTS, mean_by_kind
from ..utils.contexts import set_attributes
from .buffer import LeftPaddedLayout, Rollout, index_rows, response_mask
from .decoding import CompletionDecoder, build_logits_processor
from .experience import Experience
from .phases import PhaseTimer, ProgressReporter
from .responses import Responses, check_same_prompts
from .turns import Generate
from .vllm_engine import VLLMEngine

# Maps sequence lengths `(N,)` to lists of row indices, one per micro-batch.
BatchingFn = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class ForwardBatch:
    """Sequences for forward passes of the model, and their micro-batches."""

    input_ids: Tensor  # `(N, P + R)` int64
    attention_mask: Tensor  # `(N, P + R)` int64
    response_length: int  # R, in tokens
    micro_batches: list[Tensor] | None = None  # row indices of each forward pass; None batches rows of similar length
    observation_mask: Tensor | None = None  # as in `Rollout`, `(N, R)` bool
    num_generations: int = 1  # consecutive rows with the same prompt


class RolloutCollector:
    """Samples and scores responses with a model, its rewards and a tokenizer.

    Args:
        model: the actor-critic; its `forward` is the one that the loss uses.
        rewards: the reward functions of a run.
        tokenizer: the policy's tokenizer.
        args: supplies sizes and sampling options.
        accelerator: supplies autocast, device and rank.
        stop_ids: ids that end a response.
        report: called at every decode step and forward pass with phase, complete responses, responses, and tokens; if
            it raises an exception, the rollout ends.
        responder: generates responses, called with rows, uniforms and `_generate`; None: one turn of the policy.
        engine: generates turns in place of the model.
    """

    def __init__(
        self, model: ActorCritic, rewards: RewardSet, tokenizer: PreTrainedTokenizerBase, args: PPOConfig,
        accelerator: Accelerator, stop_ids: Sequence[int],
        report: Callable[[str, int, int, int], None] = lambda phase, done, total, tokens: None,
        responder: Callable[..., Responses] | None = None, engine: VLLMEngine | None = None,
    ) -> None:  # fmt: skip
        self.model, self.rewards, self.tokenizer, self.args = model, rewards, tokenizer, args
        self.accelerator, self.stop_ids, self.report = accelerator, list(stop_ids), report
        self.responder, self.engine = responder, engine
        # Entered by all ranks together; inside, each may run another number of passes, also if weights are sharded.
        self.uneven_passes: Callable[[], AbstractContextManager] = contextlib.nullcontext
        self.logits_processor = build_logits_processor(args)
        self.decoder = CompletionDecoder(tokenizer, args, self.stop_ids)
        micro_batches = args.num_mini_batches * args.gradient_accumulation_steps
        self.forward_batch_size = BatchSize(args.local_rollout_forward_batch_size)
        self.max_micro_batch_rows = BatchSize(args.rollout_batch_size, PATIENCE * micro_batches)
        self.generation_batch_size = BatchSize(args.generation_batch_size or args.local_rollout_forward_batch_size)

    def sample_seeded(
        self, prompts: Sequence[Row], rows: range, seed_key: tuple, context: dict[str, Any], **options: Any
    ) -> Experience:
        """Call `sample` with all randomness derived from the seed of the run.

        `rows` are the indices of the prompts among those of all ranks; `seed_key` distinguishes this rollout or
        evaluation from others.
        """
        uniforms, seed = self.derive_uniforms(rows, seed_key)
        with isolated_rng(seed):
            return self.sample(prompts, uniforms, context, **options)

    def derive_uniforms(self, rows: range, seed_key: tuple) -> tuple[Tensor, int]:
        """Return the uniforms that decide the tokens of these rows, `(N, R)` float64, and a seed for reward functions.

        Uniforms belong to a row among those of all ranks, so sampling does not depend on the number of ranks.
        """
        seed, length = self.args.seed, self.args.response_length
        uniforms = sampling_uniforms(derive_seed(seed, *seed_key, 0), rows.stop, length)
        return uniforms[list(rows)], derive_seed(seed, *seed_key, self.accelerator.process_index)

    @torch.no_grad()
    def sample(
        self, rows: Sequence[Row], uniforms: Tensor, context: dict[str, Any],
        micro_batch_fn: BatchingFn | None = None, score: bool = True, on_all_ranks: bool = True,
    ) -> Experience:  # fmt: skip
        """Generate responses, score them, and compute log-probabilities and values with actor, critic and reference.

        Args:
            rows: rows of a tokenized dataset; in training, `num_generations` times each.
            uniforms: uniform numbers that decide the sampled tokens, `(N, R)` float64.
            context: passed to reward functions.
            micro_batch_fn: returns the micro-batches of the first PPO epoch; None in evaluation, which keeps no hidden
                states, because they might exceed memory, and samples one response per row.
            score: whether rewards are called; if not, all scores are NaN.
            on_all_ranks: False if rank 0 alone calls this.
        """
        timer = PhaseTimer()
        self.model.eval()  # in train mode, activation checkpointing would disable the key-value cache
        num_generations = 1 if micro_batch_fn is None else self.args.num_generations
        with self._generating(), self.accelerator.autocast():
            responses = self._respond(rows, uniforms, num_generations, on_all_ranks)
            timer.record("generate")
            with self.uneven_passes():  # without an engine, they are entered already
                return self._score(responses, context, micro_batch_fn, score, timer)

    def _score(
        self, responses: Responses, context: dict[str, Any], micro_batch_fn: BatchingFn | None, score: bool,
        timer: PhaseTimer,
    ) -> Experience:  # fmt: skip
        """Score responses by rewards, actor, critic and reference; the arguments are those of `sample`."""
        learning, num_rows = micro_batch_fn is not None, len(responses.rows)
        completions, extra = self.decoder.decode(responses, context)
        self.report("scoring", 0, num_rows, 0)
        scores = self.rewards(completions) if score else self.rewards.leave_unscored(completions)
        self.report("scoring", num_rows, num_rows, 0)
        batch = self._forward_batch(responses, micro_batch_fn)
        prefix_scores = self._prefix_scores(batch) if learning else None
        timer.record("score")
        frozen_states = self._frozen_states(batch) if learning else None
        masked = self.args.objective == "masked"
        spared = masked and not responses.logprobs[responses.action_mask].isnan().any()
        logprobs, values, entropy = self._forward(batch, frozen_states, logprobs=not spared)
        with self.model.role("reference"):
            ref_logprobs, _, _ = self._forward(batch, frozen_states, actor=False)
        timer.record("logprobs")
        sampled_logprobs = torch.where(responses.logprobs.isnan(), logprobs, responses.logprobs)
        if masked:  # a part of them may be from the forward pass, which tells nothing about all tokens
            logprobs, entropy = sampled_logprobs, None
        token_rewards = scores.per_token
        if responses.observation_mask is not None:
            token_rewards = algo.move_to_actions(token_rewards, responses.action_mask)
        return Experience(
            batch.input_ids, batch.attention_mask, responses.action_mask, responses.stopped, logprobs, sampled_logprobs,
            ref_logprobs, values, entropy, scores.by_function, scores.total, token_rewards, completions, timer.seconds,
            extra, frozen_states, prefix_scores, scores.failed, responses.observation_mask, responses.tool_counts,
        )  # fmt: skip

    @torch.no_grad()
    def ask_about_cheap_answers(self, rows: Sequence[Row], context: dict[str, Any]) -> CheapAnswers:
        """Call reward functions once with an empty answer and the repeated prompt, for the first few prompts.

        Reward models are not called. The policy could generate these answers: they end in EOS and are cut at
        `response_length`.
        """
        self.model.eval()  # as in a rollout
        rows, end = rows[:PROMPTS], [self.tokenizer.eos_token_id]
        answers = [end] * len(rows) + [self.decoder.encode_prompt_text(row) + end for row in rows]
        parts = [torch.tensor(answer[: self.args.response_length]) for answer in answers]
        tokens = pad_sequence(parts, batch_first=True, padding_value=pad_id(self.tokenizer))
        output = GenerateOutput(tokens, torch.zeros(tokens.shape))
        completions, _ = self.decoder.decode(self._single_turn([*rows, *rows], output), context)
        scores = self.rewards.ask_functions(completions)
        return CheapAnswers(self.rewards.names, self.rewards.weights, mean_by_kind(scores))

    @torch.no_grad()
    def generate_from_reference(self, rows: Sequence[Row], uniforms: Tensor) -> Completions:
        """Generate the reference's responses to rows of a tokenized dataset, with the uniforms of `sample`."""
        self.model.eval()
        with self._generating(), self.accelerator.autocast(), self.model.role("reference"):
            return self.decoder.decode(self._respond(rows, uniforms), {})[0]

    @torch.no_grad()
    def compare_engine(self, rows: Sequence[Row], uniforms: Tensor, temperatures: Sequence[float]) -> list[float]:
        """Return the mean distance of the engine's log-probabilities to the model's at each temperature, nats."""
        engine = cast(VLLMEngine, self.engine)
        self.model.eval()
        with engine.serve(self.model):
            output = engine.generate([row["input_ids"] for row in rows], uniforms, truncate=False)
        responses = self._single_turn(rows, output)
        batch = self._forward_batch(responses, None)
        differences = []
        for temperature in temperatures:
            with self.uneven_passes(), self.accelerator.autocast(), set_attributes(self.args, temperature=temperature):
                logprobs, _, _ = self._forward(batch, None, actor=False)
            differences.append(float((logprobs - responses.logprobs)[responses.mask].abs().mean()))
        return differences

    @torch.no_grad()
    def recompute_frozen_states(self, rollout: Rollout, micro_batches: list[Tensor]) -> Rollout:
        """Add the hidden states to a rollout from a checkpoint, which contains none, over its own micro-batches."""
        self.model.eval()
        batch = ForwardBatch(
            rollout.input_ids, rollout.attention_mask, rollout.response_length, micro_batches, rollout.observation_mask,
            self.args.num_generations,
        )  # fmt: skip
        with self.uneven_passes(), self.accelerator.autocast():
            return replace(rollout, frozen_hidden_states=self._frozen_states(batch))

    def _generating(self) -> AbstractContextManager:
        # An engine needs no weights gathered, and its ranks communicate while they wait for it.
        return self.uneven_passes() if self.engine is None else contextlib.nullcontext()

    @contextlib.contextmanager
    def _generator(self, on_all_ranks: bool) -> Iterator[Generate]:
        """Context manager: yield a function that samples turns of the model in its current role."""
        if self.engine is None or self.model.active_model is not self.model.language_model:  # a separate reference
            yield self._generate
            return
        with self.engine.serve(self.model, on_all_ranks):
            yield self.engine.generate

    def _respond(
        self, rows: Sequence[Row], uniforms: Tensor, num_generations: int = 1, on_all_ranks: bool = True
    ) -> Responses:
        with self._generator(on_all_ranks) as generate:
            if self.responder is not None:
                return self.responder(rows, uniforms, generate)
            prompts = [row["input_ids"] for row in rows]
            return self._single_turn(rows, generate(prompts, uniforms, num_generations))

    def _single_turn(self, rows: Sequence[Row], output: GenerateOutput) -> Responses:
        return Responses.from_single_turn(rows, output, self.stop_ids, train_on_eos=self.args.train_on_eos)

    def _generate(
        self, prompts: Sequence[list[int]], uniforms: Tensor, num_generations: int = 1,
        turn_caches: list[TurnCache | None] | None = None, on_row_end: Callable[[int, Tensor], None] | None = None,
    ) -> GenerateOutput:  # fmt: skip
        """Sample a turn; `turn_caches` are those of the turns before by row, and are replaced by those after it.

        `on_row_end` gets the index and the tokens of each row when it ends, again if the batch size is lowered.
        """
        (rows, length), padding = uniforms.shape, pad_id(self.tokenizer)
        tokens = torch.full((rows, length), padding, dtype=torch.int64)
        logprobs = torch.zeros(rows, length)
        order = torch.tensor([len(p) for p in prompts]).argsort(stable=True)
        progress, device = ProgressReporter("generating", rows, self.report), self.accelerator.device

        def sampled(chunk: Tensor) -> Tensor:
            return response_mask(tokens[chunk], self.stop_ids) & ~uniforms[chunk].isnan()

        def decode_rows(chunk: Tensor) -> None:
            # Responses to a prompt are adjacent, because the sort is stable. Each prompt runs once.
            _, prompt_of_row, counts = torch.unique_consecutive(
                chunk // num_generations, return_inverse=True, return_counts=True
            )
            firsts = chunk[counts.cumsum(0) - counts]
            indices = chunk.tolist()
            caches = None if turn_caches is None else [turn_caches[i] for i in indices]
            new_tokens = tokens_after(caches, [prompts[i] for i in firsts.tolist()])
            input_ids, attention_mask = left_pad(new_tokens, padding)
            out = self.model.sample(
                input_ids.to(device), attention_mask.to(device), uniforms[chunk],
                None if num_generations == 1 else prompt_of_row.to(device), stop_ids=self.stop_ids,
                pad_token_id=padding, temperature=self.args.temperature, logits_processor=self.logits_processor,
                on_step=progress.decode_step_callback(len(chunk)), turn_caches=caches,
                on_row_end=on_row_end and (lambda row, ids: on_row_end(indices[row], ids)),
            )  # fmt: skip
            if turn_caches is not None and caches is not None:
                for i, cache in zip(indices, caches, strict=True):
                    turn_caches[i] = cache
            tokens[chunk], logprobs[chunk] = out.tokens.cpu(), out.logprobs.cpu()
            progress.add(len(chunk), int(sampled(chunk).sum()))

        self.generation_batch_size.run(order, decode_rows)
        max_length = int(sampled(torch.arange(rows)).sum(1).max())
        return GenerateOutput(tokens[:, :max_length], logprobs[:, :max_length])

    def _forward_batch(self, responses: Responses, micro_batch_fn: BatchingFn | None) -> ForwardBatch:
        tokens = responses.tokens
        input_ids, prompt_mask = left_pad([row["input_ids"] for row in responses.rows], pad_id(self.tokenizer))
        attention_mask = torch.cat([prompt_mask, responses.mask.long()], 1)
        # In half precision, log-probabilities depend on the batch shape (by a few percent), so score with the
        # micro-batches of the first PPO epoch: its ratios are then exactly 1.
        micro_batches = None if micro_batch_fn is None else micro_batch_fn(attention_mask.sum(1))
        input_ids = torch.cat([input_ids, tokens], 1)
        answers, observations = 1 if micro_batch_fn is None else self.args.num_generations, responses.observation_mask
        check_same_prompts(responses.rows, answers)
        return ForwardBatch(input_ids, attention_mask, tokens.shape[1], micro_batches, observations, answers)

    def _prefix_scores(self, batch: ForwardBatch) -> Tensor | None:
        sequences = unpad(batch.input_ids, batch.attention_mask)
        if not self.args.uses_prefix_reward_baseline or (scored := self.rewards.prefix_scores(sequences)) is None:
            return None
        response_attention_mask = batch.attention_mask[:, -batch.response_length :]
        scores = torch.zeros(response_attention_mask.shape)
        for row, length in enumerate(response_attention_mask.sum(1).tolist()):  # the prefix ends before the token
            scores[row, :length] = scored[row][len(sequences[row]) - length - 1 :][:length]
        return scores

    def _frozen_states(self, batch: ForwardBatch) -> Tensor | None:
        if not self.model.num_cached_layers:
            return None
        length = batch.input_ids.shape[1] - 1
        parts: list[tuple[Tensor, Tensor]] = []

        def run(ids: Tensor, mask: Tensor, rows: Tensor, layout: LeftPaddedLayout) -> None:
            prefixes = layout.prefixes(rows, batch.num_generations)
            states = self.model.frozen_hidden_states(ids, mask, layout.seq_lens, prefixes).cpu()
            parts.append((rows, layout.restore_states(states, length)))

        self._map_micro_batches(batch, "frozen_layers", run)
        states = parts[0][1].new_zeros(len(batch.input_ids), *parts[0][1].shape[1:])
        for rows, part in parts:
            states[rows] = part
        return states

    def _forward(
        self, batch: ForwardBatch, frozen_states: Tensor | None, actor: bool = True, logprobs: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log-probabilities and, for the actor, values and entropy; each `(N, R)` float32.

        Without `logprobs`, log-probabilities are 0 and there are no entropies; a critic with a backbone of its own then
        needs no pass over the actor's.
        """
        shape = (len(batch.input_ids), batch.response_length)
        scored, values, entropy = (torch.zeros(shape) for _ in range(3))

        def run(ids: Tensor, mask: Tensor, rows: Tensor, layout: LeftPaddedLayout) -> None:
            states = None if frozen_states is None else layout.align_states(frozen_states[rows]).to(ids.device)
            out = self.model(
                ids, mask, layout.max_response_len, self.args.temperature, with_logprobs=logprobs, with_values=actor,
                with_entropy=actor and logprobs, frozen_hidden_states=states,
                response_mask=layout.response_mask.to(ids.device), seq_lens=layout.seq_lens,
                prefixes=layout.prefixes(rows, batch.num_generations),
            )  # fmt: skip
            for rollout, aligned in ((scored, out.logprobs), (values, out.values), (entropy, out.entropy)):
                if aligned is not None:
                    rollout[rows] = layout.restore_responses(aligned.cpu())

        self._map_micro_batches(batch, "logprobs" if actor else "reference", run)
        return scored, values, entropy if logprobs else None

    def _map_micro_batches(
        self, batch: ForwardBatch, phase: str, run: Callable[[Tensor, Tensor, Tensor, LeftPaddedLayout], None]
    ) -> None:
        """Call `run` with the left-padded ids and mask of each micro-batch, its row indices, and its layout."""
        progress, device = ProgressReporter(phase, len(batch.input_ids), self.report), self.accelerator.device

        def run_rows(rows: Tensor) -> None:
            layout = LeftPaddedLayout.from_attention_mask(
                batch.attention_mask[rows], batch.response_length, index_rows(batch.observation_mask, rows)
            )
            ids = layout.align_tokens(batch.input_ids[rows]).to(device)
            mask = layout.align_tokens(batch.attention_mask[rows]).to(device)
            run(ids, mask, rows, layout)
            progress.add(len(rows), int(mask.sum()))

        if batch.micro_batches is None:  # rows of similar length together
            self.forward_batch_size.run(batch.attention_mask.sum(1).argsort(stable=True), run_rows)
            return
        for rows in batch.micro_batches:
            self.max_micro_batch_rows.run(rows, run_rows)
