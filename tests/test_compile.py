"""`torch_compile`: the same numbers from compiled decoder layers, and decoding left alone."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import make_model, make_trainer, trained_weights
from torch._dynamo.utils import counters

from ppo_plus.kernels import lora
from ppo_plus.kernels.cpu_attention import EAGER_GQA

# Traces as inductor does, and spares the tests its minutes in a C++ compiler.
BACKEND = "eager"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(tmp_path, *, backend=None, config=None, **overrides):
    compiled = {} if backend is None else {"torch_compile": True, "torch_compile_backend": backend}
    trainer = make_trainer(tmp_path, config={**compiled, **(config or {})}, **overrides)
    trainer.train()
    return trainer


def assert_equal_runs(found, expected):
    torch.testing.assert_close(trained_weights(found), trained_weights(expected), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found.state.log_history, expected.state.log_history, strict=True):
        for name in ("loss", "reward", "kl", "grad_norm"):
            if name in theirs:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-4)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class TestCompiledLayers:
    @pytest.mark.parametrize("config", [{}, {"critic": "adapter"}, {"activation_checkpointing": True}], ids=str)
    def test_train_to_the_same_weights(self, tmp_path, config):
        config = {**config, "max_steps": 2}
        eager = trained(tmp_path / "eager", config=config)
        assert graphs() == 0
        compiled = trained(tmp_path / "compiled", backend=BACKEND, config=config)
        assert graphs() > 0
        assert not counters["graph_break"]
        assert_equal_runs(compiled, eager)
        compiled.save_model(str(tmp_path / "saved"))
        again = make_trainer(tmp_path / "again", config=config)
        again.model.load_weights(tmp_path / "saved")  # under the names of an uncompiled run
        torch.testing.assert_close(trained_weights(again), trained_weights(compiled), rtol=0, atol=0)

    def test_one_graph_serves_all_layers(self, tmp_path):
        def graphs_of(layers: int) -> int:
            torch._dynamo.reset()
            counters.clear()
            config = {"torch_compile": True, "torch_compile_backend": BACKEND}
            model = make_trainer(tmp_path, model=make_model(num_hidden_layers=layers), config=config).model
            ids = torch.arange(4, 31).view(3, 9)
            model(ids, torch.ones_like(ids), 4).logprobs.sum().backward()
            return graphs()

        assert graphs_of(2) == graphs_of(3) > 0

    def test_attention_of_short_half_precision_sequences_is_in_the_graph(self, tmp_path):
        config = {"torch_compile": True, "torch_compile_backend": BACKEND}
        model = make_trainer(tmp_path, model=make_model().to(torch.bfloat16), config=config).model
        ids = torch.arange(4, 31).view(3, 9)
        model(ids, torch.ones_like(ids), 4).logprobs.sum().backward()
        assert model.config._attn_implementation == EAGER_GQA
        assert graphs() > 0
        assert not counters["graph_break"]

    @pytest.mark.parametrize("asks", [False, True], ids=["as it is", "negative control"])
    def test_one_graph_serves_all_lengths(self, tmp_path, monkeypatch, asks):
        """A branch on the number of rows makes a graph that serves some lengths only, so there must be none."""
        affine = lora._affine
        if asks:
            monkeypatch.setattr(lora, "_affine", lambda x, *args: (1 if len(x) < 40 else 1.0) * affine(x, *args))
        config = {"torch_compile": True, "torch_compile_backend": BACKEND}
        model = make_trainer(tmp_path, model=make_model().to(torch.bfloat16), config=config).model
        found = []
        for length in (5, 9, 14, 21, 30):  # times 3 rows, beside 32 and 48 columns
            ids = torch.full((3, length), 7)
            with torch.no_grad():
                model(ids, torch.ones_like(ids), 4)
            found.append(graphs())
        assert (len(set(found)) == 1) != asks

    def test_a_separate_reference_is_compiled_too(self, tmp_path):
        trainer = make_trainer(
            tmp_path, ref_model=make_model(1), config={"torch_compile": True, "torch_compile_backend": BACKEND}
        )
        (reference,) = trainer.model._ref_model
        assert all(layer._compiled_call_impl is not None for layer in reference.model.layers)

    def test_decoding_is_eager(self, tmp_path):
        trainer = make_trainer(tmp_path, config={"torch_compile": True, "torch_compile_backend": BACKEND})
        ids = torch.tensor([[5, 6, 7]])
        noise = torch.rand(1, 6, dtype=torch.float64)
        with torch.no_grad():
            trainer.model.sample(ids, torch.ones_like(ids), noise, stop_ids=[2], pad_token_id=0)
            assert graphs() == 0
            trainer.model(ids, torch.ones_like(ids), 2)  # negative control
            assert graphs() > 0


@pytest.mark.slow  # a minute of a C++ compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPUs")
def test_inductor_gives_the_same_gradients(tmp_path):
    def gradients(folder, **config) -> dict[str, torch.Tensor]:
        model = make_trainer(folder, config=config).model
        ids = torch.arange(4, 31).view(3, 9)
        model(ids, torch.ones_like(ids), 4).logprobs.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(tmp_path / "eager")
    found = gradients(tmp_path / "compiled", torch_compile=True)
    assert graphs() > 0 and found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
