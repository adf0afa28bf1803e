"""The published ASCED detection rule in numpy + scipy: an independent reference, slow and plain.

ASCED, arXiv 2503.16218, as its released code finds artifacts on the clean estimate D, restated here:

    d_t       = gaussian_filter(|D_t - D_{t-1}|), spatial axes only, sigma 2 px at 256
    abnormal  = max over channels of d_t > median(d_t) + k * 1.4826 * MAD(d_t),   united over the steps
    regions   = 4-connected components with 0.15 % < area < 15 % of the image that survive an erosion by 5 px at 256

Choices and departures:
- raw floats per channel; the released code clamps to 8 bits, and its filter also blurs across the channels.
- median and MAD run over all pixels and channels of one image at one step.
- lengths scale with the shorter side, and the blur is at least `least_blur` = one latent pixel wide. That floor
  matters below a side of 128: on 32x32 it spreads an 8x8 region beyond the 15 % that is allowed; 0 gives the rule its
  better, scale-free form there. The square of the erosion is max(1, round(5 * side / 256)) wide, made odd upwards; at
  1, below a side of 77, it removes nothing.
- borders: the blur mirrors the edge pixel too (scipy `reflect`, cut off at 4 sigma); outside the image counts as empty
  in the erosion, so a region at the border must be thick enough within the image.
- a surviving region is kept whole, not eroded; each region is eroded on its own, so that diagonal neighbours, which are
  regions of their own under 4-connectivity, do not help each other.
"""

import numpy as np
from scipy import ndimage


def detect(denoised, k=3.0, least_blur=1.0):
    """Masks (B, H, W) bool of artifact regions for clean estimates (S, B, C, H, W), S >= 2 steps in order."""
    return np.stack([keep_regions(abnormal) for abnormal in abnormal_pixels(denoised, k, least_blur)])


def abnormal_pixels(denoised, k=3.0, least_blur=1.0):
    """(B, H, W) bool: pixels whose smoothed |D_t - D_{t-1}| is above its step's threshold at any step."""
    denoised = np.asarray(denoised)
    sigma = max(least_blur, 2.0 * min(denoised.shape[-2:]) / 256.0)
    united = np.zeros((denoised.shape[1],) + denoised.shape[-2:], dtype=bool)
    for before, after in zip(denoised[:-1], denoised[1:]):
        for b, change in enumerate(np.abs(after - before)):
            d = ndimage.gaussian_filter(change, sigma=(0.0, sigma, sigma))
            median = np.median(d)
            mad = np.median(np.abs(d - median))
            united[b] |= d.max(axis=0) > median + k * 1.4826 * mad
    return united


def keep_regions(abnormal):
    """Connected regions of (H, W) bool with an allowed area that survive one erosion, whole."""
    width = max(1, round(5.0 * min(abnormal.shape) / 256.0))
    square = np.ones((width + 1 - width % 2,) * 2, dtype=bool)
    labels, _ = ndimage.label(abnormal)  # default structure: 4-connected
    kept = np.zeros_like(abnormal)
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[window] == label
        allowed = 0.0015 < region.sum() / abnormal.size < 0.15
        if allowed and ndimage.binary_erosion(region, square, border_value=0).any():
            kept[window] |= region
    return kept
