"""Responses from a vLLM server that holds the base and gets the adapter alone.

The server loads the base once. Each rollout hands over the current adapter as a folder under a name that was never
used before, because vLLM's prefix cache identifies adapters by name and path: under an old name, prompts would be
answered with keys and values of earlier weights. After the rollout the adapter is unloaded and its folder deleted.
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import PPOConfig
from ..models.actor_critic import ActorCritic
from ..models.adapters import active_adapter, is_adapter_parameter
from ..models.generation import GenerateOutput
from ..utils.collectives import Collectives
from .phases import ProgressReporter
from .vllm_client import Completion, EngineError, VLLMClient

SEEDS = 2**53  # number of different seeds; a float64 in [0, 1) has as many values


class VLLMEngine:
    """Generates responses by a vLLM server.

    Args:
        client: sends the requests.
        args: sampling options, `generation_batch_size`, and `output_dir`, which the server must be able to read.
        stop_ids: ids that end a response.
        num_embeddings: number of token ids that the model has embeddings for.
        pad_token_id: fills the tensors.
        collectives: rank 0 hands over the adapter, and all ranks send requests for their own prompts.
        report: called as `RolloutCollector`'s, while answers are awaited.
    """

    def __init__(
        self, client: VLLMClient, args: PPOConfig, stop_ids: Sequence[int], num_embeddings: int, pad_token_id: int,
        collectives: Collectives, report: Callable[[str, int, int, int], None],
    ) -> None:  # fmt: skip
        self.client, self.args, self.stop_ids, self.report = client, args, list(stop_ids), report
        self.num_embeddings, self.pad_token_id, self.collectives = num_embeddings, pad_token_id, collectives
        self.base_info = base_model(client)
        self._model = ""  # name under which the server has what responses are sampled from

    @contextlib.contextmanager
    def serve(self, model: ActorCritic, on_all_ranks: bool = True) -> Iterator[None]:
        """Context manager: responses come from the model in its current role.

        Called by all ranks, or with `on_all_ranks=False` by rank 0 alone. If a request of any rank fails, all raise.

        Raises:
            EngineError: the engine did not answer.
        """
        collectives = self.collectives if on_all_ranks else None
        with contextlib.ExitStack() as stack:
            failure = None
            if collectives is None or collectives.is_main:
                try:
                    self._model = stack.enter_context(self._loaded(model))
                except EngineError as error:
                    failure = error
            if collectives is not None:
                self._model, failure = collectives.broadcast((self._model, failure))
            if failure is not None:
                raise failure
            try:
                yield
            except EngineError as error:
                failure = error
            # No rank is still sampling when rank 0 unloads the adapter.
            if collectives is not None and collectives.any(failure is not None) and failure is None:
                failure = EngineError(f"A request of another process to {self.client.url} failed.")
            if failure is not None:
                raise failure

    @contextlib.contextmanager
    def _loaded(self, model: ActorCritic) -> Iterator[str]:
        """Load the active adapter on the server, and yield its name; that of the base if no adapter is active."""
        adapter = active_adapter(model.policy)
        if adapter is None:
            yield self.base_info["id"]
            return
        name, output_dir = f"ppo-{uuid.uuid4().hex}", Path(cast(str, self.args.output_dir)).absolute()
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="vllm-adapter-", dir=output_dir) as folder:
            Path(folder).chmod(0o755)  # the server may run as another user
            # Not `state_dict()`: of a sharded base it frees the weights that are gathered, here on rank 0 alone.
            weights = {n: p.detach() for n, p in model.policy.named_parameters() if is_adapter_parameter(n, adapter)}
            cast(PeftModel, model.policy).save_pretrained(
                folder, selected_adapters=[adapter], save_embedding_layers=False, state_dict=weights
            )
            path = folder if adapter == "default" else f"{folder}/{adapter}"
            try:
                self.client.request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
            except EngineError as error:
                rank = cast(PeftModel, model.policy).peft_config[adapter].r
                raise EngineError(
                    f"{error} The request was to load the adapter in {path}: that folder of output_dir must be on a "
                    f"disk that the server reads too, and its --max-lora-rank must be at least r={rank}."
                ) from None
            try:
                yield name
            finally:
                with contextlib.suppress(EngineError):  # an engine that died needs no unloading
                    self.client.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def generate(
        self, prompts: Sequence[list[int]], uniforms: Tensor, num_generations: int = 1,
        turn_caches: list | None = None, on_row_end: Callable[[int, Tensor], None] | None = None,
        truncate: bool = True,
    ) -> GenerateOutput:  # fmt: skip
        """Sample a turn in the block of `serve`.

        The first uniform of a row is its seed, so a row gets the same request whatever the number of ranks is. The
        server has a prefix cache of its own: `num_generations` and `turn_caches` are not needed.

        Args:
            prompts: token ids of each row.
            uniforms: as of `sample_responses`, `(N, R)` float64; NaN from the position on where a row has to end.
            num_generations: consecutive rows with the same prompt.
            turn_caches: not used.
            on_row_end: called with the index and the tokens of a row when it ends, while others are awaited.
            truncate: whether top-p, top-k and min-p of the run apply.
        """
        lengths = (~uniforms.isnan()).sum(1).tolist()
        seeds = (uniforms[:, 0] * SEEDS).long().tolist()
        args = self.args
        truncation = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
        common = self._sampling_options() | (truncation if truncate else {"top_p": 1.0, "top_k": 0, "min_p": 0.0})
        requests = [
            {**common, "prompt": prompt, "max_tokens": length, "seed": seed}
            for prompt, length, seed in zip(prompts, lengths, seeds, strict=True)
        ]
        parallel = args.generation_batch_size or args.local_rollout_forward_batch_size
        progress = ProgressReporter("generating", len(prompts), self.report)

        def on_complete(row: int, completion: Completion) -> None:
            self._check(completion, lengths[row])
            progress.add(1, len(completion.ids))
            if on_row_end is not None:
                on_row_end(row, torch.tensor(completion.ids))

        completions = self.client.complete(requests, parallel, on_complete)
        tokens = [torch.tensor(completion.ids) for completion in completions]
        logprobs = [torch.tensor(completion.logprobs) for completion in completions]
        return GenerateOutput(
            pad_sequence(tokens, batch_first=True, padding_value=self.pad_token_id),
            pad_sequence(logprobs, batch_first=True),
        )

    def _sampling_options(self) -> dict[str, Any]:
        return {
            "model": self._model, "temperature": self.args.temperature,
            # Fields that are left out are filled from the model's generation config.
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "stop_token_ids": self.stop_ids, "ignore_eos": True,  # of the stop tokens, these are all
            "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip

    def _check(self, completion: Completion, length: int) -> None:
        ids = completion.ids
        if max(ids) >= self.num_embeddings:
            raise EngineError(
                f"The vLLM server at {self.client.url} sampled token {max(ids)}, and the model has embeddings for "
                f"{self.num_embeddings}: its base has another vocabulary. Serve the model that is trained."
            )
        if len(ids) > length or (len(ids) < length and ids[-1] not in self.stop_ids):
            raise EngineError(
                f"The vLLM server at {self.client.url} ended a response after {len(ids)} of {length} tokens without a "
                "stop token. Start it with a larger --max-model-len, and with --generation-config vllm."
            )


def base_model(client: VLLMClient) -> dict[str, Any]:
    """Return what the server tells about its base: `id`, `root` (name or path) and `max_model_len`.

    Raises:
        EngineError: the answer is not that of a vLLM server.
    """
    models = client.request("GET", "/v1/models")
    try:
        return next(model for model in models["data"] if model.get("parent") is None)
    except (TypeError, KeyError, AttributeError, StopIteration):
        raise EngineError(f"{client.url} lists no base model: it is no vLLM server.") from None
