"""Whatever a CUDA device does otherwise than a CPU: kernels, autocast, copies, generators, memory, processes.

Without a card these tests are skipped. `PPO_PLUS_GPU_TESTS_ON=cpu` runs on the CPU all that a CPU has, to test the
tests. `PPO_PLUS_CARD_GB=12` caps the allocator as a card of 12 GB would. Expected numbers come from the CPU in fp32, or
from plain transformers and PEFT on the same device.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import LETTERS, lora, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_resume import make_value_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    TrainerCallback,
)

from ppo_plus import ActorCritic, PPOCallback, RewardConfig, RewardTrainer, ValueHead
from ppo_plus.kernels.packing import NO_PACKING
from ppo_plus.models.logprobs import chunked_logprobs, sample
from ppo_plus.rollout.buffer import LeftPaddedLayout

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
ON = os.environ.get("PPO_PLUS_GPU_TESTS_ON", "cuda")
TEMPERATURE = 0.7
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19, 20]]
ANSWERS = [[21, 22, 2], [23, 24, 25, 26, 27, 28, 29, 30, 31, 2], [32, 33, 34, 35, 36], [37, 38, 39, 40, 41, 4, 5, 6]]
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="session", autouse=True)
def card():
    """Cap the allocator at the card that PPO_PLUS_CARD_GB names."""
    if "PPO_PLUS_CARD_GB" in os.environ and torch.cuda.is_available():
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from _utils import cap_memory

        cap_memory(float(os.environ["PPO_PLUS_CARD_GB"]))


@pytest.fixture
def device():
    """The device under test; skips the test where there is none."""
    if ON == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; PPO_PLUS_GPU_TESTS_ON=cpu runs what a CPU has")
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()


@pytest.fixture
def cuda(device):
    """A CUDA device; skips on a CPU, which has nothing of the kind."""
    if device.type != "cuda":
        pytest.skip("a CPU has nothing of the kind")
    return device


def trainer_on(device, folder, *, config=None, **arguments):
    """The tiny trainer of conftest on a device, in fp32."""
    on_cuda = device.type == "cuda"
    defaults = {"use_cpu": not on_cuda, "dataloader_pin_memory": on_cuda, "bf16": False, "learning_rate": 1e-3}
    return make_trainer(folder, config={**defaults, "value_head_learning_rate": 1e-3, **(config or {})}, **arguments)


def small_model(family, dtype=torch.float32):
    """Return a random model of two layers, whose norms are RMSNorm (Llama) or LayerNorm (GPT-NeoX)."""
    if family == "RMSNorm":
        return make_model(**WIDE).to(dtype)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=4 + len(LETTERS), num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, initializer_range=0.1, **WIDE,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).to(dtype)


def adapted(model, seed=2):
    """Return a PEFT model whose LoRA changes the numbers."""
    policy = get_peft_model(model, lora())
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for p in policy.parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return policy


def saved_model(folder, family="RMSNorm", dtype=torch.float32):
    """Save a small model and its tokenizer; returns the folder's name."""
    small_model(family, dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def actor_on(device, policy):
    """Return an actor-critic on the device, evaluating."""
    return ActorCritic(policy, ValueHead(policy.config.hidden_size)).to(device).eval()


def trained_weights(trainer):
    return {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def gap(found, expected):
    """Largest distance between two sets of weights."""
    assert found.keys() == expected.keys() and found
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def columns(layout):
    """Prompts and answers as columns of a rollout: input ids, attention mask, response length."""
    prompts, answers = PROMPTS, ANSWERS
    if layout == "equal lengths":
        prompts, answers = [row * 7 for row in PROMPTS], [row * 8 for row in ANSWERS]
        prompts, answers = [row[:7] for row in prompts], [row[:8] for row in answers]
    elif layout == "left padding":
        answers = [(row * 8)[:8] for row in ANSWERS]
    left, right = max(map(len, prompts)), max(map(len, answers))
    rows = list(zip(prompts, answers, strict=True))
    ids = [[0] * (left - len(p)) + p + a + [0] * (right - len(a)) for p, a in rows]
    mask = [[0] * (left - len(p)) + [1] * (len(p) + len(a)) + [0] * (right - len(a)) for p, a in rows]
    return torch.tensor(ids), torch.tensor(mask), right, rows


def our_logprobs(actor, device, layout):
    """Log-probabilities of the answers by one pass, and those answers, `(tokens,)`."""
    ids, mask, length, rows = columns(layout)
    aligned = LeftPaddedLayout.from_attention_mask(mask, length)
    sizes = aligned.seq_lens if layout == "packed" else None
    ids, mask = (aligned.align_tokens(x).to(device) for x in (ids, mask))
    asked = aligned.response_mask.to(device)
    packing = actor._packing(mask[:, :-1], None if sizes is None else [tokens - 1 for tokens, _ in sizes])
    assert (packing is not NO_PACKING) == (layout == "packed")
    out = actor(ids, mask, aligned.max_response_len, TEMPERATURE, response_mask=asked, seq_lens=sizes)
    return out.logprobs[asked], rows


def plain_logprobs(model, device, rows):
    """The oracle: a plain model on one row after the other, none of which has padding; softmax in float64."""
    found = []
    for prompt, answer in rows:
        logits = model(input_ids=torch.tensor([prompt + answer], device=device), use_cache=False).logits[0]
        logprobs = (logits.double() / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logprobs[range(len(answer)), answer])
    return torch.cat(found)


# Attention masks and kernels, in fp32


@pytest.mark.parametrize("layout", ["left padding", "equal lengths", "packed"])
@pytest.mark.parametrize("family", ["RMSNorm", "LayerNorm"])
def test_a_pass_has_the_log_probabilities_and_gradients_of_the_plain_model(device, family, layout):
    plain = adapted(small_model(family))
    actor = actor_on(device, adapted(small_model(family)))
    found, rows = our_logprobs(actor, device, layout)
    expected = plain_logprobs(plain, "cpu", rows)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    expected.sum().backward()
    ours, theirs = (
        {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None} for model in (actor.policy, plain)
    )
    assert ours.keys() == theirs.keys() and max(g.abs().max() for g in theirs.values()) > 0.1
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-3, msg=name)


def test_rows_of_equal_length_need_no_mask(cuda):
    """The flash kernel takes none, so a pass that had one would find no kernel here."""
    actor = actor_on(cuda, adapted(small_model("RMSNorm", torch.bfloat16)))
    only_flash = torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION])
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), only_flash:
        our_logprobs(actor, cuda, "equal lengths")
        with pytest.raises(RuntimeError, match="kernel"):  # negative control
            our_logprobs(actor, cuda, "left padding")


def test_a_packed_pass_asks_the_device_for_no_number(cuda):
    """Each question would wait for all that the device has still to do."""
    actor = actor_on(cuda, adapted(small_model("RMSNorm")))
    ids, mask, length, _ = columns("packed")
    aligned = LeftPaddedLayout.from_attention_mask(mask, length)
    ids, mask = (aligned.align_tokens(x).to(cuda) for x in (ids, mask))
    asked = aligned.response_mask.to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actor(ids, mask, aligned.max_response_len, TEMPERATURE, response_mask=asked, seq_lens=aligned.seq_lens)
        with pytest.raises(RuntimeError):  # negative control
            int(mask.sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["RMSNorm", "LayerNorm"])
def test_greedy_sampling_gives_the_tokens_of_generate(device, family):
    policy = adapted(small_model(family))
    actor = actor_on(device, policy)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS], device=device)

    def keep_the_likeliest(logits):
        return torch.where(logits == logits.amax(-1, keepdim=True), 0.0, -torch.inf)

    noise = torch.full((len(PROMPTS), 12), 0.5, dtype=torch.float64)
    with torch.no_grad():
        found = actor.sample(
            ids, mask, noise, stop_ids=[41], pad_token_id=0, logits_processor=keep_the_likeliest
        ).tokens
    for prompt, answer in zip(PROMPTS, found.cpu().tolist(), strict=True):
        expected = policy.generate(
            input_ids=torch.tensor([prompt], device=device), attention_mask=torch.ones(1, len(prompt), device=device),
            do_sample=False, max_new_tokens=12, eos_token_id=41, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == expected + [0] * (12 - len(expected))


@pytest.mark.parametrize("deterministic", [False, True])
def test_sampling_takes_the_token_that_the_noise_falls_on(device, deterministic):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 5000, generator=generator) * 3
    noise = torch.rand(256, generator=generator, dtype=torch.float64)
    expected = (logits.double().softmax(-1).cumsum(-1) <= noise[:, None]).sum(-1).clamp(max=4999)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = sample(logits.to(device), noise.to(device)).cpu()
    finally:
        torch.use_deterministic_algorithms(before)
    # Probabilities are fp32: the border between two tokens may lie on either side of a noise that is close to it.
    assert (found != expected).sum() <= 1 and (found - expected).abs().max() <= 1


@pytest.mark.parametrize("frozen_head", [True, False])
def test_chunks_of_logits_give_what_all_logits_give(device, frozen_head):
    torch.manual_seed(0)
    vocabulary = 20_000 if device.type == "cuda" else 2_000  # 18 M logits: two chunks
    head = nn.Linear(32, vocabulary, bias=False).requires_grad_(not frozen_head)
    hidden = torch.randn(2, 450, 32) * 3
    targets = torch.randint(0, vocabulary, (2, 450))
    weights = torch.randn(2, 450)

    def run(where, dtype, score):
        states = hidden.detach().clone().to(where, dtype).requires_grad_()
        logprobs, entropy = score(copy.deepcopy(head).to(where, dtype), states, targets.to(where))
        ((logprobs + 0.1 * entropy) * weights.to(where)).sum().backward()
        return [x.detach().cpu().double() for x in (logprobs, entropy, states.grad)]

    def all_at_once(layer, states, tokens):
        logprobs = (layer(states) / TEMPERATURE).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, tokens[..., None]).squeeze(-1), entropy

    found = run(device, torch.float32, lambda *x: chunked_logprobs(*x, TEMPERATURE, True, frozen_head=frozen_head))
    expected = run("cpu", torch.float64, all_at_once)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Autocast, 4 and 8 bits

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
BASES = ["fp32", "bf16", "nf4", "int8"]


def quantization(base, compute=torch.float32):
    if base == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return BitsAndBytesConfig(load_in_8bit=True) if base == "int8" else None


@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["RMSNorm", "LayerNorm"])
def test_autocast_is_as_exact_as_that_of_plain_peft(device, family, dtype, autocast):
    half = torch.float16 if dtype != torch.float32 and autocast == "fp16" else dtype
    policy = adapted(small_model(family, half))
    exact = adapted(small_model(family, half).float())
    plain, actor = copy.deepcopy(policy).to(device), actor_on(device, policy)
    with torch.no_grad():
        with torch.autocast(device.type, AUTOCAST[autocast]):
            found, rows = our_logprobs(actor, device, "packed")
            theirs = plain_logprobs(plain, device, rows)
        expected = plain_logprobs(exact, "cpu", rows)
    ours, allowed = ((x.cpu().double() - expected).abs().mean() for x in (found, theirs))
    assert ours < 2 * allowed + 1e-3 and ours < 0.1


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["RMSNorm", "LayerNorm"])
def test_quantized_scoring_is_that_of_the_plain_model_with_its_dequantized_weights(device, tmp_path, family, base):
    folder = saved_model(tmp_path, family)

    def load():
        config = quantization(base)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device})

    exact = adapted(load().dequantize().float().cpu())
    actor = actor_on(device, adapted(load()))
    with torch.no_grad():
        found, rows = our_logprobs(actor, device, "packed")
        expected = plain_logprobs(exact, "cpu", rows)
    off = (found.cpu().double() - expected).abs()
    # int8 rounds activations too (LLM.int8, arXiv 2208.07339); NF4 multiplies by the dequantized weights.
    assert off.mean() < (0.1 if base == "int8" else 5e-3)


class KeepLogs(PPOCallback):
    """Keep every logged row."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


@pytest.mark.parametrize("autocast", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", ["RMSNorm", "LayerNorm"])
def test_every_base_is_trained_under_every_autocast(device, tmp_path, family, base, autocast):
    """From an fp32 checkpoint, as gpt2's is, unless the base is bf16; decoding and scoring agree, and so do passes."""
    if autocast == "fp16" and device.type == "cpu":
        pytest.skip("accelerate has no fp16 on a CPU")
    folder = saved_model(tmp_path / "base", family, torch.bfloat16 if base == "bf16" else torch.float32)
    compute = AUTOCAST.get(autocast, torch.float32)
    logs = KeepLogs()
    trainer = trainer_on(
        device, tmp_path, model=folder, quantization_config=quantization(base, compute), callbacks=[logs],
        config={"bf16": autocast == "bf16", "fp16": autocast == "fp16", "max_steps": 4, "kl_coef": 0.1},
    )  # fmt: skip
    before = trained_weights(trainer)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(frozen[n], p) for n, p in trainer.model.named_parameters() if n in frozen)
    assert gap(trained_weights(trainer), before) > 1e-4
    (collected,) = [row for row in logs.rows if "sampling/logp_difference" in row]
    exact = base in ("fp32", "nf4") and autocast == "off"
    assert collected["sampling/logp_difference"] < (1e-3 if exact else 0.1)
    assert collected["ppo/initial_ratio_error"] < (1e-3 if exact else 0.1)
    assert all(math.isfinite(row["loss"]) for row in logs.rows if "loss" in row)


def test_heads_of_the_critic_and_of_reward_models_are_exact_under_autocast(device):
    """In bf16 a value of 3.01 would be 3.0156."""
    head = ValueHead(64).to(device)
    nn.init.normal_(head.layers[0].weight)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        found = head(states.to(device))
    expected = states.double() @ head.layers[0].weight.detach().cpu().double()[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


class Spoil(TrainerCallback):
    """Record weights and the scale of the loss at each step; `poisoned` says at which one the loss is infinite."""

    def __init__(self, poisoned):
        self.poisoned, self.weights, self.scales = poisoned, [], []

    def watch(self, trainer):
        self.trainer, compute = trainer, trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: (
            compute(*a, **k) * (math.inf if trainer.state.global_step == self.poisoned else 1.0)
        )

    def on_step_begin(self, *args, **kwargs):
        self.weights.append(trained_weights(self.trainer))
        self.scales.append(self.trainer.accelerator.scaler.get_scale())


def test_a_step_that_overflows_in_fp16_is_skipped_and_the_scale_falls(cuda, tmp_path):
    spoil = Spoil(poisoned=5)
    trainer = trainer_on(
        cuda, tmp_path, model=saved_model(tmp_path / "base", dtype=torch.float16), callbacks=[spoil],
        config={"fp16": True, "max_steps": 8},
    )  # fmt: skip
    spoil.watch(trainer)
    trainer.train()
    spoil.on_step_begin()
    assert trainer.state.global_step == 8
    assert gap(spoil.weights[6], spoil.weights[5]) == 0
    assert spoil.scales[6] == spoil.scales[5] / 2
    assert gap(spoil.weights[8], spoil.weights[6]) > 0


# Copies, generators, placement


def test_copies_that_are_not_waited_for_are_whole(cuda, tmp_path):
    trainer = trainer_on(cuda, tmp_path)
    work = torch.randn(4096, 4096, device=cuda)
    for seed in range(10):
        source = torch.randint(0, 2**30, (1024, 1024), generator=torch.Generator().manual_seed(seed))
        expected = source.clone()
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)  # so that the device has still to do when the copy is asked for
        found = trainer._prepare_inputs({"rows": source, "sizes": [(1, 2)]})
        source.fill_(-1)
        torch.empty(1024, 1024, dtype=torch.int64).pin_memory().fill_(-2)  # might be given the same pinned memory
        assert found["rows"].device == cuda and found["sizes"] == [(1, 2)]
        assert torch.equal(found["rows"].cpu(), expected)


def test_frozen_layers_that_are_cached_change_no_number(device, tmp_path):
    top = lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[3])
    runs = {}
    for cached in (True, False):
        trainer = trainer_on(
            device, tmp_path / str(cached), model=make_model(num_hidden_layers=4), peft_config=top,
            config={"cache_frozen_layers": cached, "max_steps": 4},
        )  # fmt: skip
        assert bool(trainer.model.num_cached_layers) == cached
        before = trained_weights(trainer)
        trainer.train()
        runs[cached] = trained_weights(trainer)
        states = trainer._progress.rollout.frozen_hidden_states
        assert states is None if not cached else states.device.type == "cpu"  # the card keeps none of a whole rollout
    assert gap(runs[True], before) > 1e-3
    assert gap(runs[True], runs[False]) < 1e-4


def test_a_rollout_is_learned_from_as_on_the_cpu(device, tmp_path):
    """Prompts, sampled tokens, advantages and four steps: the whole of it in fp32."""
    runs = [trainer_on(where, tmp_path, config={"max_steps": 4}) for where in (torch.device("cpu"), device)]
    for trainer in runs:
        trainer.train()
    expected, found = (trainer._progress.rollout for trainer in runs)
    assert torch.equal(found.input_ids, expected.input_ids)
    torch.testing.assert_close(found.advantages, expected.advantages, rtol=1e-3, atol=1e-3)
    assert gap(*(trained_weights(trainer) for trainer in runs)) < 1e-4


def generator_states(device):
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def test_evaluation_leaves_the_generators_as_they_are(device, tmp_path):
    trainer = trainer_on(device, tmp_path, eval_dataset=make_prompts(4), peft_config=lora(lora_dropout=0.1))
    before = generator_states(device)
    trainer.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(generator_states(device), before, strict=True))
    torch.rand(1, device=device)  # negative control
    assert not all(torch.equal(a, b) for a, b in zip(generator_states(device), before, strict=True))


RESUME = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import lora
from test_gpu import gap, trained_weights, trainer_on

device, steps = torch.device({device!r}), {{"save_strategy": "steps", "save_steps": 1, "full_determinism": True}}

def trained(folder, resume=None):
    trainer = trainer_on(device, folder, peft_config=lora(lora_dropout=0.1), config=steps)
    trainer.train(resume_from_checkpoint=resume)
    return trained_weights(trainer)

whole = trained({folder!r} + "/whole")
print("GAPS", *(gap(trained({folder!r} + f"/from{{step}}", {folder!r} + f"/whole/checkpoint-{{step}}"), whole)
                for step in (3, 4)))
"""


def run_python(*arguments, **environment):
    """Run Python in a process of its own; returns what it printed."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_run_resumes_to_the_same_bits_with_full_determinism(device, tmp_path):
    """Inside a rollout and between two, LoRA dropout on, which draws from the device's own generator."""
    text = {"tests": str(ROOT / "tests"), "folder": str(tmp_path), "device": str(device)}
    printed = run_python("-c", RESUME.format(**text), CUBLAS_WORKSPACE_CONFIG=":16:8")
    assert printed.partition("GAPS")[2].split() == ["0.0", "0.0"]


def test_a_model_that_is_on_the_device_already_is_trained_there(device, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_model(tmp_path / "base"), device_map={"": device})
    trainer = trainer_on(device, tmp_path, model=model, config={"max_steps": 4})
    trainer.train()
    assert {p.device for p in trainer.model.parameters()} == {device}


def test_a_value_model_and_a_reference_are_placed_beside_the_policy(device, tmp_path):
    value_model, reference = make_value_model(), make_model()
    trainer = trainer_on(
        device, tmp_path, peft_config=None, ref_model=reference, value_model=value_model,
        config={"critic": "separate", "max_steps": 4},
    )  # fmt: skip
    before = {n: p.detach().cpu().clone() for n, p in value_model.named_parameters()}
    trainer.train()
    assert {p.device for model in (trainer.model, reference) for p in model.parameters()} == {device}
    assert any(not torch.equal(before[n], p.detach().cpu()) for n, p in trainer.model.value_model.named_parameters())
    assert all(torch.equal(p.cpu(), q) for p, q in zip(reference.parameters(), make_model().parameters(), strict=True))


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_recomputed_activations_give_the_same_weights(device, tmp_path, critic):
    runs = []
    for checkpointing in (False, True):
        config = {"critic": critic, "activation_checkpointing": checkpointing, "max_steps": 4}
        trainer = trainer_on(
            device, tmp_path / str(checkpointing), config={**config, "critic_backbone_learning_rate": 1e-3}
        )
        trainer.train()
        runs.append(trained_weights(trainer))
    assert gap(*runs) < 1e-4


def test_compiled_layers_train_to_the_same_weights(device, tmp_path):
    backend = "inductor" if device.type == "cuda" else "eager"  # the CPU's inductor wants minutes in a C++ compiler
    torch._dynamo.reset()
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        trainer = trainer_on(device, tmp_path / str(len(runs)), config={"max_steps": 4, **compiled})
        before = trained_weights(trainer)
        trainer.train()
        runs.append(trained_weights(trainer))
    torch._dynamo.reset()
    assert gap(runs[0], before) > 1e-3 and gap(*runs) < 1e-4


def test_an_adapter_is_saved_for_plain_peft(device, tmp_path):
    folder = saved_model(tmp_path / "base")
    trainer = trainer_on(device, tmp_path / "out", model=folder, config={"max_steps": 4})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "saved").eval()
    with torch.no_grad():
        found, rows = our_logprobs(trainer.model.eval(), device, "left padding")
        torch.testing.assert_close(found.cpu().double(), plain_logprobs(plain, "cpu", rows), rtol=1e-4, atol=1e-4)


def test_liger_kernels_change_speed_and_no_number(cuda, tmp_path):
    pytest.importorskip("liger_kernel")
    runs = []
    for liger in (False, True):
        trainer = trainer_on(cuda, tmp_path / str(liger), config={"use_liger_kernel": liger, "max_steps": 4})
        before = trained_weights(trainer)
        trainer.train()
        runs.append(trained_weights(trainer))
        patched = [m for m in trainer.model.modules() if "liger" in str(getattr(m.forward, "__module__", "")).lower()]
        assert bool(patched) == liger
    assert gap(runs[0], before) > 1e-3 and gap(*runs) < 1e-3


# Reward models, evaluation, the report


def test_a_reward_model_of_4_bits_scores_in_ppo_as_by_itself(device, tmp_path):
    folder, reward = saved_model(tmp_path / "base"), tmp_path / "reward"
    pairs = Dataset.from_dict({"chosen": ["he sees the sea"] * 16, "rejected": ["a bad plot"] * 16})
    args = RewardConfig(
        output_dir=str(reward), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=device.type == "cpu", bf16=False, disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        folder, args, peft_config=lora(), quantization_config=quantization("nf4"), train_dataset=pairs,
        eval_dataset=pairs, processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0] and json.loads((reward / "reward_model.json").read_text())["accuracy"] == 1
    ppo = trainer_on(
        device, tmp_path, model=folder, reward_funcs=str(reward), quantization_config=quantization("nf4"),
        eval_dataset=make_prompts(6),
    )  # fmt: skip
    samples = ppo.generate_completions()
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, quantization_config=quantization("nf4"), device_map={"": device}
    )
    plain = PeftModel.from_pretrained(base, reward).eval()
    texts = samples.completions
    sequences = [
        make_tokenizer()(f"{prompt}{answer}<eos>", return_tensors="pt")["input_ids"].to(device)
        for prompt, answer in zip(texts.prompts, texts.completions, strict=True)
    ]
    with torch.no_grad():
        expected = [plain(input_ids=ids).logits.item() for ids in sequences]
    torch.testing.assert_close(samples.scores, torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_evaluation_and_report_are_those_of_the_cpu(device, tmp_path):
    found = []
    for where in (torch.device("cpu"), device):
        folder = tmp_path / where.type
        config = {"html_report": True, "max_steps": 4, "eval_win_rate": True}
        trainer = trainer_on(where, folder, eval_dataset=make_prompts(6), config=config)
        metrics = trainer.evaluate()
        found.append({n: v for n, v in metrics.items() if "runtime" not in n and "per_second" not in n})
        trainer.train()
        assert "</html>" in (folder / "report.html").read_text()
    expected, on_device = found
    assert on_device == pytest.approx(expected, rel=1e-3, abs=1e-3) and expected["eval_completions/mean_length"] > 0


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_gpu import trained_weights, trainer_on

trainer = trainer_on(torch.device({device!r}), {folder!r}, config={{"max_steps": 4, "ddp_backend": {backend!r}}})
trainer.train()
trainer.save_model({folder!r} + "/final")
torch.save({{"weights": trained_weights(trainer), "kind": str(trainer.accelerator.distributed_type)}}, {file!r})
trainer.accelerator.end_training()
"""


def test_one_process_of_ddp_trains_what_a_process_by_itself_trains(device, tmp_path):
    """NCCL on a card: parameters are broadcast, gradients averaged, and the rollout's sums reduced by it."""
    script, file = tmp_path / "train.py", tmp_path / "found.pt"
    backend = "nccl" if device.type == "cuda" else "gloo"
    text = {"tests": str(ROOT / "tests"), "folder": str(tmp_path), "device": str(device), "file": str(file)}
    script.write_text(DISTRIBUTED.format(**text, backend=backend))
    run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", script, OMP_NUM_THREADS="1")
    found = torch.load(file)
    alone = trainer_on(device, tmp_path / "alone", config={"max_steps": 4})
    alone.train()
    assert found["kind"].startswith("DistributedType.MULTI")
    assert gap({n.replace("module.", ""): p for n, p in found["weights"].items()}, trained_weights(alone)) < 1e-4


# Memory


def test_memory_does_not_grow_from_rollout_to_rollout(cuda, tmp_path):
    held = []

    class Watch(PPOCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % args.steps_per_rollout == 0:
                held.append(torch.cuda.memory_allocated())

    config = {"max_steps": 32, "missing_eos_penalty": None}
    trainer = trainer_on(cuda, tmp_path, callbacks=[Watch()], config=config, eval_dataset=make_prompts(4))
    trainer.train()
    assert len(held) == 8 and max(held[2:]) - min(held[2:]) < 2**20


def test_a_rollout_that_does_not_fit_is_collected_and_learned_from_in_parts(cuda, tmp_path):
    """The allocator is capped halfway between the weights and what the same run took before."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 512}
    config = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "num_mini_batches": 1,
              "num_ppo_epochs": 1, "response_length": 256, "max_steps": 2, "missing_eos_penalty": None}  # fmt: skip

    def run(folder):
        prompts = Dataset.from_dict({"prompt": ["the film was "] * 128, "wanted": ["e"] * 128})
        trainer = trainer_on(cuda, folder, model=make_model(**sizes), train_dataset=prompts, config=config)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
        trainer.train()
        return trained_weights(trainer), weights, torch.cuda.max_memory_allocated()

    whole, weights, peak = run(tmp_path / "whole")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((weights + (peak - weights) / 2) / total)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            parts, _, _ = run(tmp_path / "parts")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("memory" in str(warning.message).lower() for warning in said)
    assert gap(parts, whole) < 1e-3


def test_the_planner_predicts_what_the_allocator_holds(device):
    """A rollout and an update of 1.5B in NF4 under a cap of 12 GB, in a process of its own; tiny shapes on a CPU."""
    tiny = [] if device.type == "cuda" else ["--tiny"]
    printed = run_python(ROOT / "benchmarks" / "gpu_memory.py", "--child", "qwen2.5-1.5b", "12", *tiny)
    found = json.loads(printed.splitlines()[-1])
    assert found["ran"] and found["planner_says_it_fits"], found
    if device.type == "cuda":
        assert all(abs(error) < 0.15 for error in found["planner_error"].values()), found
