"""Flaw-aware training: the two-phase rule, equality with ordinary training, resuming, and a model left as it was."""

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.fam.checkpointing import KeepWhatWasSaved, checkpointed
from artifact_guard.nodes.fam.flaw_aware import Watcher
from artifact_guard.nodes.fam.lora_adapters import LoRAWeights, training_copy
from artifact_guard.nodes.fam.lora_settings import decay_at, step_seed
from artifact_guard.nodes.fam.lora_state import describe, restore, run_tensors
from artifact_guard.nodes.fam.phases import Phases
from artifact_guard.nodes.fam.train_steps import output_factor
from artifact_guard.nodes.fam.training_data import LatentData
from artifact_guard.nodes.fam.weight_average import WeightAverage
from comfy_extras.nodes_train import TrainGuider, TrainSampler

from tests.small_models import sample, small_model
from tests.unit.fam_lora_support import equal, run_until, settings, smooth_latents, start, trained


def test_phases_by_hand():
    phases = Phases.of(10, 0.4, 3)
    assert [phases.refining(step) for step in range(10)] == [False] * 4 + [True] * 6
    assert [step for step in range(10) if phases.map_due(step)] == [4, 7]
    assert [phases.stretch_end(step) for step in range(10)] == [4, 4, 4, 4, 7, 7, 7, 10, 10, 10]
    assert (phases.maps(0), phases.maps(5), phases.maps(8)) == (2, 1, 0)
    assert Phases.of(10, 1.0, 3).maps(0) == 0 and Phases.of(10, 0.0, 3).map_due(0)


def test_a_draw_depends_on_seed_and_step_alone():
    data = LatentData(torch.zeros(5, 4, 8, 8), [], torch.zeros(5, dtype=torch.long))
    one, again, other = (data.draw(7, step_seed(3, step)) for step in (11, 11, 12))
    assert torch.equal(one.noise, again.noise) and torch.equal(one.indices, again.indices)
    assert not torch.equal(one.noise, other.noise)
    assert sorted(one.indices[:5].tolist()) == list(range(5)), "every latent once before any comes twice"
    assert step_seed(2**64 - 1, 10) < 2**63


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


def test_strength_zero_is_ordinary_training_bit_for_bit():
    assert equal(trained(attention_strength=0.0), trained(base_fraction=1.0))
    assert not equal(trained(attention_strength=0.025), trained(base_fraction=1.0))


def test_the_base_phase_knows_no_map():
    small = small_model("sd15")
    runs = []
    for strength in (0.0, 0.5):
        training, _ = start(small, settings(attention_strength=strength))
        run_until(training, 3)
        runs.append(run_tensors(training))
    assert equal(*runs) and "flaw_map" not in runs[0]


def test_maps_are_renewed_when_due_and_come_from_the_average():
    """The batch is sampled from the averaged weights, and the weights in training are back afterwards."""
    training, _ = start(small_model("sd15"), settings(8, base_fraction=0.25, map_every=3))
    name, parameter = next(iter(training.parameters.items()))
    seen, samples = [], training.sampling.samples

    def looked(model, seed):
        seen.append(torch.equal(parameter.data, training.average.values[name]))
        return samples(model, seed)

    training.sampling.samples = looked
    own = []
    training.run(Watcher(after_map=lambda step, batch: own.append((step, torch.equal(parameter.data, training.average.values[name])))))
    assert seen == [True, True] and own == [(2, False), (5, False)]
    assert [step for step, _ in training.progress.judged] == [2, 5]


def test_noise_is_amplified_on_pixels_and_wrappers_of_the_user_see_it():
    """x = a x0 + b (eps + lambda M): seen by a wrapper on the model that was given, which stays active in training."""
    model, _ = load_demo_model()
    seen = []

    def watch(executor, x, t, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append((x.detach().clone(), t.clone()))
        return executor(x, t, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", watch)

    class Demo:
        def latent(self):
            return {"samples": torch.zeros(1, 3, 32, 32)}

        def conditioning(self, seed):
            return [[class_token(seed), {}]]

    training, _ = start(Demo(), settings(4, noise_strength=0.3, attention_strength=0.0), watched)
    training.run()
    assert len(seen) == 4 and training.progress.flaw_map.max() > 0
    sampling = model.get_model_object("model_sampling")
    for step, (x, sigma) in enumerate(seen):
        draw = training.data.draw(2, step_seed(0, step))
        noise = draw.noise + (0.3 * training.progress.flaw_map if step >= 2 else 0.0)
        assert torch.equal(x, sampling.noise_scaling(sigma, noise, training.data.latents[draw.indices], False)), step


def test_noise_is_left_alone_on_latents():
    assert equal(trained(noise_strength=0.5), trained(noise_strength=0.0))


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_interrupted_and_resumed_equals_uninterrupted(stop):
    """Stopped in the base phase, at its border, between two maps, and where a map is due."""
    small = small_model("sd15")
    whole, _ = start(small, settings())
    whole.run()
    part, _ = start(small, settings())
    run_until(part, stop)
    tensors, state = run_tensors(part), describe(part, 3) | {"step": stop, "judged": part.progress.judged}
    resumed, _ = start(small, settings())
    restore(resumed, tensors, state, "file")
    resumed.run()
    assert equal(run_tensors(whole), run_tensors(resumed))
    assert whole.progress.judged == resumed.progress.judged and whole.progress.losses == resumed.progress.losses


def test_a_longer_resumed_run_keeps_its_phase_border():
    small = small_model("sd15")
    part, _ = start(small, settings(6))
    run_until(part, 2)
    state = describe(part, 3) | {"step": 2, "judged": []}
    longer, _ = start(small, settings(10))
    restore(longer, run_tensors(part), state, "file")
    assert longer.phases.base_steps == 3 and longer.phases.stretch_end(2) == 3


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_given_is_unchanged_bit_for_bit(patched):
    """Its weights, flags and samples; also when a LoRA's patches are in its weights as training begins."""
    small = small_model("sd15")
    model = small.model
    if patched:
        key = "diffusion_model.middle_block.1.proj_in.weight"
        weight = model.model.state_dict()[key]
        model = model.clone()
        model.add_patches({key: (torch.ones_like(weight),)}, 0.1)
    before = sample(small, model)
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    flags = [(module.training, "forward" in vars(module)) for module in model.model.modules()]
    training, weights = start(small, settings(), model)
    training.run()
    assert equal(state, model.model.state_dict()) or patched
    assert flags == [(module.training, "forward" in vars(module)) for module in model.model.modules()]
    assert torch.equal(before, sample(small, model))
    if patched:
        copied = training.model.model.state_dict()[key]
        assert torch.allclose(copied, weight + 0.1), "the copy has the patch once"
        model.detach()
        assert torch.equal(model.model.state_dict()[key], weight)
    weights.remove()
    assert all(module.forward == type(module).forward.__get__(module) for module in training.model.model.modules())


@pytest.mark.parametrize("family", ["sdxl", "flux", "chroma", "sd3", "wan", "ltxv"])
def test_checkpointing_changes_no_gradient(family):
    """With the attention patch on. Blocks computed again see the same options; flux and ltxv write in place."""
    small = small_model(family)
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


def test_checkpointing_leaves_no_trace_after_an_error():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model = torch.nn.Module()
    model.block, model.forward = network, lambda x: x
    with pytest.raises(ZeroDivisionError):
        with checkpointed(model, True):
            assert "forward" in vars(network[0])
            1 / 0
    assert "forward" not in vars(network[0])


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


def test_average_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage({"w": parameter})
    parameter.data.fill_(2.0)
    average.update(0.75)
    assert average.values["w"].item() == 1.25
    with pytest.raises(ZeroDivisionError):
        with average.standing_in():
            assert parameter.item() == 1.25
            1 / 0
    assert parameter.item() == 2.0
    assert [round(decay_at(step, 0.9), 3) for step in (0, 8, 1000)] == [0.1, 0.5, 0.9]


def test_lora_starts_as_nothing_and_depends_on_its_seed():
    small = small_model("sd15")
    with torch.inference_mode(False):
        state = torch.get_rng_state()
        loras = [LoRAWeights(training_copy(small.model), 2, seed) for seed in (0, 0, 1)]
        assert torch.equal(state, torch.get_rng_state()), "the global random numbers are left alone"
    values = [lora.lora(lora.parameters) for lora in loras]
    assert equal(values[0], values[1]) and not equal(values[0], values[2])
    down, up = ([v for k, v in values[0].items() if part in k] for part in ("lora_down", "lora_up"))
    assert all((d == 0).all() for d in down) and all((u != 0).any() for u in up)


def test_smooth_latents_are_of_the_family():
    assert smooth_latents(small_model("qwen_image"))["samples"].ndim == 5
