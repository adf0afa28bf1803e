"""The regions that refining redraws, what fills them, and the kernel that scales tokens by a map."""

import pytest
import torch
from artifact_guard.kernels.kv_scale import scale_tokens
from artifact_guard.nodes.fam.flaw_regions import fill_regions, soften
from artifact_guard.nodes.latents import FrameLayout


def test_soft_edges_end():
    """1 inside, falling outside, exactly 0 a few pixels away."""
    maps = torch.zeros(1, 64, 64)
    maps[:, 20:30, 20:30] = 0.7
    soft = soften(maps, 0.5)
    assert (soft[0, 20:30, 20:30] == 1).all() and 0 < soft[0, 25, 31] < 1 and not soft[0, 40:].any()
    assert not soften(maps, 0.8).any()


def test_regions_grow():
    """By 5 % of 64 pixels, 3 on each side."""
    maps = torch.zeros(1, 64, 64)
    maps[:, 20:30, 20:30] = 1
    assert ((soften(maps, 0.5, 0.05) == 1) >= (soften(maps, 0.5) == 1)).all()
    assert (soften(maps, 0.5, 0.05)[0, 17:33, 17:33] == 1).all() and soften(maps, 0.5, 0.05)[0, 16, 16] < 1


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (1, 4, 2, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_regions_are_filled_from_around(shape, dtype):
    """A ramp with a hole comes back as the ramp; the other sample or frame keeps every bit, and so does all outside."""
    ramp = torch.linspace(-1, 1, 32).expand(shape).contiguous().to(dtype)
    regions = torch.zeros(shape[0], 1, *shape[2:])
    regions.flatten(0, -3)[0, 10:18, 8:20] = 0.3
    spoilt = torch.where(regions > 0, torch.full_like(ramp, 5.0), ramp)
    filled = fill_regions(spoilt, regions, FrameLayout.of([shape]))
    assert filled.dtype == dtype and torch.allclose(filled.float(), ramp.float(), atol=0.02)
    outside = (regions == 0).expand(shape)
    assert torch.equal(filled[outside], spoilt[outside])


def test_a_frame_that_is_nearly_all_region_is_not_filled():
    samples, regions = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    regions[..., :6] = 0
    assert torch.equal(fill_regions(samples, regions, FrameLayout.of([samples.shape])), samples)


# The kernel of the attention patch

def scaled_by_hand(x, amount, first, axis):
    factor = torch.ones(x.shape[0], x.shape[axis], dtype=torch.float64)
    factor[:, first : first + amount.shape[1]] += amount.double()
    shape = [len(x)] + [1] * (x.ndim - 1)
    shape[axis] = x.shape[axis]
    return x.double() * factor.view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape, axis", [((2, 9, 5), 1), ((2, 3, 9, 5), 2)])
@pytest.mark.parametrize("first, count", [(0, 9), (0, 4), (3, 6), (2, 5), (9, 0)])
def test_scaled_tokens(dtype, shape, axis, first, count):
    """Against float64, within one rounding; the other tokens bit for bit; strides do not matter."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=random).to(dtype)
    amount = 0.3 * torch.rand(2, count, generator=random)
    result = scale_tokens(x, amount, first, axis)
    exact = scaled_by_hand(x, amount.to(dtype).float(), first, axis)
    assert result.dtype == dtype and result.shape == x.shape
    assert ((result.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-12).all()
    others = torch.tensor([i for i in range(9) if not first <= i < first + count], dtype=torch.long)
    assert torch.equal(result.index_select(axis, others), x.index_select(axis, others))
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(scale_tokens(strided, amount, first, axis), result)


def test_small_amounts_survive_bfloat16():
    """On the average: 1 + 0.003 itself would round to 1."""
    x = torch.randn(1, 200_000, 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    result = scale_tokens(x, torch.full((1, 200_000), 0.003))
    assert (result.double() / x.double()).mean().item() == pytest.approx(1.003, abs=3e-4)


@pytest.mark.parametrize("amount, first", [(torch.ones(2, 10), 0), (torch.ones(2, 5), 5), (torch.ones(3, 5), 0), (torch.ones(2, 1), -1)])
def test_amounts_that_do_not_fit(amount, first):
    with pytest.raises(ValueError, match="does not fit x"):
        scale_tokens(torch.ones(2, 9, 4), amount, first)
