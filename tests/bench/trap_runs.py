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
from ..exact.wide_traps import wide_traps
from ..harness.cache import cache_folder
from .data import load_fashion_mnist
from .exact_runs import BATCH, SIZE

DECIDED = 1.15
"""Runs are left at this noise ratio: the window is over, and who has fallen by then has fallen."""
CIFAR_IMAGES = 20_000
LOCAL = 5000
"""Added to the number of a batch of local denoisers where it is a seed: other pictures and noise than the exact ones'."""
CLASSES = 520
"""From this number on batches of local denoisers have classes and strong guidance."""


class Left(Exception):
    pass


class Recorder:
    """A sampling callback that keeps the estimates and leaves the run at DECIDED."""

    def __init__(self, ratios: list[float]):
        self.ratios, self.estimates = ratios, []

    def __call__(self, step, denoised, x, steps):
        self.estimates.append(denoised.detach().clone())
        if self.ratios[step] < DECIDED:
            raise Left


def ratios_of(model, sampling: dict) -> list[float]:
    """b / a at each step of a run."""
    from artifact_guard.nodes.coordinates import coefficients, ratio_of

    names = sampling["sampler_name"], sampling["scheduler"]
    sigmas = comfy.samplers.KSampler(model, sampling["steps"], "cpu", *names, 1.0).sigmas[:-1]
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
    if coarse:
        count, what = draw.choice([60, 120, 120, 300, 1200]), draw.choice(["clean", "clean", "scripted", "attractor"])
        if draw.random() < 0.3 and what == "scripted":
            more = {"amplitude": 3.0}
    images, unit = drawn_images(draw, number, pictures, name, count)
    sampling, weight = drawn_sampling(draw), draw.choice([0.1, 0.2, 0.4, 0.6])
    if coarse:
        sampling["steps"] = draw.choice([8, 10, 12, 12, 16, 20, 25])
    traps, truth, kinds = [], torch.zeros(BATCH, SIZE, SIZE, dtype=torch.bool), []
    if what != "clean":
        more = {"weight": weight} if what == "attractor" else more
        planted = wide_traps(what, 2**20 + number, (SIZE, SIZE), BATCH, images.shape[1], unit, **more)
        kinds = [(trap.shape, trap.pattern) for trap in planted]
        traps, truth = one_per_sample([t.trap for t in planted]), torch.cat([t.trap.mask for t in planted])
    labels, conds = None, {}
    if draw.random() < 0.15:
        labels = torch.arange(len(images)) % 2
        conds = {"cfg": draw.choice([2.0, 4.0, 7.0]), "positive": conditioning(0), "negative": conditioning()}
    settings = {"shift": 3.0} if kind == "flow3" else None
    model = exact_model(images, kind[:4], traps=traps, labels=labels, sampling_settings=settings)
    recorder = Recorder(ratios_of(model, sampling))
    with torch.inference_mode(), suppress(Left):
        sample(model, seed=number, latent=(BATCH, images.shape[1], SIZE, SIZE), callback=recorder, **sampling, **conds)
    stood = truth
    if what == "attractor":
        truth = truth & fell(traps[0], ExactDenoiser(images, 0.05), recorder.estimates[-1])[:, None, None]
    return {
        "what": what, "set": name if unit == 1.0 else "latents", "estimates": recorder.estimates, "ratios": recorder.ratios,
        "truth": truth, "stood": stood, "kinds": kinds,
    }


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
    traps, truth, kinds = [], torch.zeros(BATCH, SIZE, SIZE, dtype=torch.bool), []
    if number % 2:
        planted = wide_traps("scripted", 2**22 + number, (SIZE, SIZE), BATCH, images.shape[1], unit)
        kinds = [(trap.shape, trap.pattern) for trap in planted]
        traps, truth = one_per_sample([t.trap for t in planted]), torch.cat([t.trap.mask for t in planted])
    settings = {"shift": 3.0} if kind == "flow3" else None
    model = exact_model(images, kind[:4], traps=traps, sampling_settings=settings, denoiser=denoiser)
    recorder = Recorder(ratios_of(model, sampling))
    with torch.inference_mode(), suppress(Left):
        sample(model, seed=LOCAL + number, latent=(BATCH, images.shape[1], SIZE, SIZE), callback=recorder, **sampling, **conds)
    return {
        "what": "scripted" if number % 2 else "clean", "set": "local", "estimates": recorder.estimates,
        "ratios": recorder.ratios, "truth": truth, "stood": truth, "kinds": kinds,
    }


def demo_run(number: int, demo_model) -> dict:
    """One batch of the demo model, all classes mixed: even numbers clean, odd ones with scripted traps in its estimate."""
    draw = random.Random(20_000 + number)
    sampling = drawn_sampling(draw)
    if (sampling["scheduler"], sampling["steps"]) == ("normal", 25):
        sampling["steps"] = 20
    model, _ = demo_model.load_demo_model()
    labels = torch.randint(0, 10, (BATCH,), generator=torch.Generator().manual_seed(number))
    positive = [[torch.cat([demo_model.class_token(int(label)) for label in labels]), {}]]
    truth, kinds = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.bool), []
    if number % 2:
        wide = wide_traps("scripted", 2**21 + number, (SIZE, SIZE), BATCH)
        planted, kinds = [w.trap for w in wide], [(w.shape, w.pattern) for w in wide]
        truth = torch.cat([trap.mask for trap in planted])
        anchors = [[] for _ in planted]

        def trapped(arguments):
            denoised, sigma = arguments["denoised"], arguments["sigma"].flatten()[:1]
            for trap, state in zip(one_per_sample(planted), anchors):
                denoised = trap.play(denoised, sigma.expand(len(denoised))[:, None], state)
            return denoised

        model = model.clone()
        model.set_model_sampler_post_cfg_function(trapped)
    cfg, recorder = draw.choice([2.5, 2.5, 2.5, 1.0, 5.0]), Recorder(ratios_of(model, sampling))
    latent = torch.zeros(BATCH, 3, SIZE, SIZE)
    noise, names = comfy.sample.prepare_noise(latent, number), (sampling["sampler_name"], sampling["scheduler"])
    with torch.inference_mode(), suppress(Left):
        comfy.sample.sample(
            model, noise, sampling["steps"], cfg, *names, positive, [[demo_model.class_token(None), {}]], latent,
            callback=recorder, disable_pbar=True, seed=number,
        )
    what = "scripted" if number % 2 else "clean"
    return {
        "what": what, "set": "demo", "estimates": recorder.estimates, "ratios": recorder.ratios, "truth": truth,
        "stood": truth, "kinds": kinds,
    }


def watched(kind, estimates: list, ratios: list[float]):
    """A detector of this kind that has seen such a run to the end of the window, as the guard shows it."""
    from artifact_guard.kernels.score_dynamics import change_maps
    from artifact_guard.nodes.asced.estimate import Estimate
    from artifact_guard.nodes.asced.options import AscedOptions
    from artifact_guard.nodes.asced.window import plan_window

    detector = kind(AscedOptions(), 1.0, min(estimates[0].shape[-2:]))
    schedule = [*ratios, 0.0, 0.0]  # the run was left early: more steps follow
    window = plan_window(schedule, "auto", 0.0, 0.0, detector.auto_window, detector.lead)
    seen = [Estimate(x, x.float(), *((1.0, r) if r < float("inf") else (0.0, 1.0))) for x, r in zip(estimates, ratios)]
    for step, (previous, now) in enumerate(zip(seen[:window.correct_at], seen[1:]), start=1):
        if step > window.detect_from:
            detector.observe(previous, now, None)
        detector.accompany(change_maps(now.denoised, previous.denoised)[1])
    return detector
