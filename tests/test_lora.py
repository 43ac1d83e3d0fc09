"""The thin LoRA forward pass computes what PEFT's own computes, and steps aside where the adapter is not plain LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import lora, make_model
from peft import get_peft_model

import ppo_plus.kernels.lora as plain
from ppo_plus.kernels.lora import cached_lora_weights, patch_lora_forward


def peft_model(**options):
    torch.manual_seed(0)
    model = get_peft_model(make_model(attention_bias=True), lora(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the adapter
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def outputs_and_gradients(model):
    ids = torch.arange(4, 31).view(3, 9)
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """Which thin product ran, each time one did."""
    counted = []

    def count(kind):
        original = kind.apply
        monkeypatch.setattr(kind, "apply", lambda *a: counted.append(kind) or original(*a))

    count(plain._LoRAAdd)
    count(plain._LoRALinear)
    return counted


def test_outputs_and_gradients_equal_pefts(calls):
    model = peft_model()
    ours = copy.deepcopy(model)
    patch_lora_forward(ours)
    expected, expected_gradients = outputs_and_gradients(model)
    assert not calls
    found, gradients = outputs_and_gradients(ours)
    assert calls == [plain._LoRALinear] * 14  # seven linear layers in each of two blocks
    assert torch.allclose(found, expected, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_that_is_trained_too_gets_its_gradients(calls, part):
    model = peft_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"q_proj.base_layer.{part}" in name or "lora_" in name)
    ours = copy.deepcopy(model)
    patch_lora_forward(ours)
    _, expected = outputs_and_gradients(model)
    calls.clear()
    _, gradients = outputs_and_gradients(ours)
    assert calls.count(plain._LoRAAdd) == 2  # q_proj of two blocks
    assert gradients.keys() == expected.keys() and any("base_layer" in name for name in gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6, rtol=1e-4), name


def test_autocast_goes_through_the_base_layer(calls):
    """The frozen weights are fp32 there, and the product is not."""
    model = peft_model()
    patch_lora_forward(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs_and_gradients(model)
    assert set(calls) == {plain._LoRAAdd}


def test_autocast_to_the_dtype_of_the_weights_changes_neither_way_nor_bit(calls):
    model = peft_model().bfloat16()
    patch_lora_forward(model)
    expected, expected_gradients = outputs_and_gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, gradients = outputs_and_gradients(model)
    assert calls == [plain._LoRALinear] * 28
    assert torch.equal(found, expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected_gradients.items())
    calls.clear()
    with torch.autocast("cpu", dtype=torch.float16):
        outputs_and_gradients(model)
    assert set(calls) == {plain._LoRAAdd}


def test_without_the_adapter_it_would_differ():
    """Negative control: the adapter above is large enough to be seen."""
    model = peft_model()
    expected, _ = outputs_and_gradients(model)
    with model.disable_adapter():
        assert (model(torch.arange(4, 31).view(3, 9)).logits - expected).abs().max() > 0.1


def test_a_switched_off_adapter_is_the_base(calls):
    model = peft_model()
    base = copy.deepcopy(model).unload()
    patch_lora_forward(model)
    ids = torch.arange(4, 31).view(3, 9)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert not calls


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_goes_through_peft(calls, options):
    model = peft_model(**options).train()
    ours = copy.deepcopy(model)
    patch_lora_forward(ours)
    torch.manual_seed(1)
    expected, _ = outputs_and_gradients(model)
    torch.manual_seed(1)
    found, _ = outputs_and_gradients(ours)
    assert torch.equal(found, expected) and not calls


def test_activation_checkpointing_recomputes_the_same_gradients():
    model = peft_model()
    patch_lora_forward(model)
    _, expected = outputs_and_gradients(model)
    model.get_base_model().activation_checkpointing_enable()
    model.train()
    _, found = outputs_and_gradients(model)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-7)


def test_bf16_autocast_keeps_fp32_gradients():
    model = peft_model()
    ours = copy.deepcopy(model)
    patch_lora_forward(ours)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = outputs_and_gradients(ours)
        _, expected = outputs_and_gradients(model)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.999, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_at_rest_are_cast_once_and_change_no_bit(dtype):
    model = peft_model()
    model.get_base_model().to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    patch_lora_forward(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    ids = (torch.arange(plain.MAX_FP32_ROWS + 2) % 27 + 4).view(2, -1)
    with torch.no_grad():
        expected = model(ids).logits
    with cached_lora_weights(model):
        first, kept = model(ids).logits, layer._cached_weights[("default",), dtype][0]
        assert torch.equal(first, expected) and kept[0].dtype == dtype
        assert torch.equal(model(ids).logits, expected) and layer._cached_weights[("default",), dtype][0] is kept
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, expected)
    assert layer._cached_weights is None


@pytest.mark.parametrize("rows", [1, plain.MAX_FP32_ROWS, plain.MAX_FP32_ROWS + 1])
def test_few_rows_are_added_to_in_fp32(rows):
    """As decoding has them; against double precision, over the same output of the base layer."""
    model = peft_model()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    patch_lora_forward(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(rows, 1, layer.in_features).bfloat16()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    added = x.double() @ a.t() @ b.t() * layer.scaling["default"]
    assert added.abs().mean() > 0.01  # there is something to see
    with torch.no_grad():
        exact, moving = layer.base_layer(x).double() + added, layer(x)
    with cached_lora_weights(model):
        resting = layer(x)
    assert resting.dtype == torch.bfloat16 and resting.shape == moving.shape
    if rows > plain.MAX_FP32_ROWS:
        assert torch.equal(resting, moving)
    else:
        # Rounded twice, in the sum and before it, and nothing else.
        assert ((resting - exact).abs() <= 2**-8 * (exact.abs() + added.abs())).all()
        assert not torch.equal(resting, moving)


def test_what_was_cast_is_forgotten_when_weights_move_again():
    model = peft_model()
    patch_lora_forward(model)
    ids = torch.arange(4, 31).view(3, 9)
    with cached_lora_weights(model):
        before = model(ids).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data * 2
    with cached_lora_weights(model):
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)


def test_gradients_flow_again_after_an_error_inside():
    model = peft_model()
    patch_lora_forward(model)
    with pytest.raises(RuntimeError, match="inside"), cached_lora_weights(model):
        raise RuntimeError("inside")
    _, gradients = outputs_and_gradients(model)
    assert len(gradients) == 28
