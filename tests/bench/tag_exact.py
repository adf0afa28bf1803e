"""Q3, first part: cosine and length of each estimate of the time-linked score against the exact one.

The exact denoiser of Fashion-MNIST knows p(t | u) and its gradient. Noise of size s is added after a step of 20, as a
run would meet it, and every estimate is asked at the sample that results: medians over 32 samples. Draws are a CPU's, and
the sums are done where ComfyUI runs models.
"""

import copy

import comfy.model_management
import torch

from ..exact.denoiser import ExactDenoiser
from ..exact.time_posterior import log_time_posterior, time_linked_score
from .exact_runs import data_sets

TIMES = (50, 100, 250, 400, 500, 700)
NOISES = (0.0, 0.1, 0.2, 0.3)
SAMPLES = 32
BEFORE = 12
"""Classes of the grid between the step and the one before it: a twentieth of Stable Diffusion's schedule."""


class Case:
    """Samples at class `index` of the grid `levels`, after a step from the class BEFORE it and with noise s added.

    images: on the CPU. Everything else lies on the denoiser's device.
    """

    def __init__(self, tag, denoiser, images, levels, index: int, noise: float, seed: int = 0):
        device = denoiser.flat.device
        self.tag, self.denoiser, self.levels, self.index = tag, denoiser, levels.to(device), index
        levels = self.levels
        random = torch.Generator().manual_seed(seed)

        def drawn() -> torch.Tensor:
            return torch.randn(clean.shape, generator=random).to(device)

        clean = images[torch.randperm(len(images), generator=random)[:SAMPLES]].to(device)
        earlier = max(0, index - BEFORE)
        (alpha, v), (alpha_now, v_now) = (tag.levels.alpha_and_variance(levels[i]) for i in (earlier, index))
        self.u_before = alpha * clean + v.sqrt() * drawn()
        self.before = self.denoised(self.u_before, earlier)
        self.u = alpha_now * self.before + (v_now / v).sqrt() * (self.u_before - alpha * self.before)
        self.u = self.u + noise * drawn()
        self.step, self.step_before = (self.tag.levels.Step.at(levels[i].expand(SAMPLES)) for i in (index, earlier))
        self.estimate = self.denoised(self.u, index)

    def denoised(self, u, index):
        alpha, v = self.tag.levels.alpha_and_variance(self.levels[index].double())
        return self.denoiser.denoise(u, alpha, v.sqrt()).float()

    def scores(self, network) -> dict[str, torch.Tensor]:
        """Name -> time-linked score, (SAMPLES, C, H, W). network: a time predictor's, for the classes of the grid."""
        closed_form, posterior = self.tag.alignment.closed_form, self.tag.posterior
        sigmas = torch.exp(-0.5 * self.levels.double())
        gamma = log_time_posterior(self.denoiser, self.u, sigmas).exp().float()
        exact = posterior.Posterior.of(self.levels.expand(SAMPLES, -1), gamma)
        one_call, in_run = self.tag.energy.EnergyEstimator(), self.tag.energy.EnergyEstimator()
        in_run.after(self.u_before, self.step_before, self.before)
        in_run.keep(self.tag.answer.Answer(self.before, self.before))
        energy = self.tag.energy.EnergyEstimator()
        predictor = self.tag.network_estimator.NetworkEstimator(network, self.levels, energy)
        posteriors = {
            "closed form, exact posterior": exact,
            "closed form, training-free (default)": in_run.after(self.u, self.step, self.estimate).posterior,
            "closed form, training-free, this step alone": one_call.after(self.u, self.step, self.estimate).posterior,
            "closed form, predictor": predictor.before(self.u, self.step).posterior,
        }
        scores = {name: closed_form(self.u, self.estimate, self.step, p) for name, p in posteriors.items()}
        scores["published gradient, predictor"] = self.tag.alignment.published_gradient(
            self.u, self.step.level, network, self.levels
        )
        return scores

    def exact(self) -> torch.Tensor:
        sigmas = torch.exp(-0.5 * self.levels.double())
        return time_linked_score(self.denoiser, self.u, sigmas, self.index)


def against(score: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Median cosine and length ratio over samples."""
    one, other = score.flatten(1).double(), truth.flatten(1).double()
    cosine = torch.cosine_similarity(one, other)
    return {"cosine": round(cosine.median().item(), 3),
            "length": round((one.norm(dim=1) / other.norm(dim=1)).median().item(), 3)}


def run(pack, output, data) -> dict:
    from artifact_guard.nodes.tag import alignment, energy, levels, network_estimator, posterior, predictor_files  # noqa: F401

    tag = pack.nodes.tag
    predictor = predictor_files.load_predictor("demo_fashion_mnist.safetensors")
    schedule = levels.Schedule.of(pack.nodes.demo.model.load_demo_model()[0].get_model_object("model_sampling"))
    images = data_sets(data, count=2400)["fashion-mnist"]
    device = comfy.model_management.get_torch_device()
    denoiser = ExactDenoiser(images, 0.05).to(device)
    network = copy.deepcopy(predictor.network).to(device)
    figures = {}
    for time in TIMES:
        index = int((predictor.levels - schedule.level(torch.tensor([float(time)])).float()).abs().argmin())
        for noise in NOISES:
            case = Case(tag, denoiser, images, predictor.levels, index, noise)
            truth = case.exact()
            for name, score in case.scores(network).items():
                figures.setdefault(name, {})[f"t {time}, s {noise}"] = against(score, truth)
    return figures
