"""A small convolutional network over maps of a frame: each pixel is judged by what lies around it."""

import torch
import torch.nn.functional as F

DILATIONS = (1, 2, 4, 2, 1)
"""Of the five convolutions 3 x 3: a pixel sees 10 pixels to each side."""

DOUBLE_DEVICES = ("cuda",)
"""Where float32 may mean TF32 and an algorithm chosen by the clock, of which a threshold would see the rounding. In double
precision neither matters, and no setting of the whole process has to be touched for it. It is done once a round."""

CLIP = 6.0
"""Standardised inputs are cut off here, so that no value is further out than those it was fitted on."""


def local_net(weights: dict[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
    """Logit of each pixel.

        h = relu(W_in z),  z = (maps - mean) / std, clipped;  h <- h + relu(conv_k(h)), the mean of h over the frame
        added (through a matrix) before the second;  logit = w_out h

    Args:
        weights: mean, std (K,); inp.weight (N, K, 1, 1); cs.0 ... cs.4 (N, N, 3, 3); ctx (N, N); out (1, N, 1, 1); each
            but the first two with its .bias. float32, on the device of `maps`.
        maps: (F, K, H, W) float32.

    Returns:
        (F, H, W) float32.
    """
    if maps.device.type in DOUBLE_DEVICES:
        return _logits({name: weight.double() for name, weight in weights.items()}, maps.double()).float()
    return _logits(weights, maps)


def _logits(weights: dict[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
    def conv(name, x, dilation=0):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=dilation, dilation=max(1, dilation))

    z = (maps - weights["mean"][:, None, None]) / weights["std"][:, None, None]
    h = F.relu(conv("inp", z.clamp(-CLIP, CLIP)))
    for layer, dilation in enumerate(DILATIONS):
        if layer == 1:
            h = h + F.linear(h.mean((2, 3)), weights["ctx.weight"], weights["ctx.bias"])[:, :, None, None]
        h = h + F.relu(conv(f"cs.{layer}", h, dilation))
    return conv("out", h)[:, 0]
