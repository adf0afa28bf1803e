"""Runs from which the default detector's network learns: develop traps and clean runs of exact and of local denoisers.

And runs of the demo model, a trained network, from which it does not learn and by which it is judged.

Each number is one batch of a data set, parameterization, schedule, sampler and kind of trap drawn from it. The traps are
those of wide_traps.py. Nothing of the held-out split is in it, no test image of CIFAR-10, and none of the pictures of
Fashion-MNIST that the benchmarks use, though others of it, and the demo model has learned from all of them.
"""

import random
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

import comfy.sample
import comfy.samplers

from ..exact.denoiser import ExactDenoiser
from ..exact.images import as_latents, cifar10, shape_images
from ..exact.local import LocalDenoiser
from ..exact.model import conditioning, exact_model, sample
from ..exact.trap_families import one_per_sample
from ..exact.truth import fell
from ..exact.more_patterns import MORE_PATTERNS
from ..exact.wide_traps import JUMP, wide_traps
from ..harness.cache import cache_folder
from .data import load_fashion_mnist
from .entries import Entry, drawn_entry, handed_over, starts, within
from .exact_runs import BATCH, SIZE

DECIDED = 1.15
"""Runs are left at this noise ratio: the window is over, and who has fallen by then has fallen."""
CIFAR_IMAGES = 20_000
LOCAL = 5000
"""Added to the number of a batch of local denoisers where it is a seed: other pictures and noise than the exact ones'."""
CLASSES = 520
"""From this number on batches of local denoisers have classes and strong guidance."""
PARTIAL = 1000
"""From this number on runs start from a picture, or redraw a part of one (entries.py)."""
HANDED = 1500
"""And from this one on they go on where another sampler left off."""
FALLING = 2000
"""Batches of exact denoisers from this number on are of pictures, begin from nothing, and have attractors of more patterns."""


class Left(Exception):
    pass


class Recorder:
    """A sampling callback that keeps the estimates and leaves the run at DECIDED, or after the window if that ends later.

    ratios: those of all steps; what came before step `first` is not kept.
    """

    def __init__(self, ratios: list[float], first: int = 0):
        self.ratios, self.estimates, self.first = ratios[first:], [], first
        self.leaves_at = min(DECIDED, 0.9 * self.ratios[auto_window(self.ratios).correct_at])

    def __call__(self, step, denoised, x, steps):
        if step < self.first:
            return
        self.estimates.append(denoised.detach().clone())
        if self.ratios[step - self.first] < self.leaves_at:
            raise Left


def auto_window(ratios: list[float]):
    """The default detector's window of a run."""
    from artifact_guard.nodes.asced.learned import LearnedDetector
    from artifact_guard.nodes.asced.window import plan_window

    return plan_window(ratios, "auto", 0.0, 0.0, LearnedDetector.auto_window, LearnedDetector.lead)


def ratios_of(model, sampling: dict, denoise: float = 1.0) -> list[float]:
    """b / a at each step of a run."""
    from artifact_guard.nodes.coordinates import coefficients, ratio_of

    names = sampling["sampler_name"], sampling["scheduler"]
    sigmas = comfy.samplers.KSampler(model, sampling["steps"], "cpu", *names, denoise).sigmas[:-1]
    model_sampling = model.get_model_object("model_sampling")
    return [ratio_of(*coefficients(model_sampling, sigma)) for sigma in sigmas]


SAMPLERS = (
    "euler", "euler", "dpmpp_2m", "dpmpp_2m", "ddim", "heun", "lms", "ipndm", "deis", "res_multistep", "gradient_estimation",
    "euler_ancestral", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver", "lcm",
)


def drawn_sampling(draw: random.Random) -> dict:
    """25 Euler steps for one third of the runs, for the others what people use."""
    sampling = {"steps": 25, "sampler_name": "euler", "scheduler": "normal"}
    if draw.random() < 0.67:
        sampling = {"steps": draw.choice([10, 12, 16, 20, 20, 25, 25, 30, 35, 50]), "sampler_name": draw.choice(SAMPLERS)}
        sampling["scheduler"] = draw.choice(["normal", "normal", "simple", "karras", "beta", "sgm_uniform", "exponential"])
    return sampling


def record(model, seed: int, sampling: dict, entry: Entry, **conds) -> dict:
    """Sample a batch: its estimates, S of (B, C, H, W), their ratios, how it began, and what of the frames was redrawn, (B, H, W),
    None for all."""
    recorder = Recorder(ratios_of(model, sampling, entry.denoise), entry.first)
    begin = {"latent": entry.latent, "denoise": entry.denoise, "noise_mask": entry.noise_mask}
    with torch.inference_mode(), suppress(Left):
        sample(model, seed=seed, callback=recorder, **begin, **sampling, **conds)
    return {
        "estimates": recorder.estimates, "ratios": recorder.ratios, "entry": entry.kind,
        "valid": None if entry.noise_mask is None else entry.noise_mask[:, 0] > 0,
    }


def entered(draw: random.Random, number: int, images: torch.Tensor, planted: list, bare, sampling: dict) -> tuple[Entry, list]:
    """How a batch begins, and its traps, moved into the window where it begins late. bare: the model without them."""
    empty = torch.zeros(BATCH, *images.shape[1:])
    if number < PARTIAL or number >= FALLING:
        return Entry(empty), planted
    if number < HANDED:
        entry = drawn_entry(draw, images, BATCH, number, planted)
        ratios = ratios_of(bare, sampling, entry.denoise)
    else:
        ratios = ratios_of(bare, sampling)
        entry = handed_over(draw, empty, ratios)
        ratios = ratios[entry.first :]
    if ratios[0] < JUMP[1]:
        window = auto_window(ratios)
        planted = [within(trap, ratios[window.detect_from], ratios[window.correct_at]) for trap in planted]
    return entry, planted


class Pictures:
    """The data sets by name, read once."""

    def __init__(self, data: Path | None, cifar: Path):
        fashion = load_fashion_mnist(data)[0][0]
        benchmarks = torch.linspace(0, len(fashion) - 1, 1200).long()  # as in exact_runs.data_sets: never here
        keep = torch.ones(len(fashion), dtype=torch.bool)
        keep[benchmarks] = False
        self.sets = {"fashion": fashion[keep], "cifar": cifar10(cifar, "train", CIFAR_IMAGES, cache_folder() / "data")[0]}

    def some(self, name: str, seed: int, count: int, size: int = SIZE) -> torch.Tensor:
        """`count` of them, (count, C, size, size)."""
        if name == "shapes":
            return shape_images(count, size, seed=1000 + seed)
        images = self.sets[name]
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
        return images if size == SIZE else F.interpolate(images, size, mode="bicubic").clamp(-1, 1)


def drawn_images(draw: random.Random, number: int, pictures: Pictures, name: str, count: int) -> tuple[torch.Tensor, float]:
    """Data of a batch and what a 1 of the [-1, 1] image is in them: the pictures, these mixed into channels, or latents."""
    kind = draw.choice(["pictures"] * 5 + ["mixed", "latents", "latents", "latents"])
    if FALLING <= number < LOCAL:
        kind = "pictures"
    if kind == "latents":
        noise = draw.choice([0.0, 0.0, 0.1, 0.3])
        images = pictures.some(name, number, count, 2 * SIZE)
        return as_latents(images, draw.choice([4, 4, 12, 16]), draw.random() < 0.4, noise, number), 2.0
    images = pictures.some(name, number, count)
    if kind == "mixed":
        random = torch.Generator().manual_seed(number)
        images = torch.einsum("cd,ndhw->nchw", torch.randn(draw.choice([1, 4, 8, 16]), 3, generator=random) / 3**0.5, images)
        if draw.random() < 0.5:
            images = images + 0.15 * torch.randn(images.shape, generator=random)
    return images, 1.0


def exact_run(number: int, pictures: Pictures, coarse: bool = False) -> dict:
    """One batch of an exact denoiser: estimates (S, B, C, H, W), ratios, truth, where a trap stood and of what kind.

    coarse: few steps, of few pictures, which decide themselves early and sharply, and traps of any strength.
    """
    draw = random.Random(10_000 + number)
    name = draw.choice(["shapes", "fashion", "cifar"])
    kind = draw.choice(["eps", "flow", "flow3"])
    what = draw.choice(["clean", "scripted", "attractor", "attractor"])
    count, more = draw.choice([400, 800, 1200, 1200, 1200]), {}
    if number >= FALLING:
        what = "attractor"
    if coarse:
        count, what = draw.choice([60, 120, 120, 300, 1200]), draw.choice(["clean", "clean", "scripted", "attractor"])
        if draw.random() < 0.3 and what == "scripted":
            more = {"amplitude": 3.0}
    images, unit = drawn_images(draw, number, pictures, name, count)
    sampling, weight = drawn_sampling(draw), draw.choice([0.1, 0.2, 0.4, 0.6])
    if coarse:
        sampling["steps"] = draw.choice([8, 10, 12, 12, 16, 20, 25])
    planted, kinds = [], []
    if what != "clean":
        more = {"weight": weight} if what == "attractor" else more
        more["patterns"] = MORE_PATTERNS if number >= FALLING else None
        wide = wide_traps(what, 2**20 + number, (SIZE, SIZE), BATCH, images.shape[1], unit, **more)
        planted, kinds = [w.trap for w in wide], [(w.shape, w.pattern) for w in wide]
    labels, conds = None, {}
    if draw.random() < 0.15:
        labels = torch.arange(len(images)) % 2
        conds = {"cfg": draw.choice([2.0, 4.0, 7.0]), "positive": conditioning(0), "negative": conditioning()}
    settings = {"shift": 3.0} if kind == "flow3" else None
    made = {"parameterization": kind[:4], "labels": labels, "sampling_settings": settings}
    entry, planted = entered(draw, number, images, planted, exact_model(images, **made), sampling)
    traps = one_per_sample(planted) if planted else []
    run = record(exact_model(images, traps=traps, **made), number, sampling, entry, **conds)
    truth = stood = standing(planted, run["valid"])
    if what == "attractor":
        truth = truth & fell(traps[0], ExactDenoiser(images, 0.05), run["estimates"][-1])[:, None, None]
    return run | {"what": what, "set": name if unit == 1.0 else "latents", "truth": truth, "stood": stood, "kinds": kinds}


def standing(planted: list, valid: torch.Tensor | None) -> torch.Tensor:
    """Where the traps of a batch stand, one a sample or none at all, (B, H, W) bool: within what was redrawn."""
    if not planted:
        return torch.zeros(BATCH, SIZE, SIZE, dtype=torch.bool)
    stood = torch.cat([trap.mask for trap in planted])
    return stood if valid is None else stood & valid


def alike(images: torch.Tensor, count: int, draw: random.Random) -> torch.Tensor:
    """Labels (N,) of classes of images that look alike from afar: each that of the nearest of `count` of them."""
    seen = F.adaptive_avg_pool2d(images, 4).flatten(1)
    return torch.cdist(seen, seen[draw.sample(range(len(images)), count)]).argmin(1)


def local_run(number: int, pictures: Pictures) -> dict:
    """One batch of a denoiser that works patch by patch (exact/local.py), as far-sighted as trained networks are or more.

    From CLASSES on every sample is drawn from a class of its own with strong guidance, as people do.
    """
    draw = random.Random(30_000 + number)
    name, kind = draw.choice(["shapes", "fashion", "cifar"]), draw.choice(["eps", "flow", "flow3"])
    images, unit = drawn_images(draw, LOCAL + number, pictures, name, draw.choice([150, 300, 300, 600]))
    sampling, conds, labels = drawn_sampling(draw), {}, None
    if number >= CLASSES:
        labels = alike(images, draw.choice([4, 8, 8, 12]), draw)
        wanted = [conditioning(int(labels[draw.randrange(len(images))]))[0][0] for _ in range(BATCH)]
        conds = {"cfg": draw.choice([1.0, 2.5, 4.0, 6.0, 8.0]), "positive": [[torch.cat(wanted), {}]], "negative": conditioning()}
    elif draw.random() < 0.4:
        labels = torch.arange(len(images)) % 2
        conds = {"cfg": draw.choice([1.5, 2.5, 2.5, 4.0]), "positive": conditioning(0), "negative": conditioning()}
    reach, least = 2.2 * (8.0 / 2.2) ** draw.random(), 0.7 + 0.8 * draw.random()
    denoiser = LocalDenoiser(images, reach, 0.5 + 0.4 * draw.random(), least, labels=labels)
    planted, kinds = [], []
    if number % 2:
        wide = wide_traps("scripted", 2**22 + number, (SIZE, SIZE), BATCH, images.shape[1], unit)
        planted, kinds = [w.trap for w in wide], [(w.shape, w.pattern) for w in wide]
    settings = {"shift": 3.0} if kind == "flow3" else None
    made = {"parameterization": kind[:4], "sampling_settings": settings, "denoiser": denoiser}
    entry, planted = entered(draw, number, images, planted, exact_model(images, **made), sampling)
    traps = one_per_sample(planted) if planted else []
    run = record(exact_model(images, traps=traps, **made), LOCAL + number, sampling, entry, **conds)
    truth = standing(planted, run["valid"])
    what = "scripted" if planted else "clean"
    return run | {"what": what, "set": "local", "truth": truth, "stood": truth, "kinds": kinds}


def demo_run(number: int, demo_model, photos: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict:
    """One batch of the demo model, all classes mixed: even numbers clean, odd ones with scripted traps in its estimate.

    photos: images (N, 3, 32, 32) and their labels, from which runs from PARTIAL on start.
    """
    draw = random.Random(20_000 + number)
    sampling = drawn_sampling(draw)
    if (sampling["scheduler"], sampling["steps"]) == ("normal", 25):
        sampling["steps"] = 20
    model, _ = demo_model.load_demo_model()
    labels = torch.randint(0, 10, (BATCH,), generator=torch.Generator().manual_seed(number))
    planted, kinds = [], []
    if number % 2:
        wide = wide_traps("scripted", 2**21 + number, (SIZE, SIZE), BATCH)
        planted, kinds = [w.trap for w in wide], [(w.shape, w.pattern) for w in wide]
    conds = {"cfg": draw.choice([2.5, 2.5, 2.5, 1.0, 5.0]), "negative": [[demo_model.class_token(None), {}]]}
    images = torch.zeros(1, 3, SIZE, SIZE) if photos is None else photos[0]
    entry, planted = entered(draw, number, images, planted, model, sampling)
    if number >= PARTIAL and draw.random() < 0.5:
        labels = photos[1][starts(len(images), BATCH, number)]
    conds["positive"] = [[torch.cat([demo_model.class_token(int(label)) for label in labels]), {}]]
    run = record(with_traps(model, planted) if planted else model, number, sampling, entry, **conds)
    truth = standing(planted, run["valid"])
    what = "scripted" if planted else "clean"
    return run | {"what": what, "set": "demo", "truth": truth, "stood": truth, "kinds": kinds}


def with_traps(model, planted: list):
    """A clone of any model in whose estimate these scripted traps spring, one a sample."""
    from artifact_guard.nodes.coordinates import coefficients, ratio_of

    anchors = [[] for _ in planted]

    def trapped(arguments):
        denoised, sigma = arguments["denoised"], arguments["sigma"].flatten()[:1]
        a, b = (float(c) for c in coefficients(arguments["model"].model_sampling, sigma))
        for trap, state in zip(one_per_sample(planted), anchors):
            denoised = trap.play(denoised, torch.full((len(denoised), 1), ratio_of(a, b)), state)
        return denoised

    model = model.clone()
    model.set_model_sampler_post_cfg_function(trapped)
    return model


def watched(kind, estimates: list, ratios: list[float], valid: torch.Tensor | None = None):
    """A detector of this kind that has seen such a run to the end of the window, as the guard shows it."""
    from artifact_guard.kernels.score_dynamics import change_maps
    from artifact_guard.nodes.asced.estimate import Estimate
    from artifact_guard.nodes.asced.options import AscedOptions

    detector = kind(AscedOptions(), 1.0, min(estimates[0].shape[-2:]))
    window = auto_window(ratios)
    seen = [Estimate(x, x.float(), *((1.0, r) if r < float("inf") else (0.0, 1.0))) for x, r in zip(estimates, ratios)]
    for step, (previous, now) in enumerate(zip(seen[:window.correct_at], seen[1:]), start=1):
        if step > window.detect_from:
            detector.observe(previous, now, valid)
        detector.accompany(change_maps(now.denoised, previous.denoised)[1])
    return detector
