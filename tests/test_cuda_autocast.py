"""What runs under autocast on CUDA, without a card: every kind of base, in every precision, against plain PEFT.

`cuda_autocast.py` gives CPU tensors CUDA's autocast lists, in a process of its own. There the matrix of bases and
precisions is run: a reward model is trained, answers are sampled, and a policy learns. Each of them is compared with
the same weights in PEFT's own layers under the same rules.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_autocast
import pytest
import torch
from conftest import SIZES, count_e, lora, make_config, make_model, make_prompts, make_tokenizer
from datasets import Dataset
from torch import nn
from transformers import BitsAndBytesConfig, GPTNeoXConfig, GPTNeoXForCausalLM

from ppo_plus import PPOTrainer, RewardConfig, RewardTrainer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "off": torch.float32}
FAMILIES = ("LayerNorm", "RMSNorm")
# Quantization and the dtype of the rest, which is that of the checkpoint.
BASES = {
    "nf4": ("nf4", "fp32"), "nf4 of fp16": ("nf4", "fp16"), "int8": ("int8", "fp32"), "int8 of fp16": ("int8", "fp16"),
    "bf16": (None, "bf16"), "fp16": (None, "fp16"), "fp32": (None, "fp32"),
}  # fmt: skip
AUTOCAST = ("bf16", "fp16", "off")
PROMPT, RESPONSE = 5, 6


# --- what runs in a process of its own ---


def save_base(family, dtype, folder):
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}
    if family == "RMSNorm":
        model = make_model(hidden_size=64, intermediate_size=128)
    else:
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
        model.get_output_embeddings().weight.data.mul_(20)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros at first, which hide what is left out
            parameter.data.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    model.to(DTYPES[dtype]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def quantization(kind, dtype):
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "off" else DTYPES[dtype]
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def run_on_cuda_by(trainer, precision):
    """Let a trainer autocast and scale gradients as accelerate does on CUDA; for CPUs it knows bf16 alone."""
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision = "no" if precision == "off" else precision
    accelerator.native_amp = precision != "off"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6) if precision == "fp16" else None


def move_adapters(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15


def plain_twin(model):
    """A copy of a model whose layers have PEFT's and transformers' own forward passes."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if "forward" in vars(module) and vars(module)["forward"].__module__.startswith("ppo_plus"):
            del module.forward
    return twin


def exact_twin(model):
    """The plain twin with all that is not quantized in fp32, to be used without autocast."""
    exact = plain_twin(model).float()
    for module in exact.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    return exact


def gradients(model):
    found = {name: p.grad.double().flatten() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gap(found, expected):
    return (found.double() - expected.double()).square().mean().sqrt().item()


def gradient_gap(found, expected):
    """How far all gradients are from those expected, as a share of their norm."""
    assert found.keys() == expected.keys() and found
    found, expected = (torch.cat([g[name] for name in sorted(g)]) for g in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def response_logprobs(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)


def learning(trainer, twin, exact):
    """How far log-probabilities and gradients are from the exact ones: ours, PEFT's, and without the adapter."""
    actor = trainer.model.train()
    ids = torch.randint(4, 40, (4, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(-1, 1, 4 * RESPONSE).view(4, -1)
    with trainer.accelerator.autocast():
        ours = actor(ids, torch.ones_like(ids), RESPONSE).logprobs
        pefts = response_logprobs(twin.train(), ids)
    expected = response_logprobs(exact.train(), ids)
    for logprobs in (ours, pefts, expected):
        (logprobs * weights).sum().backward()
    found = [gradients(model) for model in (actor.policy, twin, exact)]
    with torch.no_grad(), exact.disable_adapter():
        without = response_logprobs(exact, ids)
    return {
        "logprobs": [gap(x, expected) for x in (ours, pefts, without)],
        "gradients": [gradient_gap(x, found[2]) for x in found[:2]],
    }  # fmt: skip


@torch.no_grad()
def rollout(trainer, twin, exact):
    """The same for the log-probabilities of sampled tokens; PEFT's and the exact ones are of whole sequences."""
    actor = trainer.model.eval()
    prompts = torch.randint(4, 40, (3, PROMPT), generator=torch.Generator().manual_seed(2))
    noise = torch.rand(3, RESPONSE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with trainer.accelerator.autocast():
        out = actor.sample(prompts, torch.ones_like(prompts), noise, stop_ids=[], pad_token_id=0)
        ids = torch.cat([prompts, out.tokens], 1)
        pefts = response_logprobs(twin.eval(), ids)
    expected = response_logprobs(exact.eval(), ids)
    return {"sampled": [gap(x, expected) for x in (out.logprobs, pefts)]}


def trained(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(p.isfinite().all() for p in after.values())
    return {name: gap(after[name], before[name]) for name in before}


def policy(base, precision, folder):
    kind, dtype = BASES[base]
    config = make_config(
        folder / "ppo", max_steps=2, num_mini_batches=1, num_ppo_epochs=1, gradient_accumulation_steps=1,
        per_device_train_batch_size=4, response_length=RESPONSE, model_init_kwargs={"dtype": DTYPES[dtype]},
    )  # fmt: skip
    trainer = PPOTrainer(
        str(folder), count_e, config, make_prompts(8), processing_class=make_tokenizer(),
        quantization_config=kind and quantization(kind, precision), peft_config=lora(r=2),
    )  # fmt: skip
    run_on_cuda_by(trainer, precision)
    move_adapters(trainer.model.policy)
    twins = plain_twin(trainer.model.policy), exact_twin(trainer.model.policy)
    found = learning(trainer, *twins) | rollout(trainer, *twins)
    moved = trained(trainer)
    rows = [row for row in trainer.state.log_history if "ppo/initial_ratio_error" in row]
    found["moved"] = min(moved.values())
    found["first ratio"] = max(row["ppo/initial_ratio_error"] for row in rows)
    return found


def reward_model(base, precision, folder):
    kind, dtype = BASES[base]
    pairs = Dataset.from_dict({"chosen": ["he sees the sea"] * 8, "rejected": ["a bad plot"] * 8})
    args = RewardConfig(
        output_dir=str(folder / "reward"), per_device_train_batch_size=2, max_steps=2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
        model_init_kwargs={"dtype": DTYPES[dtype]}, learning_rate=1e-2,
    )  # fmt: skip
    trainer = RewardTrainer(
        str(folder), args, peft_config=lora(r=2), train_dataset=pairs, processing_class=make_tokenizer(),
        quantization_config=kind and quantization(kind, precision),
    )  # fmt: skip
    run_on_cuda_by(trainer, precision)
    move_adapters(trainer.model)
    head = trainer.model.get_base_model().score
    nn.init.normal_(head.modules_to_save["default"].weight, std=0.3)
    twin, exact = plain_twin(trainer.model), exact_twin(trainer.model)
    if precision == "off":  # PEFT's fp32 head meets hidden states of another dtype, and does not run
        twin.get_base_model().score.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    # Of a few scores the largest error is that of one number that int8 rounds the other way.
    ids = torch.randint(4, 40, (32, 9), generator=torch.Generator().manual_seed(4))
    scores, found = [], []
    for model, context in (
        (trainer.model, trainer.accelerator.autocast()), (twin, trainer.accelerator.autocast()),
        (exact, contextlib.nullcontext()),
    ):  # fmt: skip
        with context:
            scores.append(model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits)
        (scores[-1].float().squeeze(-1) * torch.tensor([1.0, -1.0, 0.5, 2.0]).repeat(8)).sum().backward()
        found.append(gradients(model))
    found = {
        "scores": [gap(x, scores[2]) for x in scores[:2]], "fp32 scores": scores[0].dtype == torch.float32,
        "score gradients": [gradient_gap(x, found[2]) for x in found[:2]],
    }  # fmt: skip
    return found | {"reward model moved": min(trained(trainer).values())}


def run_matrix(family, work):
    torch.set_num_threads(1)
    cuda_autocast.set_up("cpu")
    from ppo_plus.kernels import cpu_attention as attention
    from ppo_plus.kernels import lora, packing

    attention.prefer_eager = packing.prefer_eager = lambda *_: False  # as on CUDA
    lora.MAX_FP32_ROWS = 0
    found = {}
    for base in BASES:
        folder = work / f"{family} {base}".replace(" ", "-")
        save_base(family, BASES[base][1], folder)
        for precision in AUTOCAST:
            cell = found[f"{base}, {precision}"] = {}
            for part in (policy, reward_model):
                try:
                    cell |= part(base, precision, folder)
                except Exception as error:
                    cell[f"{part.__name__} error"] = f"{type(error).__name__}: {error}"
    return found


def own_process(*arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


MEASURES = ("logprobs", "gradients", "sampled", "scores", "score gradients")


@pytest.mark.slow  # about a minute of one core for each family
@pytest.mark.parametrize("family", FAMILIES)
def test_every_base_in_every_precision_is_as_near_to_exact_numbers_as_peft(family):
    found = own_process(family)
    assert found.keys() == {f"{base}, {precision}" for base in BASES for precision in AUTOCAST}
    assert {name: [text for key, text in cell.items() if "error" in key] for name, cell in found.items()} == {
        name: [] for name in found
    }
    for name, cell in found.items():
        for measure in MEASURES:
            ours, pefts = cell[measure][:2]
            assert ours <= 4 * pefts + 2e-4, (name, measure)
        # Negative control: a layer that left the adapter out, or an unrelated gradient, would be far off.
        assert cell["logprobs"][0] < 0.05 * cell["logprobs"][2] and cell["gradients"][0] < 0.5, name
        assert cell["fp32 scores"] and cell["moved"] > 1e-3 and cell["reward model moved"] > 1e-3, name
        # On a CPU bitsandbytes multiplies by LLM.int8 weights in one way while training and in another otherwise.
        assert cell["first ratio"] <= (5e-2 if name.startswith("int8") else 0.0), name
    for measure in MEASURES:
        errors = [cell[measure][:2] for cell in found.values() if cell[measure][1] > 1e-4]
        ratio = math.exp(sum(math.log(ours / pefts) for ours, pefts in errors) / len(errors))
        assert ratio < 1.35, measure


def test_the_lists_are_those_of_cudas_documentation():
    """pytorch.org, "Automatic Mixed Precision", "CUDA Op-Specific Behavior"; what a CPU does otherwise is marked."""
    found = own_process("rules")
    bf16, fp32 = "torch.bfloat16", "torch.float32"
    assert found["on CUDA"] == {
        "linear": bf16, "matmul": bf16, "mm": bf16, "addmm": bf16, "bmm": bf16, "sdpa": bf16, "layer_norm": fp32,
        "softmax": fp32, "softmax to bf16": bf16, "log_softmax": fp32, "sum": fp32, "cumsum": fp32, "exp": fp32,
        "pow": fp32, "rsqrt": fp32, "norm": fp32, "cross_entropy": fp32, "gelu": bf16, "silu": bf16,
        "add of both": fp32, "addcmul of both": fp32, "cat of both": fp32, "off": bf16,
        "addmm into a tensor": "two dtypes", "addmm_ in place": "two dtypes",
    }  # fmt: skip
    differs = {name for name, dtype in found["on a CPU"].items() if dtype != found["on CUDA"][name]}
    assert differs == {
        "layer_norm", "softmax", "log_softmax", "sum", "cumsum", "exp", "pow", "rsqrt", "norm",
    }  # fmt: skip


def rules():
    wide, low = torch.rand(4, 4), torch.rand(4, 4).bfloat16()

    def dtypes():
        def refused(operation):
            try:
                return operation().dtype
            except RuntimeError as error:
                return "two dtypes" if "same dtype" in str(error) else str(error)

        with torch.autocast("cpu", torch.bfloat16):
            found = {
                "linear": nn.functional.linear(wide, wide), "matmul": wide @ wide, "mm": wide.mm(low),
                "addmm": torch.addmm(wide, low, wide), "bmm": wide[None].bmm(wide[None]),
                "sdpa": nn.functional.scaled_dot_product_attention(wide[None], wide[None], wide[None]),
                "layer_norm": nn.functional.layer_norm(low, (4,)), "softmax": low.softmax(-1),
                "softmax to bf16": low.softmax(-1, dtype=torch.bfloat16), "log_softmax": low.log_softmax(-1),
                "sum": low.sum(-1), "cumsum": low.cumsum(-1), "exp": low.exp(), "pow": low.pow(2),
                "rsqrt": low.rsqrt(), "norm": low.norm(dim=-1),
                "cross_entropy": nn.functional.cross_entropy(low, torch.arange(4)),
                "gelu": nn.functional.gelu(low), "silu": nn.functional.silu(low), "add of both": wide + low,
                "addcmul of both": torch.addcmul(low, wide, low), "cat of both": torch.cat([wide, low]),
            }  # fmt: skip
            found = {name: str(tensor.dtype) for name, tensor in found.items()}
            found["addmm into a tensor"] = refused(lambda: torch.addmm(wide, low, wide, out=torch.empty(4, 4)))
            found["addmm_ in place"] = refused(lambda: wide.clone().addmm_(low, wide))
        return found | {"off": str(nn.functional.layer_norm(low, (4,)).dtype)}

    on_cpu = dtypes()
    cuda_autocast.set_up("cpu")
    return {"on a CPU": on_cpu, "on CUDA": dtypes()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        asked = sys.argv[1]
        result = rules() if asked == "rules" else run_matrix(asked, Path(temporary))
    print("\n" + json.dumps(result))
