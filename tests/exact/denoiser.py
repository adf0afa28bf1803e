"""The exact denoiser of a Gaussian mixture around a data set: mathematics only, no ComfyUI.

The clean distribution is p(x0) = mean_i N(x0; x_i, h^2 I), with data images x_i and kernel width h. For
x = a*x0 + b*eps each noise level is again a mixture, p(x) = mean_i N(x; a*x_i, v I) with v = a^2 h^2 + b^2, so that

    w_i     = softmax_i(-|x - a*x_i|^2 / 2v)
    D(x)    = E[x0 | x] = (a h^2 x + b^2 sum_i w_i x_i) / v
    score   = grad log p(x) = (a sum_i w_i x_i - x) / v = (a D - x) / b^2

With a = 1, b = sigma this is the variance-exploding form, with a = 1 - sigma, b = sigma flow matching; nothing is
divided by a, so that a = 0 (flow at sigma 1) is an ordinary case. Sums run in float64: at sigma = 0.03 a float32 dot
product of 3,072 terms is wrong by 0.1 and more in the exponent.
"""

import math

import torch


def vp_coefficients(sigma):
    """(a, b) of the variance-preserving form u = a*x0 + b*eps with b/a = sigma: a = sqrt(abar), b = sqrt(1 - abar)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return (1.0 + sigma ** 2).rsqrt(), (1.0 + sigma ** -2.0).rsqrt()


class ExactDenoiser:
    """Exact posterior mean, score, density and time posterior of `images` (N, ...), values usually in [-1, 1].

    x is (B, ...) with the shape of the images after the batch axis. a and b are numbers or (B,). `label` is None or
    (B,) integers: an entry >= 0 restricts the mixture to the images of that label, a negative one takes them all.
    Results are float64; nothing here changes x, and gradients flow through.
    """

    def __init__(self, images, kernel_width=0.05, labels=None):
        if not kernel_width > 0:
            raise ValueError(f"kernel_width is {kernel_width}: it must be above 0, or there is no density")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels came with {len(images)} images")
        self.kernel_width = float(kernel_width)
        self.shape = tuple(images.shape[1:])
        with torch.inference_mode(False):  # built under inference mode the tensors could never carry gradients
            self.flat = images.detach().flatten(1).to(torch.float64, copy=True)
            self.squares = self.flat ** 2
            self.norms = self.squares.sum(1)
            self.labels = None if labels is None else torch.as_tensor(labels).clone()

    def to(self, device):
        with torch.inference_mode(False):
            self.flat, self.squares, self.norms = (t.to(device) for t in (self.flat, self.squares, self.norms))
            self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def flatten(self, x):
        """(B, ...) -> (B, dims) float64, after checking that it has the shape of the images."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, the exact denoiser's images are {self.shape}")
        return x.flatten(1).to(torch.float64)

    def variance(self, a, b):
        """v = a^2 h^2 + b^2, the variance of one mixture component at this noise level."""
        return a ** 2 * self.kernel_width ** 2 + b ** 2

    def log_components(self, x, a, b, label=None, keep=None):
        """log of N(x; a*x_i, v) / N, (B, N): their logsumexp over N is log p(x).

        x (B, dims) flat. `keep` (B or 1, dims) in {0, 1}: only those dimensions count, i.e. the marginal density of
        them (used for regions); None counts all.
        """
        a, b = _column(a, x), _column(b, x)
        if keep is None:
            kept, dims, norms = x, x.shape[1], self.norms
        else:
            kept, dims, norms = x * keep, keep.sum(1, keepdim=True), keep @ self.squares.T
        distances = (kept * x).sum(1, keepdim=True) - 2.0 * a * (kept @ self.flat.T) + a ** 2 * norms
        v = self.variance(a, b)
        return self._log_prior(label, x) - distances / (2.0 * v) - 0.5 * dims * torch.log(2.0 * math.pi * v)

    def _log_prior(self, label, x):
        """log(1 / number of images allowed), -inf elsewhere: (B or 1, N)."""
        if label is None or self.labels is None:
            return x.new_full((1, 1), -math.log(len(self.flat)))
        label = label.to(self.labels.device)[:, None]
        allowed = (self.labels[None] == label) | (label < 0)
        if not allowed.any(1).all():
            raise ValueError(f"no image carries one of the labels {label.flatten().tolist()}")
        allowed = allowed.to(x.dtype)
        return torch.log(allowed) - torch.log(allowed.sum(1, keepdim=True))

    def posterior_mean(self, x, a, b, weights):
        """E[x0 | x] for component weights (B, N): (a h^2 x + b^2 weights @ images) / v, flat (B, dims)."""
        a, b = _column(a, x), _column(b, x)
        return (a * self.kernel_width ** 2 * x + b ** 2 * (weights @ self.flat)) / self.variance(a, b)

    def denoise(self, x, a, b, label=None):
        """D(x) for x = a*x0 + b*eps, shape of x."""
        flat = self.flatten(x)
        weights = self.log_components(flat, a, b, label).softmax(1)
        return self.posterior_mean(flat, a, b, weights).reshape(x.shape)

    def __call__(self, x, sigma, label=None):
        """D(x, sigma) in the variance-exploding form x = x0 + sigma*eps."""
        return self.denoise(x, 1.0, sigma, label)

    def log_p(self, x, a, b, label=None):
        """log density of x at the noise level (a, b), (B,)."""
        return self.log_components(self.flatten(x), a, b, label).logsumexp(1)

    def score(self, x, a, b, label=None):
        """grad_x log p(x), shape of x."""
        flat = self.flatten(x)
        mean = self.log_components(flat, a, b, label).softmax(1) @ self.flat
        a, b = _column(a, flat), _column(b, flat)
        return ((a * mean - flat) / self.variance(a, b)).reshape(x.shape)


def _column(value, x):
    """A number or a (B,) tensor as float64 (B or 1, 1)."""
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).reshape(-1, 1)
