"""Planted score traps with known truth: a region whose clean estimate goes wrong in the middle of a run and stays so.

mask (B or 1, H, W) bool says where; a row without any True leaves its sample alone, so a list of traps can give every
sample of a batch another one. pattern is (B or 1, C, H, W), or (B or 1, C, T, H, W) for video, whose frames all have
the same region. Position in the run is the ratio b/a of x = a*x0 + b*eps, which all parameterizations share.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class ScriptedTrap:
    """D jumps in the region and then nearly freezes; measures detection only.

    At each b/a in `at` (one or two values, falling) the region's D gains amplitude / len(at) * pattern; from the first
    on it keeps only the share `motion` (0.1-0.4) of its normal movement, until b/a is below `release`, whence it moves
    normally again and keeps the offset it has. With D_k, y_k the untouched and the trapped estimate at the first call
    at or below threshold k:  y = y_k + jump_k * pattern + motion_k * (D - D_k).

    pattern has RMS 1 inside the region, so that amplitude is in units of the [-1, 1] image.

    The anchors are the whole state. A call above a threshold forgets that threshold's anchors and those below, so
    churn, rejected adaptive steps and second evaluations of a step are safe; a new run starts without any, and one that
    starts below a threshold springs at its first call. When a run is restarted from a corrected x *below* a threshold,
    the trap knows nothing of it: y goes on from its old anchors, so the artifact stays whatever the correction did.
    Restarted above it, the same trap springs again. Under classifier-free guidance cond and uncond have anchors of
    their own; y is linear in D, so the guided estimate is trapped in just the same way.

    Only the jump's own call differs from the clean run inside the region alone: from then on x carries the offset, and
    D of the whole image follows from x. Near the end (b/a about the kernel width) D itself keeps what x carries, so
    that after a release the offset in the result is up to twice that of the jump.
    """

    mask: torch.Tensor
    pattern: torch.Tensor
    amplitude: float
    at: tuple
    motion: float = 0.2
    release: float = 0.0
    kind = "scripted"

    def stages(self):
        """(threshold, jump, motion) in the order in which a run meets them."""
        jump = self.amplitude / len(self.at)
        return [(ratio, jump, self.motion) for ratio in self.at] + [(self.release, 0.0, 1.0)]

    def play(self, denoised, ratio, anchors):
        """The trapped estimate (B, C, ..., H, W) at ratio (B, 1), all equal; `anchors` is this run's list."""
        rows = trapped_rows(self.mask, len(denoised))
        if not rows.any():
            return denoised
        if ratio.min() != ratio.max():
            raise ValueError("a scripted trap needs one sigma for the whole batch")
        clean = denoised.detach()
        pattern, trapped = self.pattern.to(denoised), denoised
        for k, (threshold, jump, motion) in enumerate(self.stages()):
            if float(ratio[0]) > threshold:
                del anchors[k:]
                break
            if k == len(anchors):
                anchors.append((clean, trapped.detach()))
            clean_k, trapped_k = anchors[k]
            trapped = trapped_k + jump * pattern + motion * (denoised - clean_k)
        return torch.where(region_of(self.mask, denoised), trapped, denoised)


@dataclass(frozen=True)
class AttractorTrap:
    """A second basin: in the region the clean distribution gets an extra component, a garbage pattern g.

    With x = (R, O), region and outside, the clean distribution becomes
        p'(x0) = (1 - pi) p(x0) + pi p(x0_O) N(x0_R; g, width^2 I)
    (p(x0_O): the marginal of the clean mixture outside, so the rest of the image fits as ever). Noised and solved as
    any mixture, with q the posterior probability of the trap at this noise level,
        q = pi p(x_O) N(x_R; a g, v_g) / (that + (1 - pi) p(x)),  v_g = a^2 width^2 + b^2
        D' = (1 - q) D + q (outside: D from O alone; inside: (a width^2 x + b^2 g) / v_g).
    D' is the exact posterior mean of p', so that a fair run falls with probability pi, and stays once q is near 1. A
    region renoised to x escapes with probability 1 - q(x): 1 - pi where the noise hides what it was, more where the
    renoised estimate was clean, less where it still held g.
    Several traps on one sample: at most one of them holds, the weights are 1 - sum pi_k and pi_k.

    pattern is the garbage itself, in the image's range.
    """

    mask: torch.Tensor
    pattern: torch.Tensor
    weight: float = 0.5
    width: float = 0.05
    kind = "attractor"

    def component(self, denoiser, x, a, b, label):
        """log p(x_O) N(x_R; a g, v_g), (B,), and the posterior mean under the trap, (B, dims); x (B, dims)."""
        image = x.reshape(-1, *denoiser.shape)
        inside = region_of(self.mask, image).flatten(1).to(x)
        garbage = self.pattern.to(x).expand_as(image).flatten(1)
        v = a ** 2 * self.width ** 2 + b ** 2
        outside = denoiser.log_components(x, a, b, label, 1.0 - inside)
        squares = ((x - a * garbage) ** 2 * inside).sum(1, keepdim=True)
        basin = -squares / (2.0 * v) - 0.5 * inside.sum(1, keepdim=True) * torch.log(2.0 * torch.pi * v)
        mean = torch.where(inside > 0, (a * self.width ** 2 * x + b ** 2 * garbage) / v,
                           denoiser.posterior_mean(x, a, b, outside.softmax(1)))
        return outside.logsumexp(1) + basin[:, 0], mean

    def rows(self, chosen):
        """This trap for some rows of its batch only."""
        mask, pattern = (t[chosen.to(t.device)] if len(t) > 1 else t for t in (self.mask, self.pattern))
        return replace(self, mask=mask, pattern=pattern)


def mixture_with_traps(denoiser, traps, x, a, b, label=None):
    """D'(x), float64, shape of x: the exact posterior mean with `traps` (attractors). a, b (B, 1)."""
    flat = denoiser.flatten(x)
    clean = denoiser.log_components(flat, a, b, label)
    parts, logs, free = [denoiser.posterior_mean(flat, a, b, clean.softmax(1))], [clean.logsumexp(1)], 1.0
    for trap in traps:
        rows = trapped_rows(trap.mask, len(flat)).to(flat.device)
        log_p, mean = flat.new_full((len(flat),), -torch.inf), torch.zeros_like(flat)
        if rows.any():
            some = None if label is None else label[rows]
            log_p[rows], mean[rows] = trap.rows(rows).component(denoiser, flat[rows], a[rows], b[rows], some)
        parts.append(mean)
        logs.append(log_p + torch.log(torch.tensor(trap.weight, dtype=flat.dtype)))
        free = free - trap.weight * rows.to(flat.dtype)
    logs[0] = logs[0] + torch.log(torch.as_tensor(free, dtype=flat.dtype))
    shares = torch.stack(logs).softmax(0)
    return sum(share[:, None] * part for share, part in zip(shares, parts)).reshape(x.shape)


def region_of(mask, x):
    """mask (B or 1, H, W) as bool of the shape of x (B, C, H, W) or (B, C, T, H, W)."""
    axes = (len(mask),) + (1,) * (x.ndim - 3) + tuple(mask.shape[1:])
    return mask.bool().to(x.device).reshape(axes).expand_as(x)


def trapped_rows(mask, batch):
    """(batch,) bool: which samples have any region."""
    if len(mask) not in (1, batch):
        raise ValueError(f"the trap's mask is for {len(mask)} samples, the batch has {batch}")
    return mask.flatten(1).any(1).expand(batch)
