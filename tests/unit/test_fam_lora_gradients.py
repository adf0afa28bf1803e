"""The gradient of a training step: core's on the same draw, and the same with and without checkpointing."""

import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.demo.model import load_demo_model
from artifact_guard.nodes.fam import checkpointing
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.fam.checkpointing import KeepWhatWasSaved, checkpointed
from artifact_guard.nodes.fam.lora_settings import step_seed
from artifact_guard.nodes.fam.train_steps import output_factor
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_train import TrainGuider, TrainSampler
from torch.utils.checkpoint import checkpoint

from tests.small_models import reachable, small_model
from tests.unit.fam_lora_support import equal, settings, start


@pytest.mark.parametrize("family, factor", [("sd15", lambda s: -s), ("flux", lambda s: -s)])
def test_what_stands_before_the_networks_output(family, factor):
    """EPS: x - sigma eps. Flow: x - sigma v. So the loss is that of eps and v, whatever sigma is."""
    sampling, sigma = small_model(family).model.get_model_object("model_sampling"), torch.tensor([0.3, 0.9])
    assert torch.allclose(output_factor(sampling, sigma), factor(sigma))


def test_v_prediction_factor():
    sampling, sigma = load_demo_model()[0].get_model_object("model_sampling"), torch.tensor([0.5, 3.0])
    assert torch.allclose(output_factor(sampling, sigma), -sigma / (1 + sigma**2).sqrt())


def gradients(training, first=0):
    """The gradients of one step, and its loss."""
    found = {}

    def keep(step, loss):
        parts = training.parameters.items()  # a layer that is not used has no gradient
        found.update({name: torch.zeros(1) if p.grad is None else p.grad.clone() for name, p in parts}, loss=torch.tensor(loss))

    with torch.inference_mode(False):
        training.stretch(first, first + 1, keep)
    training.optimizer.zero_grad(set_to_none=True)
    return found


def test_an_ordinary_step_is_cores():
    """Core's TrainSampler on the same latent, noise and time: the same gradient, but for the factor core leaves out."""
    small = small_model("sd15")
    training, weights = start(small, settings(batch_size=1), prompts=1)
    ours = gradients(training)
    draw = training.data.draw(1, step_seed(0, 0))
    seen = {}

    class Core(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
            sampler = TrainSampler(torch.nn.MSELoss(), None, training_dtype=torch.float32)
            sigma = torch.tensor([model_wrap.inner_model.model_sampling.percent_to_sigma(draw.times.item())])
            latent = training.data.latents[draw.indices]
            sampler.fwd_bwd(model_wrap, sigma, draw.noise, latent, model_wrap.conds["positive"], [0], extra_args, 1)
            seen["sigma"] = sigma.item()
            return torch.zeros_like(noise)

    guider = TrainGuider(training.model)
    guider.set_conds(small.conditioning(0))
    with torch.inference_mode(False), torch.enable_grad():
        latent = torch.ones(1, 4, 16, 16)
        guider.sample(latent, latent, Core(), torch.arange(1), seed=0)
    for name, parameter in weights.parameters.items():
        assert torch.allclose(parameter.grad, ours[name] * seen["sigma"] ** 2, rtol=1e-3, atol=1e-7), name
    assert any(parameter.grad.abs().max() > 0 for parameter in weights.parameters.values())


@pytest.mark.parametrize("family", ["sdxl", "flux", "chroma", "hunyuan_video", "wan", "ltxv"])
def test_checkpointing_changes_no_gradient(family):
    """With the attention patch on. Blocks computed again see the same options; flux and ltxv write in place."""
    small = reachable(small_model(family))
    found = []
    for on in (False, True):
        training, _ = start(small, settings(attention_strength=0.3, base_fraction=0.0, gradient_checkpointing=on))
        training.progress.flaw_map = torch.rand(1, *small.latent()["samples"].shape[-2:], generator=torch.Generator().manual_seed(1))
        found.append(gradients(training))
    largest = max(value.norm() for value in found[0].values())
    for name, value in found[0].items():  # some gradients are zero but for rounding: a norm follows that takes them out
        assert (value - found[1][name]).norm() <= 1e-4 * (value.norm() + 1e-2 * largest), name
    training.progress.flaw_map = None
    assert not equal(gradients(training), found[1]), "the map acts on the gradient"


@pytest.mark.parametrize("node", [FreeU, FreeU_V2])
def test_checkpointing_changes_no_gradient_under_freeu(node):
    """It writes into activations that its gradient needs, between the blocks, and catches whatever is raised inside it."""
    small = small_model("sd15")
    free, found = node.execute(small.model, 1.3, 1.4, 0.9, 0.2)[0], []
    for model, on in ((free, False), (free, True), (None, True)):
        training, _ = start(small, settings(base_fraction=1.0, gradient_checkpointing=on), model)
        found.append(gradients(training))
    largest = max(value.norm() for value in found[0].values())
    for name, value in found[0].items():
        assert (value - found[1][name]).norm() <= 1e-4 * (value.norm() + 1e-2 * largest), name
    assert max((value - found[2][name]).norm() for name, value in found[0].items()) > 1e-2 * largest, "it acts"


@pytest.mark.parametrize("guide", [
    lambda model: PerturbedAttentionGuidance.execute(model, 3.0)[0], lambda model: SelfAttentionGuidance.execute(model, 3.0, 2.0)[0],
], ids=["PAG", "SAG"])
def test_the_networks_own_prediction_is_trained_whatever_guidance_is_on_the_model(guide):
    small, found = small_model("sd15"), []
    for model in (small.model, guide(small.model)):
        training, _ = start(small, settings(base_fraction=1.0), model)
        found.append(gradients(training))
    assert equal(*found)


def test_a_users_patch_on_some_blocks_stays_on_these_when_they_are_computed_again():
    """The options tell which block is running; by the time of the way back the last one has written its name there."""
    small = small_model("sdxl")
    patched = patch_attention(small.model, torch.ones(1, 16, 16), AttentionSettings(0.5, blocks="middle"))
    found = []
    for on in (False, True):
        training, _ = start(small, settings(base_fraction=1.0, gradient_checkpointing=on), patched)
        found.append(gradients(training))
    for name, value in found[0].items():
        if "middle_block.1" in name and value.norm() > 1e-3:
            assert torch.allclose(value, found[1][name], rtol=1e-3, atol=1e-5), name
    assert any("middle_block.1" in name and value.norm() > 1e-3 for name, value in found[0].items())


def test_what_is_written_in_place_does_not_reach_what_was_saved():
    """y = x^2 saves x, which is then written: the gradient is of x as it was, and the view's base sees what is written."""
    x = torch.tensor([3.0], requires_grad=True)
    doubled = 2 * x
    kept = doubled.detach()
    with KeepWhatWasSaved():
        doubled += 1
        base = torch.zeros(2) + x
        base[:1].mul_(5)
    assert (kept.item(), doubled.item(), base[0].item()) == (6.0, 7.0, 15.0)


@pytest.mark.parametrize("family, writes", [("sd15", False), ("flux", True)])
def test_a_trial_shows_whether_a_network_writes_in_place(family, writes):
    """And leaves neither gradients nor a step behind."""
    training, _ = start(reachable(small_model(family)), settings())
    with torch.inference_mode(False):
        training.trial()
    assert training.writes_in_place is writes
    assert training.progress.step == 0 and all(parameter.grad is None for parameter in training.parameters.values())
    assert not training.optimizer.state


def test_checkpointing_leaves_no_trace_after_an_error():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model = torch.nn.Module()
    model.block, model.forward = network, lambda x: x
    with pytest.raises(ZeroDivisionError):
        with checkpointed(model, True):
            assert "forward" in vars(network[0])
            1 / 0
    assert "forward" not in vars(network[0])


def test_no_error_passes_through_torchs_checkpoint(monkeypatch):
    """Torch before 2.13 would leave its hooks on saved tensors behind; the error still comes out, and with it no gradient."""
    def strict(function, *args, use_reentrant):
        try:
            return checkpoint(function, *args, use_reentrant=use_reentrant)
        except BaseException as error:
            raise AssertionError("an error came out of the function that checkpoint was given") from error

    monkeypatch.setattr(checkpointing, "checkpoint", strict)

    class Failing(torch.nn.Module):
        def forward(self, x):
            raise MemoryError("none left")

    model = torch.nn.Module()
    model.block = torch.nn.Sequential(Failing())
    with checkpointed(model, True), torch.enable_grad(), pytest.raises(MemoryError, match="none left"):
        model.block[0](torch.ones(2, requires_grad=True))


def test_each_image_has_its_own_prompt():
    """A batch of two prompts gives the mean of the two losses one by one; core's node would mix the prompts."""
    small = small_model("sdxl")
    training, _ = start(small, settings())
    both = gradients(training)
    draw, data = training.data.draw(2, step_seed(0, 0)), training.data
    assert draw.conditions.unique().numel() == 2
    alone = []
    for row in range(2):
        part = type(draw)(*(value[row : row + 1] for value in vars(draw).values()))
        training.data = type("One", (), {"draw": lambda self, *_: part, "latents": data.latents, "conditions": data.conditions})()
        alone.append(gradients(training))
    for name, value in both.items():
        assert torch.allclose(value, (alone[0][name] + alone[1][name]) / 2, rtol=1e-3, atol=1e-6), name
