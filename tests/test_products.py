"""Half the columns at a time give the whole product, and are asked for only where one core would idle."""

from __future__ import annotations

import pytest
import torch

from ppo_plus import products
from ppo_plus.products import in_halves, product

SHAPES = [(600, 512, 576), (1000, 576, 576), (1151, 1536, 576), (130, 520, 66), (70, 512, 67)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def drawn(rows, summed, columns, dtype):
    torch.manual_seed(0)
    return (torch.randn(*shape).to(dtype) for shape in ((rows, summed), (summed, columns), (columns,)))


def by_halves_and_whole(monkeypatch, x, weight, bias):
    for halves in (True, False):
        monkeypatch.setattr(products, "in_halves", lambda x, columns, halves=halves: halves)
        yield product(x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves_are_the_product(monkeypatch, shape, transposed, biased, dtype):
    x, weight, bias = drawn(*shape, dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    halves, whole = by_halves_and_whole(monkeypatch, x, weight, bias if biased else None)
    exact = x.double() @ weight.double() + (bias.double() if biased else 0)
    eps = torch.finfo(dtype).eps
    assert halves.is_contiguous() and halves.dtype == dtype
    for found in (halves, whole):
        assert ((found - exact).abs() <= eps * exact.abs() + 1e-6 * shape[1]).all()  # sums are in fp32
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        assert torch.equal(halves, whole)


def test_both_halves_are_written(monkeypatch):
    """Negative control: with one half left out, what is there before shows."""
    x, weight, _ = drawn(600, 512, 576, torch.bfloat16)
    monkeypatch.setattr(products, "in_halves", lambda x, columns: True)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
    assert product(x, weight).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "dtype", "threads", "expected"),
    [((576, 512, 576), torch.bfloat16, 2, True), ((1151, 1536, 576), torch.bfloat16, 2, True),
     ((575, 512, 576), torch.bfloat16, 2, False), ((1152, 1536, 576), torch.bfloat16, 2, False),
     ((1152, 1536, 1023), torch.bfloat16, 2, True), ((1152, 1536, 1024), torch.bfloat16, 2, False),
     ((600, 511, 576), torch.bfloat16, 2, False), ((600, 512, 576), torch.float32, 2, False),
     ((600, 512, 576), torch.bfloat16, 1, False), ((600, 512, 576), torch.bfloat16, 3, False)],
    ids=str,
)  # fmt: skip
def test_only_where_one_core_would_idle(monkeypatch, two_threads, shape, dtype, threads, expected):
    torch.set_num_threads(threads)
    monkeypatch.setattr(products, "AMX", True)
    assert in_halves(torch.empty(*shape[:2], dtype=dtype), shape[2]) == expected
    monkeypatch.setattr(products, "AMX", False)
    assert not in_halves(torch.empty(*shape[:2], dtype=dtype), shape[2])


def test_cores_with_amx_are_known():
    assert torch.cpu._is_amx_tile_supported() == products.AMX
