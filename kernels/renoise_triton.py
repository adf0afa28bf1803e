"""Triton form of local renoising: blend and noise scaling in one pass. The noise itself comes from the caller."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _renoise(x, x0, eps, mask, out, a, b, channels, pixels, BLOCK: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)  # sample and channel
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    place = plane * pixels + pixel
    wanted = inside & (tl.load(mask + plane // channels * pixels + pixel, mask=inside, other=0) != 0)
    fresh = a * tl.load(x0 + place, mask=wanted, other=0.0).to(tl.float32)
    fresh += b * tl.load(eps + place, mask=wanted, other=0.0).to(tl.float32)
    kept = tl.load(x + place, mask=inside, other=0.0)
    tl.store(out + place, tl.where(wanted, fresh.to(kept.dtype), kept), mask=inside)


def renoise(
    x: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, mask: torch.Tensor, a: float, b: float
) -> torch.Tensor:
    x, x0, eps = x.contiguous(), x0.contiguous(), eps.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty_like(x)
    bytes_ = mask.contiguous().view(torch.uint8)
    grid = (batch * channels, triton.cdiv(height * width, BLOCK))
    _renoise[grid](x, x0, eps, bytes_, out, a, b, channels, height * width, BLOCK=BLOCK)
    return out
