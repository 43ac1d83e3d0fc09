"""RMSNorm with a written-out backward pass: the same norm to the bit, the same gradient, less kept."""

from __future__ import annotations

import pytest
import torch
from conftest import lora, make_model
from peft import get_peft_model
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ppo_plus.kernels.rmsnorm import patch_rmsnorm

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip


def norm(dtype, lean: bool) -> nn.Module:
    module = LlamaRMSNorm(16, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.linspace(-1.3, 2.1, 16))
    if lean:
        patch_rmsnorm(module)
        assert "forward" in vars(module)
    return module


def states(dtype) -> torch.Tensor:
    return (torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * 4).to(dtype).requires_grad_()


def output_and_gradient(module, dtype):
    x = states(dtype)
    out = module(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_same_to_the_bit_and_the_gradient_rounds_like_it(dtype):
    found, gradient = output_and_gradient(norm(dtype, True), dtype)
    expected, expected_gradient = output_and_gradient(norm(dtype, False), dtype)
    assert torch.equal(found, expected)
    assert gradient.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def test_a_weight_that_is_wider_than_what_it_scales_widens_it():
    """As fp32 norms of a base in half precision do."""
    found, gradient = output_and_gradient(norm(torch.float32, True), torch.bfloat16)
    expected, expected_gradient = output_and_gradient(norm(torch.float32, False), torch.bfloat16)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert gradient.dtype == torch.bfloat16
    tolerance = 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def test_gradient_is_the_slope_of_the_formula():
    x = states(torch.float32)
    weight, eps = torch.linspace(-1.3, 2.1, 16, dtype=torch.float64), 1e-5

    def formula(row: torch.Tensor) -> torch.Tensor:
        return weight * row / (row.pow(2).sum(-1, keepdim=True) / 16 + eps).sqrt()

    upstream = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    step, found = 1e-6, output_and_gradient(norm(torch.float32, True), torch.float32)[1]
    wide = x.detach().double()
    for i in range(16):
        nudge = torch.zeros(16, dtype=torch.float64)
        nudge[i] = step
        slope = (formula(wide + nudge) - formula(wide - nudge)) / (2 * step)
        torch.testing.assert_close(found[..., i].double(), (slope * upstream).sum(-1), rtol=1e-4, atol=1e-5)


def test_less_is_kept_for_the_backward_pass():
    def kept(module) -> int:
        seen: dict[int, int] = {}

        def note(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = states(torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = module(x)
        assert out.requires_grad
        return sum(seen.values())

    assert kept(norm(torch.bfloat16, True)) < 0.7 * kept(norm(torch.bfloat16, False))


def test_a_norm_that_is_trained_keeps_its_own_code_and_gets_its_gradient():
    lean, own = norm(torch.float32, True), norm(torch.float32, False)
    for module in (lean, own):
        module.weight.requires_grad_(True)
        output_and_gradient(module, torch.float32)
    assert torch.equal(lean.weight.grad, own.weight.grad)


def lean_norms(model) -> set[str]:
    patch_rmsnorm(model)
    return {name for name, module in model.named_modules() if "RMSNorm" in type(module).__name__
            and "forward" in vars(module)}  # fmt: skip


def test_every_norm_of_an_architecture_with_plain_ones():
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).bfloat16()
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Qwen3RMSNorm"}
    assert lean_norms(model) == names and any(name.endswith("q_norm") for name in names)


def test_a_norm_of_another_formula_stays_as_it_is():
    model = GemmaForCausalLM(GemmaConfig(**SIZES))  # scales by 1 + weight
    assert lean_norms(model) == set()


def test_a_model_without_data_gets_them_too():
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).bfloat16()
        other = GemmaForCausalLM(GemmaConfig(**SIZES)).bfloat16()
    assert len(lean_norms(model)) == 9 and lean_norms(other) == set()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_one_that_multiplies_before_it_rounds_stays_as_it_is_also_where_all_its_weights_are_one():
    class LateRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            wide = x.float()
            return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)

    assert lean_norms(nn.Sequential(LateRMSNorm(64).bfloat16())) == set()


def test_a_model_computes_and_learns_the_same():
    found = {}
    for lean in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), lora())
        if lean:
            assert len(lean_norms(model)) == 5
        logits = model(torch.arange(4, 31).view(3, 9)).logits
        logits.pow(2).mean().backward()
        found[lean] = logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.equal(found[True][0], found[False][0])
    assert len(found[True][1]) > 0
    for gradient, expected in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
