"""A denoiser that knows its data set patch by patch: it invents pictures, as trained networks do, and can be written down.

The exact denoiser of a data set (denoiser.py) always ends at one of its images, and once it has chosen nothing moves any
more. A trained convolutional network sees only so far at each noise level and puts new pictures together from patches
of many images, changing them to the end. Its mathematics are those of a mixture as in denoiser.py, but each pixel p
chooses for itself, by what lies near it (Kamb and Ganguli, "An analytic theory of creativity in convolutional diffusion
models", ICML 2025, the local score machine):

    w_i(p)  = softmax_i(-sum_q K(p - q) |x_q - a*x_i,q|^2 / 2v)
    D_p(x)  = (a h^2 x_p + b^2 sum_i w_i(p) x_i,p) / v

We depart from it in the window: a Gaussian K with K(0) = 1 instead of a square, whose standard deviation falls with the
noise as reach * (b/a)^power pixels, at least `least`. With a reach of 2.5 and more results look like those of a small
trained model, below 2 nothing holds them together.
"""

import torch


class LocalDenoiser:
    """Patchwise posterior mean of `images` (N, C, H, W); stands in for ExactDenoiser where no trap is an attractor.

    labels: as for ExactDenoiser. Works in float32 and without gradients.
    """

    def __init__(self, images, reach=2.5, power=0.7, least=1.0, kernel_width=0.05, labels=None):
        self.shape = tuple(images.shape[1:])
        self.reach, self.power, self.least, self.kernel_width = reach, power, least, kernel_width
        self.pixels = images.float().permute(2, 3, 0, 1).flatten(0, 1)  # (HW, N, C)
        self.norms = self.pixels.square().sum(-1)
        self.labels = None if labels is None else torch.as_tensor(labels)

    def to(self, device):
        self.pixels, self.norms = self.pixels.to(device), self.norms.to(device)
        return self

    def denoise(self, x, a, b, label=None):
        """D(x) for x = a*x0 + b*eps, (B, C, H, W). a and b (B, 1), all equal; label None or (B,), -1 takes all images."""
        a, b = (float(torch.as_tensor(value).flatten()[0]) for value in (a, b))
        if label is None or self.labels is None:
            return self._mean(x, a, b, self.pixels, self.norms)
        denoised = torch.empty(x.shape, device=x.device)
        for wanted in label.unique().tolist():
            rows, images = label == wanted, (self.labels == wanted) | (wanted < 0)
            denoised[rows] = self._mean(x[rows], a, b, self.pixels[:, images], self.norms[:, images])
        return denoised

    def _mean(self, x, a, b, images, norms):
        """The posterior mean for images (HW, N, C) of squared pixels norms (HW, N)."""
        count, channels, height, width = x.shape
        v = a**2 * self.kernel_width**2 + b**2
        pixels = x.float().permute(2, 3, 0, 1).flatten(0, 1)  # (HW, B, C)
        log = (a * pixels @ images.mT - 0.5 * a**2 * norms[:, None]) / v  # (HW, B, N)
        spread = max(self.least, self.reach * (b / max(a, 1e-6))**self.power)
        log = _window(height, spread).to(log) @ log.reshape(height, -1)
        log = _window(width, spread).to(log) @ log.reshape(height, width, -1)
        weights = log.reshape(height * width, count, -1).softmax(-1)
        mean = (a * self.kernel_width**2 * pixels + b**2 * (weights @ images)) / v
        return mean.reshape(height, width, count, channels).permute(2, 3, 0, 1)


def _window(size, spread):
    """(size, size): K of each pair of places along one axis."""
    place = torch.arange(size, dtype=torch.float32)
    return torch.exp(-(place[:, None] - place).square() / (2 * spread**2))
