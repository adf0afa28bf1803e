"""The time predictor and its training: any size and channels, seeded, resumable, kept when cancelled."""

from dataclasses import replace
from unittest import mock

import comfy.latent_formats as latent_formats
import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from artifact_guard.nodes.demo.model import load_demo_model
from artifact_guard.nodes.latents import image_channels
from artifact_guard.nodes.tag import train_node
from artifact_guard.nodes.tag.compatibility import kind_of
from artifact_guard.nodes.tag.levels import Schedule, alpha_and_variance
from artifact_guard.nodes.tag.predictor import (
    PER_CHANNEL, TimeNetwork, build_network, cosine_filters, evening_map, initial_weights,
)
from artifact_guard.nodes.tag.predictor_files import load_predictor, save_predictor
from artifact_guard.nodes.tag.schema import TAGTrainTimePredictor
from artifact_guard.nodes.tag.training import TrainingData, held_out_time_gap, log_posterior, noised, shared_between_classes

from tests.exact.denoiser import ExactDenoiser
from tests.exact.model import conditioning, exact_model
from tests.exact.time_posterior import log_time_posterior
from tests.small_models import not_in_this_release, small_model
from tests.unit.tag_support import fresh_predictor, guide, images, model, trainer


def steps(work, count):
    return [work.step() for _ in range(count)]


def weights(predictor):
    return predictor.network.state_dict()


def equal(one, other):
    """Bit for bit; on a GPU, whose sums have no fixed order, within rounding."""
    exact = comfy.model_management.get_torch_device().type == "cpu"
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, atol=1e-4)
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def train_node_run(patcher=None, latents=None, **settings):
    widgets = {"steps": 3, "batch_size": 8, "learning_rate": 1e-4, "seed": 0} | settings
    latents = {"samples": images()} if latents is None else latents
    given = widgets | {"model": patcher or model()}
    with torch.inference_mode():
        return TAGTrainTimePredictor.execute(
            latents=latents if isinstance(latents, list) else [latents], **{name: [value] for name, value in given.items()}).result


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 4, 64, 64), (1, 16, 17, 33), (2, 128, 5, 2)])
def test_network_takes_any_size_and_channels(shape):
    weights = initial_weights(shape[1], 64, 0, seed=1)
    network = build_network(weights, shape[1], 64, 0)
    assert network(torch.randn(shape)).shape == (shape[0], 64)
    assert network(torch.randn(shape).half()).dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_network_is_small():
    """As the help page says, whatever the image's size."""
    assert sum(parameter.numel() for parameter in TimeNetwork(3).parameters()) == 235_075


def test_filters_are_orthonormal_and_noise_is_the_same_at_every_scale():
    filters = cosine_filters().flatten(1)
    assert torch.allclose(filters @ filters.T, torch.eye(9), atol=1e-6)
    noise = torch.randn(4, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    energies = build_network(initial_weights(4, 8, 0, 0), 4, 8, 0).energies(noise)
    assert energies.shape == (4, 4 * PER_CHANNEL)
    flattest = slice(40, 48)
    of_scales = torch.cat([energies[:, :40], energies[:, 48:]], dim=1).unflatten(1, (3, 40))
    assert of_scales.mean(dim=(0, 2)).abs().max() < 0.01
    wanted = 0.5 * torch.tensor([8 / 6, 64 / 24]).log().repeat_interleave(4)
    assert (energies[:, flattest].mean(dim=0) - wanted).abs().max() < 0.05, "1 / w, 1 / w^2 of chi-squared of 8, over 8"


def test_flattest_windows_tell_the_noise_whatever_the_rest_of_the_picture():
    """A quarter of strong stripes: mean squares see them, the quotient of the two means does not."""
    random = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(8, 1, 64, 64, generator=random)
    striped = noise.clone()
    striped[..., :16] += torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)
    network = build_network(initial_weights(1, 8, 0, 0), 1, 8, 0)
    bare, other = (network.energies(u).mean(dim=0) for u in (noise, striped))
    assert (other[:10] - bare[:10]).max() > 1
    assert ((other[11] - other[10]) - (bare[11] - bare[10])).abs() < 0.02


def test_evening_turns_energies_to_axes_of_lesser_unevenness():
    """Uncorrelated, about 0, in order, of variance spread^(1 - 2 * 0.2)."""
    random = torch.Generator().manual_seed(0)
    common, own = torch.randn(500, 1, generator=random), torch.randn(500, 6, generator=random)
    energies = 3.0 + 2.0 * common + 0.05 * own
    weight, bias = evening_map(energies, 4)
    even = energies @ weight.T + bias
    covariance = even.T @ even / len(even)
    spread = torch.linalg.eigvalsh(torch.cov(energies.T, correction=0)).flip(0)[:4]
    assert weight.shape == (4, 6) and even.mean(dim=0).abs().max() < 1e-4
    assert torch.allclose(covariance, torch.diag(spread ** 0.6), atol=1e-3)


def test_training_evens_the_energies_once():
    work = trainer(fresh_predictor(model()))
    steps(work, 2)
    begun, later = (weights(p)["even.weight"] for p in (fresh_predictor(model()), work.result()))
    assert torch.equal(begun, torch.eye(96)) and not torch.equal(later, begun)
    other = trainer(work.result(), frames=images(5))
    steps(other, 2)
    assert torch.equal(weights(other.result())["even.weight"], later)


def test_a_condition_changes_the_answer_and_none_is_none():
    weights = initial_weights(3, 16, 5, seed=1)
    weights["head.weight"] = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    network = build_network(weights, 3, 16, 5)
    u = torch.randn(2, 3, 16, 16)
    none = network(u)
    assert torch.equal(none, network(u, torch.zeros(1, 5)))
    assert not torch.allclose(none, network(u, torch.ones(1, 5)))


def test_training_learns_levels():
    """150 small steps bring the loss from chance, ln 256 = 5.55 and more, to near what noise allows, and the held-out
    gap far under a guess's 250."""
    bare = model()
    work = trainer(fresh_predictor(bare), rate=2e-4, batch=32)
    losses = steps(work, 150)
    assert losses[0] > 5.5 and sum(losses[-20:]) / 20 < 4.6
    predictor = work.result()
    schedule = Schedule.of(bare.get_model_object("model_sampling"))
    assert held_out_time_gap(predictor.network, predictor.levels, TrainingData(images()), schedule) < 100


def held_frames(count, clips=None):
    """Which of so many frames are held out."""
    frames = torch.arange(count).float().reshape(-1, 1, 1, 1)
    kept, held = TrainingData(frames, frames.flatten(1), clips).split()
    kept, held = ([int(value) for value in part.frames.flatten()] for part in (kept, held))
    assert sorted(kept + held) == list(range(count))
    return held


def test_a_tenth_is_held_out_by_its_place():
    """Of samples that come in a round of ten kinds some of every kind; with more samples after them nearly the same."""
    assert [len(held_frames(count)) for count in (2, 3, 14, 16, 1000)] == [1, 1, 1, 2, 100]
    held = held_frames(1000)
    assert all(6 <= sum(place % 10 == kind for place in held) <= 14 for kind in range(10))
    assert len(set(held) & set(held_frames(1300))) >= 97


def test_frames_of_one_clip_lie_on_one_side():
    held = held_frames(160, torch.arange(20).repeat_interleave(8))
    assert len(held) == 16 and {place // 8 for place in held} == {held[0] // 8, held[-1] // 8}
    assert held_frames(20, torch.zeros(20, dtype=torch.int64)) == [18, 19]


def test_the_node_holds_out_whole_clips_whatever_the_seed(monkeypatch):
    """Two videos of four frames: one of them."""
    held, judged = [], train_node.judged
    monkeypatch.setattr(train_node, "judged", lambda p, data, schedule: held.append(data.frames) or judged(p, data, schedule))
    videos = images(8).unflatten(0, (2, 4)).movedim(1, 2)
    for seed in (0, 1):
        train_node_run(latents={"samples": videos}, steps=1, seed=seed)
    assert torch.equal(*held) and any(torch.equal(held[0], clip) for clip in images(8).split(4))


def test_held_out_gap_of_a_perfect_judge_is_its_grid():
    """The exact posterior of the data finds every time up to 500 within a few of 1000."""
    schedule = Schedule.of(model().get_model_object("model_sampling"))
    levels, denoiser = schedule.grid(), ExactDenoiser(images(), 1e-3)
    sigmas = torch.exp(-0.5 * levels.double())
    gap = held_out_time_gap(
        lambda u, condition: log_time_posterior(denoiser, u, sigmas), levels, TrainingData(images()), schedule,
        draws=64, latest=500.0)
    assert 0.3 < gap < 12


def test_noised_frames_lie_at_their_class():
    levels = torch.linspace(-4, 6, 11)
    u, level = noised(torch.zeros(2000, 1, 4, 4), levels, torch.Generator().manual_seed(0))
    labels = (level - levels[0]).round().long()
    assert labels.min() == 0 and labels.max() == 10
    for label in (2, 5, 8):
        variance = u[labels == label].var().item()
        assert variance == pytest.approx(torch.sigmoid(-levels[label]).item(), rel=0.15)


def test_log_posterior_is_the_gaussian_density_of_each_level():
    levels, level = torch.linspace(-5, 7, 9), torch.tensor([-5.0, 0.3, 6.8])
    frames, noise = images(3), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alpha, variance = (value.reshape(-1, 1, 1, 1) for value in alpha_and_variance(level))
    u = alpha * frames + variance.sqrt() * noise
    found = log_posterior(u, frames, level, levels).log_softmax(dim=1)
    densities = []
    for at in levels.double():
        a, v = alpha_and_variance(at)
        densities.append(torch.distributions.Normal(a * frames.double(), v.sqrt()).log_prob(u.double()).sum(dim=(1, 2, 3)))
    wanted = torch.stack(densities, dim=1).log_softmax(dim=1)
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=0.01)


def test_targets_are_shared_by_the_two_nearest_classes():
    shares = shared_between_classes(torch.tensor([0.0, 1.25, 3.0]), 4)
    assert torch.allclose(shares, torch.tensor([[1, 0, 0, 0], [0, 0.75, 0.25, 0], [0, 0, 0, 1.0]]))


def test_interrupted_and_gone_on_with_equals_uninterrupted():
    """Weights, averages and Adam's moments, bit for bit."""
    whole = trainer(fresh_predictor(model()))
    steps(whole, 6)
    first = trainer(fresh_predictor(model()))
    steps(first, 2)
    second = trainer(first.result())
    steps(second, 4)
    one, other = whole.result(), second.result()
    assert one.steps == other.steps == 6 and equal(weights(one), weights(other)) and one.identity == other.identity
    assert equal(one.training.weights, other.training.weights) and equal(one.training.second, other.training.second)


def test_going_on_leaves_the_predictor_it_began_with():
    first = trainer(fresh_predictor(model()))
    steps(first, 2)
    before = first.result()
    copies = {name: weight.clone() for name, weight in weights(before).items()}
    second = trainer(before)
    steps(second, 2)
    assert equal(weights(before), copies) and second.result().identity != before.identity


def test_average_follows_the_weights():
    work = trainer(fresh_predictor(model()))
    steps(work, 12)
    predictor = work.result()
    assert not equal(weights(predictor), predictor.training.weights)


def test_node_trains_and_shows(monkeypatch):
    """Same seed, same predictor; another seed, another; live previews; what it is for."""
    shown = []
    monkeypatch.setattr(train_node, "PREVIEW_EVERY", 2)
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda *a: shown.append(a[1:]))
    one, curve, gap = train_node_run()
    assert equal(weights(one), weights(train_node_run()[0])) and one.identity != train_node_run(seed=1)[0].identity
    assert curve.shape[0] == 1 and 0 < gap < 1000 and one.steps == 3 and one.kind == kind_of(model())
    assert [s[0] for s in shown[:3]] == [1, 2, 3] and shown[0][2] is None and shown[1][2][0] == "JPEG"
    further, _, _ = train_node_run(time_predictor=one)
    assert further.steps == 6


def last_picture(monkeypatch, **settings):
    """Whether the last live picture is the curve that comes out."""
    seen = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, *told: seen.append(told))
    curve = train_node_run(**settings)[1]
    done, total, (kind, picture, _) = seen[-1]
    assert done == total and kind == "JPEG"
    return np.array_equal(np.asarray(picture), (curve[0].numpy() * 255).astype(np.uint8))


def test_the_last_picture_on_the_page_is_the_curve_that_comes_out(monkeypatch):
    """The page keeps the last live picture of a node; so after a cancel."""
    assert last_picture(monkeypatch)
    steps = iter(range(100))
    real = train_node.Trainer.step

    def step(self):
        comfy.model_management.interrupt_current_processing(next(steps) == 2)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_node.Trainer, "step", step)
        assert last_picture(patch, steps=49)


def test_cancelling_keeps_what_was_learned(monkeypatch, caplog):
    """Cancelled in its third step, the node gives the predictor of two steps; the flag is taken down."""
    real, calls = train_node.Trainer.step, []

    def step(self):
        calls.append(None)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing(True)
        return real(self)

    def fingerprint(**more):
        """As ComfyUI asks for it: widgets in lists, nothing of what is wired."""
        widgets = {"steps": 50, "batch_size": 8, "learning_rate": 1e-4, "seed": 0} | more
        wired = {name: (None,) for name in ("model", "latents", "conditioning", "time_predictor")}
        return TAGTrainTimePredictor.fingerprint_inputs(**{name: [value] for name, value in widgets.items()}, **wired)

    expected, before = train_node_run(steps=2)[0], fingerprint()
    monkeypatch.setattr(train_node.Trainer, "step", step)
    with caplog.at_level("INFO"):
        predictor, _, gap = train_node_run(steps=50)
    assert predictor.steps == 2 and equal(weights(predictor), weights(expected)) and gap > 0
    assert "Cancelled after 2 of 50 steps; what was learned is kept" in caplog.text
    assert fingerprint() != before and fingerprint(seed=1) == before, "the next Run of this node trains again"
    comfy.model_management.throw_exception_if_processing_interrupted()
    monkeypatch.undo()
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train_node_run()


@pytest.mark.parametrize("place", ["a step", "judging"])
def test_an_error_loses_nothing(place, monkeypatch, caplog):
    """Out of memory in the third step, or when it is judged: what was learned is in a new file that can be gone on with. In the
    first step there is nothing to keep."""
    def fail(*_):
        raise RuntimeError("out of memory")

    def files():
        return set(folder_paths.get_filename_list("time_predictors"))

    real, calls, before = train_node.Trainer.step, [], files()

    def step(self):
        calls.append(None)
        return fail() if len(calls) == 3 else real(self)

    if place == "a step":
        monkeypatch.setattr(train_node.Trainer, "step", step)
    else:
        monkeypatch.setattr(train_node, "held_out_time_gap", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_node_run(steps=50 if place == "a step" else 2)
    (new,) = files() - before
    assert new.startswith("interrupted") and new in caplog.text
    monkeypatch.undo()
    assert load_predictor(new).steps == 2 and equal(weights(load_predictor(new)), weights(train_node_run(steps=2)[0]))
    monkeypatch.setattr(train_node.Trainer, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_node_run()
    assert files() == before | {new}


@pytest.mark.parametrize("shape", [(3, 4, 5, 16, 16), (4, 16, 9, 12)])
def test_video_and_odd_sizes_train(shape):
    bare = exact_model(torch.rand(3, *shape[1:]) * 2 - 1, "flow")
    predictor, _, _ = train_node_run(bare, {"samples": torch.randn(shape)})
    assert predictor.kind.channels == shape[1] and predictor.size == shape[-2:]


def test_conditions():
    """One for each latent or one for all, of any length of tokens; a predictor keeps to its kind."""
    tokens = [[torch.randn(1, 7, 5), {}] for _ in range(12)]
    predictor, _, _ = train_node_run(conditioning=tokens)
    assert predictor.condition_dim == 5
    assert train_node_run(conditioning=tokens[:1])[0].condition_dim == 5
    with pytest.raises(ValueError, match="conditioning: 3 conditions came for 12 latents. Give one"):
        train_node_run(conditioning=tokens[:3])
    with pytest.raises(ValueError, match="takes conditions of width 5 .* and width 1 came"):
        train_node_run(conditioning=conditioning(), time_predictor=predictor)
    with pytest.raises(ValueError, match="width 0 came"):
        train_node_run(time_predictor=predictor)


def test_many_latents_train_as_one_batch_does():
    """As from a folder: a list of latents, each with its condition. The same predictor as from a batch."""
    tokens = [[torch.full((1, 3, 2), float(number)), {}] for number in range(12)]
    listed = [{"samples": image[None]} for image in images()]
    assert equal(weights(train_node_run(latents=listed)[0]), weights(train_node_run()[0]))
    given = {name: [value] for name, value in {"steps": 3, "batch_size": 8, "learning_rate": 1e-4, "seed": 0}.items()}
    one = TAGTrainTimePredictor.execute(
        model=[model()], latents=listed, conditioning=[[entry] for entry in tokens], **given).result[0]
    assert one.condition_dim == 2 and equal(weights(one), weights(train_node_run(conditioning=tokens)[0]))
    videos = [{"samples": torch.randn(1, 3, frames, 16, 16)} for frames in (2, 3)]
    data = train_node.training_data(model(), videos, tokens[:2])
    assert len(data.frames) == 5 and data.conditions[:, 0].tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="several sizes came, such as 16x16 and 24x16 latent pixels. Crop or scale"):
        train_node_run(latents=[*listed, {"samples": torch.randn(1, 3, 16, 24)}])


def with_nan():
    samples = images().clone()
    samples[3, 0, 2, 2] = float("nan")
    return samples


@pytest.mark.parametrize("samples, message", [
    (torch.zeros(0, 3, 16, 16), "latents: an empty batch"),
    (torch.zeros(1, 3, 16, 16), "latents: a single one came. At least two are wanted"),
    (torch.zeros(4, 3, 16), "without an image part"),
    (torch.zeros(4, 4, 16, 16), "4 channels and this model works on 3"),
    (with_nan(), "NaN or infinite values"),
])
def test_bad_latents_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        train_node_run(latents={"samples": samples})


def test_latents_go_through_process_latent_in():
    """A format that scales: the predictor is trained on what the model works on, not on the LATENT's numbers."""
    bare = model()
    bare.model.latent_format.scale_factor = 0.5
    data = train_node.training_data(bare, [{"samples": images()}], None)
    assert torch.allclose(data.frames, images() * 0.5)


@pytest.mark.parametrize("other, message", [
    (lambda: model("flow"), "prediction type EPS, while the model has FLOW"),
    (lambda: exact_model(torch.rand(3, 4, 16, 16), "eps"), "latent channels 3, while the model has 4"),
    (lambda: model("eps", sampling_settings={"linear_start": 1e-5, "linear_end": 0.1}), "noise schedule log-SNR"),
])
def test_a_predictor_for_another_model_is_refused(other, message):
    with pytest.raises(ValueError, match=f"time_predictor: this predictor .*{message}.* Train one for this model"):
        guide(other(), fresh_predictor(model("eps")))


def test_a_predictor_for_another_latent_format_of_as_many_channels_is_refused():
    demo, _ = load_demo_model()
    with pytest.raises(ValueError, match="latent format PixelLatent, while the model has PixelFormat"):
        guide(model("v"), fresh_predictor(demo))
    with pytest.raises(ValueError, match="latent format PixelLatent, while the model has PixelFormat"):
        train_node_run(model("v"), time_predictor=fresh_predictor(demo))


def test_shift_of_a_flow_model_is_no_other_schedule():
    """The levels are log-SNRs: the shift for another resolution does no harm."""
    predictor = fresh_predictor(model("flow", sampling_settings={"shift": 1.0}))
    for shift in (1.6, 3.0, 8.0):
        guide(model("flow", sampling_settings={"shift": shift}), predictor)
    predictor.kind = replace(predictor.kind, schedule=tuple(0.4 * level for level in predictor.kind.schedule))
    with pytest.raises(ValueError, match="noise schedule"):
        guide(model("flow", sampling_settings={"shift": 1.0}), predictor)


@pytest.mark.parametrize(
    ("conditioning", "words"),
    [
        ([], "no condition came"),
        ([[None, {}]], "without text encoder output"),
        ([[torch.randn(1, 5), {}]], "without text encoder output"),
        ([[torch.full((1, 7, 5), torch.nan), {}]], "NaN"),
        ([[torch.randn(1, 7, 5), {}], [torch.randn(1, 7, 6), {}]], "widths 5 and 6 came"),
    ],
)
def test_conditions_that_are_none_are_told(conditioning, words):
    with pytest.raises(ValueError, match=f"conditioning: .*{words}"):
        train_node_run(conditioning=conditioning)


def test_values_that_no_latent_has_are_told():
    with pytest.raises(ValueError, match="latents: values up to 1e[+]25 came"):
        train_node_run(latents={"samples": torch.full((4, 3, 16, 16), 1e25)})


def test_pictures_are_videos_of_one_frame_to_a_video_model():
    """As core's VAE Encode gives them for Qwen-Image, and its Empty Latent Image."""
    small = small_model("qwen_image")
    pictures = torch.randn(4, small.channels, 16, 16)
    predictor, _, _ = train_node_run(small.model, {"samples": pictures})
    again, _, _ = train_node_run(small.model, {"samples": pictures.unsqueeze(2)})
    assert predictor.kind.channels == small.channels and equal(weights(predictor), weights(again))


def test_training_that_learned_nothing_says_so(caplog):
    caplog.set_level("INFO")
    train_node_run(learning_rate=1.0, steps=3)
    assert "No better than a guess: train longer, or with a lower learning_rate" in caplog.text


def test_a_predictor_that_is_no_number_is_not_saved(tmp_path):
    predictor = fresh_predictor(model())
    with torch.inference_mode(False), torch.no_grad():
        next(predictor.network.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="time_predictor: .* holds NaN .* was not saved.*lower learning_rate"):
        save_predictor(predictor, "broken")


def test_a_format_of_video_with_audio_is_trained_on_its_videos_channels():
    """MiniMax H3's format says the 32 channels of its audio; its video has 24, as many as its previews have factors."""
    if not hasattr(latent_formats, "MiniMaxH3AV"):
        not_in_this_release("has no MiniMaxH3AV")
    patcher = small_model("wan").model.clone()
    patcher.add_object_patch("latent_format", latent_formats.MiniMaxH3AV())
    latents = {"samples": torch.randn(4, 24, 2, 8, 8, generator=torch.Generator().manual_seed(0))}
    with mock.patch.object(patcher.model, "latent_format", latent_formats.MiniMaxH3AV()):
        predictor = train_node_run(patcher, latents, steps=2)[0]
    assert predictor.kind.channels == predictor.network.channels == 24
    with pytest.raises(ValueError, match="has 32 channels and this model works on 24"):
        train_node_run(patcher, {"samples": torch.zeros(4, 32, 2, 8, 8)})


def test_channels_of_every_format_of_core():
    kinds = [kind for kind in vars(latent_formats).values() if isinstance(kind, type) and issubclass(kind, latent_formats.LatentFormat)]
    apart = {kind.__name__ for kind in kinds if image_channels(kind()) != kind().latent_channels}
    assert len(kinds) > 20 and apart <= {"MiniMaxH3AV"}


@pytest.mark.parametrize("settings, words", [
    ({"steps": 0}, "steps is 0"), ({"batch_size": 0}, "batch_size is 0"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"), ({"learning_rate": float("nan")}, "learning_rate is nan"),
])
def test_numbers_that_came_over_a_wire_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        train_node_run(**settings)


def test_empty_latents_are_refused():
    """A whole batch of an Empty Latent; one picture of one colour among others is no mistake."""
    flat = torch.zeros(8, 3, 16, 16)
    with pytest.raises(ValueError, match="one value everywhere, as an Empty Latent"):
        train_node.training_data(model("eps"), [{"samples": flat}], None)
    assert len(train_node.training_data(model("eps"), [{"samples": flat[:1]}, {"samples": flat[:1] + 0.5}], None).frames) == 2
