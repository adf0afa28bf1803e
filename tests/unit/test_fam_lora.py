"""Flaw-aware training: the two-phase rule, maps, the average, resuming, and a model left as it was."""

import comfy.patcher_extension
import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.fam.flaw_aware import Watcher
from artifact_guard.nodes.fam.lora_adapters import LoRAWeights, training_copy
from artifact_guard.nodes.fam.lora_settings import decay_at, step_seed
from artifact_guard.nodes.fam.lora_state import describe, restore, run_tensors
from artifact_guard.nodes.fam.phases import Phases
from artifact_guard.nodes.fam.training_data import LatentData
from artifact_guard.nodes.fam.weight_average import WeightAverage

from tests.small_models import sample, shallow_sd15, small_model
from tests.unit.fam_lora_support import equal, run_until, settings, smooth_latents, start, trained

pytestmark = pytest.mark.usefixtures("repeatable")


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


def test_strength_zero_is_ordinary_training_bit_for_bit():
    ordinary, off, on = trained(base_fraction=1.0), trained(attention_strength=0.0), trained(attention_strength=0.025)
    weights = [{name: value for name, value in run.items() if name.startswith("weights.")} for run in (ordinary, off, on)]
    assert equal(ordinary, off) and equal(weights[0], weights[1]) and not equal(weights[0], weights[2])


def test_the_base_phase_knows_no_map():
    small = shallow_sd15()
    runs = []
    for strength in (0.0, 0.5):
        training, _ = start(small, settings(attention_strength=strength))
        run_until(training, 3)
        runs.append(run_tensors(training))
    assert equal(*runs) and "flaw_map" not in runs[0]


def test_maps_are_renewed_when_due_and_come_from_the_average():
    """The batch is sampled from the averaged weights, and the weights in training are back afterwards."""
    training, _ = start(shallow_sd15(), settings(8, base_fraction=0.25, map_every=3))
    name, parameter = next(iter(training.parameters.items()))
    seen, samples = [], training.sampling.samples

    def looked(model, seed):
        seen.append(torch.equal(parameter.data, training.average.values[name]))
        return samples(model, seed)

    training.sampling.samples = looked
    own = []

    def after_map(step, batch):
        own.append((step, torch.equal(parameter.data, training.average.values[name])))

    training.run(Watcher(after_map=after_map))
    assert seen == [True, True] and own == [(2, False), (5, False)]
    assert [step for step, _ in training.progress.judged] == [2, 5]


def test_noise_is_amplified_on_pixels_and_wrappers_of_the_user_see_it():
    """x = a x0 + b (eps + lambda M): seen by a wrapper on the model that was given, which stays active in training."""
    model, _ = load_demo_model()
    seen = []

    def watch(executor, x, t, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append((x.detach().clone().cpu(), t.clone().cpu()))
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


@pytest.fixture(scope="module")
def uninterrupted():
    """A whole run: its tensors, when its maps were judged, its losses."""
    whole, _ = start(shallow_sd15(), settings())
    whole.run()
    return run_tensors(whole), whole.progress.judged, whole.progress.losses


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_interrupted_and_resumed_equals_uninterrupted(stop, uninterrupted):
    """Stopped in the base phase, at its border, between two maps, and where a map is due."""
    small = shallow_sd15()
    part, _ = start(small, settings())
    run_until(part, stop)
    tensors, state = run_tensors(part), describe(part, 3) | {"step": stop, "judged": part.progress.judged}
    resumed, _ = start(small, settings())
    restore(resumed, tensors, state, "file")
    resumed.run()
    whole, judged, losses = uninterrupted
    assert equal(whole, run_tensors(resumed))
    assert judged == resumed.progress.judged and losses == resumed.progress.losses


def test_a_longer_resumed_run_keeps_its_phase_border():
    small = shallow_sd15()
    part, _ = start(small, settings(6))
    run_until(part, 2)
    state = describe(part, 3) | {"step": 2, "judged": []}
    longer, _ = start(small, settings(10))
    restore(longer, run_tensors(part), state, "file")
    assert longer.phases.base_steps == 3 and longer.phases.stretch_end(2) == 3


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_given_is_unchanged_bit_for_bit(patched):
    """Its weights, flags and samples; also when a LoRA's patches are in its weights as training begins."""
    small = shallow_sd15()
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
    small = shallow_sd15()
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
