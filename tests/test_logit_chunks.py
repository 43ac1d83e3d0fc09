"""Chunks of vocabulary logits: larger on a GPU than on a CPU, and planned for with the sizes that a GPU uses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import make_model
from transformers import LlamaConfig

from ppo_plus.memory.dry_run import DryRun
from ppo_plus.memory.prediction import PlannerConfig
from ppo_plus.models import logprobs as logits
from ppo_plus.models.logprobs import chunk_elements, chunked_logprobs, row_slices

CPU, GPU = torch.device("cpu"), torch.device("cuda")
VOCABULARY = 152_000


def test_a_gpu_multiplies_some_hundred_tokens_by_the_head_at_a_time():
    assert chunk_elements(GPU, True) // VOCABULARY > 400 > 2 * (chunk_elements(CPU, True) // VOCABULARY)
    assert chunk_elements(GPU, True) * 2 == 128 * 2**20  # bytes in half precision
    assert chunk_elements(CPU, True) == chunk_elements(CPU, False) == 2**24


def test_no_fp32_copy_on_a_gpu_is_larger_than_64_mb():
    """A head that is trained has its chunks whole in fp32."""
    pieces = row_slices(torch.empty(1000, VOCABULARY, device="meta"))
    longest = max(piece.stop - piece.start for piece in pieces)
    assert 2**25 < longest * VOCABULARY * 4 <= 2**26 == chunk_elements(GPU, False) * 4
    assert pieces[0].start == 0 and all(a.stop == b.start for a, b in pairwise(pieces))
    assert pieces[-1].stop >= 1000
    assert len(row_slices(torch.empty(1000, 8))) == 1


@pytest.mark.parametrize("frozen_head", [True, False])
def test_the_device_decides_how_many_chunks_there_are(monkeypatch, frozen_head):
    """On the meta device, which is no CPU; its numbers are counted, not computed."""
    monkeypatch.setattr(logits, "GPU_CHUNK_ELEMENTS", 64 * 50)
    monkeypatch.setattr(logits, "GPU_SLICE_ELEMENTS", 32 * 50)
    chunks = {}
    for device in ("meta", "cpu"):
        head = torch.nn.Linear(8, 50, device=device).requires_grad_(not frozen_head)
        asked = []

        def counted(states, head=head, asked=asked):
            asked.append(len(states))
            return head(states)

        hidden = torch.zeros(2, 64, 8, device=device, requires_grad=True)
        targets = torch.zeros(2, 64, dtype=torch.int64, device=device)
        chunked_logprobs(counted, hidden, targets, 1.0, False, frozen_head=frozen_head)
        chunks[device] = asked[1:]  # the first asks for the size of the vocabulary
    assert chunks == {"meta": [64] * 2 if frozen_head else [32] * 4, "cpu": [128]}


def test_the_planner_counts_the_chunks_of_a_gpu(monkeypatch):
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    setup = PlannerConfig(prompt_length=1, response_length=1000, rollout_batch_size=2, quantization="bf16", lora_r=2)

    def planned():
        return DryRun(config, setup).learn(1).parts["logits"]

    whole_chunk = 334 * VOCABULARY * 2  # 1,000 tokens in three chunks of equal size, bf16
    fp32 = 110 * VOCABULARY * 4
    assert whole_chunk + fp32 < planned() < whole_chunk + 4 * fp32
    as_now = planned()
    monkeypatch.setattr(logits, "GPU_CHUNK_ELEMENTS", 2**24)
    assert planned() < as_now - 100 * 2**20 / 2
    assert logits.CHUNK_ELEMENTS == 2**24 and logits.SLICE_ELEMENTS == 2**20


def test_numbers_do_not_depend_on_the_sizes_of_a_device(monkeypatch):
    model, generator = make_model(), torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, 32, generator=generator)
    targets = torch.randint(0, 42, (2, 40), generator=generator)
    head = model.lm_head.requires_grad_(False)
    expected = (head(hidden).double() / 0.7).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    for elements in (16 * 42, 2**26):
        monkeypatch.setattr(logits, "CHUNK_ELEMENTS", elements)
        found, _ = chunked_logprobs(head, hidden, targets, 0.7, False, frozen_head=True)
        assert (found - expected).abs().max() < 1e-5
