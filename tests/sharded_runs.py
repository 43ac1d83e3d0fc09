"""Runs of the tiny model with a sharded base and with whole copies, on the processes that start this script.

torchrun --nproc_per_node 2 tests/sharded_runs.py FOLDER NAME ...   each run named, sharded and not; see test_fsdp.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from conftest import lora, make_model, make_prompts, make_trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from ppo_plus import AdaptiveKLCallback
from ppo_plus.kernels.frozen_layers import decoder_layers


def quantized(**options):
    return lambda base: {"model": str(base), "quantization_config": BitsAndBytesConfig(**options)}


def models_that_score(base):
    torch.manual_seed(1)
    folder, model = base.parent / "reward", AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    return {"model": str(base), "reward_funcs": [str(folder), model]}


def separate_critic(base):
    torch.manual_seed(1)
    return {"value_model": AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)}


def continued(base):
    return {"model": str(base.parent / "adapter"), "peft_config": None}


def top_layer_only(base):
    return {"peft_config": lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])}


def tied_in_half_precision(base):
    return {"model": make_model(tie_word_embeddings=True).to(torch.bfloat16)}


def evaluates(base):
    return {"eval_dataset": make_prompts(7)}


def evaluates_scores(base):
    return {**models_that_score(base), **evaluates(base), "peft_config": lora(layers_to_transform=[3],
            target_modules=["q_proj", "down_proj"])}  # fmt: skip


# Configuration, and further arguments of the trainer from the folder of the base, whose neighbors are adapters.
RUNS = {
    "shared critic": ({}, None),
    "answers to a prompt, a critic updated twice, recomputed activations": (
        {"num_generations": 4, "critic": "adapter", "num_critic_updates": 2, "critic_backbone_learning_rate": 1e-3,
         "activation_checkpointing": True}, None),
    "cached lower layers": ({"num_generations": 2}, top_layer_only),
    "tied embeddings, half precision": ({"bf16": True}, tied_in_half_precision),
    "evaluation of uneven prompts, report, samples": (
        {"eval_win_rate": True, "eval_strategy": "steps", "eval_steps": 2, "html_report": True, "stop_token_id": 8,
         "num_sample_generations": 2, "local_rollout_forward_batch_size": 1}, evaluates),
    "layer by layer": (
        {"ds3_gather_for_generation": False, "eval_win_rate": True, "eval_strategy": "steps", "eval_steps": 2,
         "html_report": True, "stop_token_id": 9, "local_rollout_forward_batch_size": 1,
         "prefix_reward_baseline": True}, evaluates_scores),
    "a reward adapter and a classifier": ({"prefix_reward_baseline": True}, models_that_score),
    "a separate critic": ({}, separate_critic),
    "an adapter that is continued": ({}, continued),
    "nf4": ({}, quantized(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)),
    "nf4 in bf16": ({}, quantized(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)),
    "int8": ({}, quantized(load_in_8bit=True)),
}  # fmt: skip


def trainer_of(name: str, base: Path, folder: Path, **config):
    """The trainer of a run: 6 steps, in the second rollout already."""
    options, arguments = RUNS[name]
    more = arguments(base) if arguments else {}
    config = {"max_steps": 6, "gradient_accumulation_steps": 2, **options, **config}
    return make_trainer(folder, config=config, callbacks=[AdaptiveKLCallback(target=1.0, horizon=20)], **more)


def trained(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def base_bytes(model) -> int:
    """The bytes of frozen weights that this process holds."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if not p.requires_grad)
    return sum(p.nbytes for p in local)


def watch_base_bytes(trainer, backbone) -> dict[str, int]:
    """Record the most bytes of frozen weights that this process holds while a layer runs, in learning and elsewhere."""
    most = {"learning": 0, "elsewhere": 0}

    def record(*_) -> None:
        phase = "learning" if torch.is_grad_enabled() else "elsewhere"
        most[phase] = max(most[phase], base_bytes(trainer.model))

    for layer in decoder_layers(backbone):
        layer.register_forward_pre_hook(record)
    return most


def generate_unevenly(trainer) -> list[torch.Tensor]:
    """Answers of `model.generate`, for which the second process decodes more tokens and more often; cut to 4 tokens."""
    answers, rank = [], trainer.accelerator.process_index
    prompt = torch.tensor([[1, 5, 9 + rank]])
    with trainer.collector.uneven_passes():  # of one call; several in a row share what is gathered
        for _ in range(rank):
            trainer.model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    for tokens in (4, 4 + 5 * rank):
        answer = trainer.model.generate(input_ids=prompt, max_new_tokens=tokens, min_new_tokens=4, do_sample=False)
        answers.append(answer[0, 3:7])
    return answers


def result(trainer, folder: Path) -> dict:
    weights = trained(trainer)
    everywhere = trainer.accelerator.gather(weights[None])
    assert all(torch.equal(row, weights) for row in everywhere), "the processes do not hold the same weights"
    trainer.save_model(str(folder / "final"))
    answers = [trainer.accelerator.gather(answer[None]).tolist() for answer in generate_unevenly(trainer)]
    if trainer.accelerator.is_main_process:
        torch.save(weights, folder / "weights.pt")
    history = [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k}
               for row in trainer.state.log_history]  # fmt: skip
    layer = max(base_bytes(layer) for layer in decoder_layers(trainer.model.language_model.base_model))
    states = [m.state.CB.untyped_storage().nbytes() for m in trainer.model.modules() if hasattr(m, "init_8bit_state")]
    everything = {"bytes": base_bytes(trainer.model), "layer": layer, "int8_states": sum(states), "answers": answers}
    return {**everything, "log": history, "wrapper": type(trainer.model_wrapped).__name__}


def main(folder: Path, names: list[str]) -> None:
    results = {}
    for name in names:
        for fsdp in (True, False):
            out = folder / name / str(fsdp)
            trainer = trainer_of(name, folder / "base", out, fsdp=fsdp, ddp_backend="gloo")
            most = watch_base_bytes(trainer, trainer.model.language_model.base_model)
            trainer.train()
            results[f"{name}/{fsdp}"] = {**result(trainer, out), **most}
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(RUNS))
