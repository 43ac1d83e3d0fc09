"""The vLLM server of a run: checks before weights are loaded, and a comparison with the model.

A server of another base, dtype or log-probability mode answers without an error, and so would one that ignores the
adapter. A few tokens are sampled by the server and scored by the model, which shows any of these.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig
from torch import nn

from ..config import PPOConfig
from ..data.padding import pad_id
from ..data.seeding import derive_seed, sampling_uniforms
from ..models.loading import base_name, load_config
from ..rollout.vllm_client import RefusedError, VLLMClient
from ..rollout.vllm_engine import VLLMEngine, base_model

if TYPE_CHECKING:
    from ..trainer import PPOTrainer

OLDEST_VLLM = "0.32"  # the one that tests run with
PROMPTS, TOKENS = 4, 16  # of the comparison
# Mean distances of log-probabilities, nats per token. The same bf16 weights in two implementations gave up to 0.05.
MAX_DIFFERENCE, MAX_DIFFERENCE_FP32 = 0.3, 1e-3
# Options of LoRA with which vLLM computes another layer, or none.
UNSERVED_LORA = (
    "modules_to_save", "trainable_token_indices", "use_dora", "use_qalora", "lora_bias", "target_parameters",
    "use_bdlora", "arrow_config", "monteclora_config", "velora_config",
)  # fmt: skip


def check_engine(args: PPOConfig, model: Any, adapter: PeftConfig | None, rollout_func: Callable | None) -> None:
    """Refuse a run that vLLM cannot serve, and a server that lacks what the run needs.

    Args:
        args: names the server.
        model: the policy or its name.
        adapter: configuration of the trained adapter; None without one.
        rollout_func: generates responses in place of the trainer.
    """
    if not args.use_vllm:
        return
    if rollout_func is not None:
        raise ValueError("use_vllm=True has no effect with rollout_func, which generates: remove one of them.")
    _check_adapter(adapter)
    client = VLLMClient(args.vllm_url, args.vllm_server_timeout)
    client.wait_until_up()
    version = str(client.request("GET", "/version")["version"])
    if Version(Version(version).public) < Version(OLDEST_VLLM):
        raise ValueError(f"The server at {client.url} runs vLLM {version}; ppo_plus needs {OLDEST_VLLM} or newer.")
    _check_context(args, model, base_model(client).get("max_model_len"))
    if not _loads_adapters(client):
        raise ValueError(
            f"The vLLM server at {client.url} does not load adapters: start it with --enable-lora and with "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
        )


def _check_adapter(adapter: PeftConfig | None) -> None:
    if adapter is None:
        raise ValueError("use_vllm=True hands over an adapter, and this run trains the whole model: pass peft_config.")
    if not isinstance(adapter, LoraConfig):
        raise ValueError(f"vLLM serves LoRA adapters, and this one is {type(adapter).__name__}: pass a LoraConfig.")
    for option in UNSERVED_LORA:
        if value := getattr(adapter, option, None):
            raise ValueError(
                f"vLLM does not serve LoRA with {option}={value!r}: leave the option out, or set use_vllm=False."
            )


def _check_context(args: PPOConfig, model: Any, served: int | None) -> None:
    init_kwargs = cast(dict, args.model_init_kwargs or {})
    config: Any = model.config if isinstance(model, nn.Module) else load_config(base_name(model), init_kwargs)
    context = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
    max_tokens = math.inf if args.max_prompt_length is None else args.max_prompt_length + args.response_length
    if served is not None and served < min(context, max_tokens):
        raise ValueError(
            f"The vLLM server at {args.vllm_url} takes {served} tokens of prompt and response together (its "
            f"--max-model-len), and this run may need {min(context, max_tokens)}: restart it with that many, or set "
            f"max_prompt_length={served - args.response_length} or less (now {args.max_prompt_length}), with "
            f"response_length={args.response_length}."
        )


def _loads_adapters(client: VLLMClient) -> bool:
    try:
        client.request("POST", "/v1/unload_lora_adapter", {"lora_name": "ppo-none"})
    except RefusedError as error:  # by name where the server has the route at all
        return "ppo-none" in str(error)
    return True


def build_engine(trainer: PPOTrainer) -> VLLMEngine | None:
    """Return the engine of a run; None if the trainer itself generates."""
    args, model = trainer.args, trainer.model
    if not args.use_vllm:
        return None
    client = VLLMClient(args.vllm_url, args.vllm_server_timeout)
    padding, report = pad_id(trainer.processing_class), trainer._rollouts.on_progress
    return VLLMEngine(client, args, trainer.stop_ids, model.num_embeddings, padding, trainer.collectives, report)


def verify_engine(trainer: PPOTrainer) -> None:
    """Refuse a server whose log-probabilities are not those of the model, and warn of one in lower precision."""
    args, collector = trainer.args, trainer.collector
    if collector.engine is None:
        return
    rows: list[Any] = list(trainer.train_dataset.take(PROMPTS))
    length = min(args.response_length, TOKENS)
    uniforms = sampling_uniforms(derive_seed(args.seed, "engine"), len(rows), length)
    difference, at_one = collector.compare_engine(rows, uniforms, (args.temperature, 1.0))
    base = collector.engine.base_info["root"]
    where = f"The vLLM server at {collector.engine.client.url} (base {base!r})"
    distance = f"its log-probabilities differ from the model's by {difference:.3g} nats per token"
    if args.temperature != 1.0 and at_one < difference / 2:
        raise ValueError(
            f"{where} returns log-probabilities at temperature 1, not at temperature={args.temperature} ({distance}): "
            "start it with --logprobs-mode processed_logprobs."
        )
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"{where} does not serve the model that is trained, {trainer.model.config._name_or_path!r}: {distance}. "
            "Start it with the same base, in a precision close to the trainer's."
        )
    if trainer.model.language_model.dtype == torch.float32 and difference > MAX_DIFFERENCE_FP32:
        warnings.warn(
            f"{where} computes in lower precision than the model, which is in float32: {distance}. Importance weights "
            "correct it; start the server with --dtype float32, or load the model in bfloat16.",
            stacklevel=3,
        )
