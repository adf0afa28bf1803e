"""Triton form of key and value scaling: both tensors in one launch, the tokens outside copied on the way."""

import torch
import triton
import triton.language as tl

from .kv_scale import check_amount

BLOCK = 1024


@triton.jit
def _scale(x, out, amount, place, token, row, inside, first, count):
    scaled = inside & (token >= first) & (token < first + count)
    value = tl.load(x + place, mask=inside, other=0.0)
    by = tl.load(amount + row * count + token - first, mask=scaled, other=0.0).to(value.dtype).to(tl.float32)
    wide = value.to(tl.float32)
    tl.store(out + place, tl.where(scaled, wide + wide * by, wide).to(value.dtype), mask=inside)


@triton.jit
def _scale_pair(key, value, key_out, value_out, amount, first, count, tokens, heads, channels, elements, BLOCK: tl.constexpr):
    """Elements of one sample: (heads, tokens, channels)."""
    row = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    token = element // channels % tokens
    place = row * elements + element
    _scale(key, key_out, amount, place, token, row, inside, first, count)
    _scale(value, value_out, amount, place, token, row, inside, first, count)


def scale_pair(
    key: torch.Tensor, value: torch.Tensor, amount: torch.Tensor, first: int = 0, axis: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    check_amount(key, amount, first, axis)
    if key.shape != value.shape:
        return tuple(scale_pair(x, x, amount, first, axis)[0] for x in (key, value))
    key, value = key.contiguous(), value.contiguous()
    key_out, value_out = torch.empty_like(key), torch.empty_like(value)
    tokens, channels = key.shape[axis], key.shape[-1]
    heads = key.shape[1] if axis == 2 else 1
    elements = heads * tokens * channels
    grid = (triton.cdiv(elements, BLOCK), len(key))  # the first axis has room for 2^31 programs, the second for 65535
    _scale_pair[grid](
        key, value, key_out, value_out, amount.contiguous(), first, amount.shape[1], tokens, heads, channels, elements,
        BLOCK=BLOCK,
    )
    return key_out, value_out
