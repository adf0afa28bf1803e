"""The highlighter: judging any image, maps equal to captum's, training that can be cancelled, resumed and explained."""

import comfy.model_management
import folder_paths
import pytest
import torch
from artifact_guard.nodes.fam import session
from artifact_guard.nodes.fam.augment import augment, jpeg
from artifact_guard.nodes.fam.grad_cam import flaw_map, grad_cam, scale_to_one
from artifact_guard.nodes.fam.highlighter import (
    GENERATED, KIND, REAL, FlawHighlighter, HighlighterSettings, fit_images, new_network, take_vgg16_weights,
)
from artifact_guard.nodes.fam.pictures import draw_heat, draw_training
from artifact_guard.nodes.fam.schema import (
    FAMFlawMap, FAMLoadFlawHighlighter, FAMSaveFlawHighlighter, FAMTrainFlawHighlighter,
)
from artifact_guard.nodes.fam.spurious import band_mask, border_mask, check_cues, exchange_band
from artifact_guard.nodes.fam.training import Training, TrainingSettings
from artifact_guard.nodes.model_files import load_model_file, save_model_file
from captum.attr import LayerGradCam

from tests.exact.images import shape_images

CPU = torch.device("cpu")


def images(count=16, size=32, seed=0):
    """IMAGE (count, size, size, 3) of figures."""
    return (shape_images(count, size, 3, seed).movedim(1, -1) + 1) / 2


def spoil(image, size=10, seed=3):
    """Images with a grid of black and white pixels somewhere, and where (B, H, W)."""
    image, where = image.clone(), torch.zeros(image.shape[:3], dtype=torch.bool)
    random = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for index in range(len(image)):
        top, left = torch.randint(image.shape[1] - size, (2,), generator=random).tolist()
        image[index, top : top + size, left : left + size] = ((x // 2 + y // 2) % 2)[..., None].float()
        where[index, top : top + size, left : left + size] = True
    return image, where


def settings(epochs=1, batch_size=8, rate=2e-5, size=32, seed=0, backbone="small"):
    return TrainingSettings(epochs, batch_size, rate, size, seed, backbone)


def highlighter(backbone="small", size=32, seed=0):
    return FlawHighlighter(new_network(backbone, seed), HighlighterSettings(backbone, size))


@pytest.fixture(scope="module")
def learned():
    """A run that has learned to see the grids of `spoil`."""
    real, generated = images(120, seed=1), spoil(images(120, seed=2))[0]
    with torch.inference_mode():
        return session.train_highlighter(real, generated, settings(epochs=14, batch_size=16, size=64))


# Maps

@pytest.mark.parametrize("backbone", ["small", "vgg16"])
def test_grad_cam_equals_captum(backbone):
    """Equal to captum's LayerGradCam on the last convolution's activation, to 1e-5 of the largest value."""
    network = new_network(backbone, 1)
    batch = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(2))
    ours, logits = grad_cam(network, batch)
    captum = LayerGradCam(network, network.last_activation).attribute(batch, target=GENERATED, relu_attributions=True)
    assert captum.abs().max() > 0
    assert torch.allclose(ours, captum[:, 0], atol=1e-5 * captum.max().item(), rtol=1e-5)
    assert torch.allclose(logits, network(batch), atol=1e-5)
    other = LayerGradCam(network, network.last_activation).attribute(batch, target=REAL, relu_attributions=True)
    assert torch.allclose(grad_cam(network, batch, REAL)[0], other[:, 0], atol=1e-5 * other.max().item() + 1e-12)


def test_maps_work_where_nodes_run():
    """Under inference mode, in small batches, on the CPU: MASK of the image's size, 0 to 1."""
    with torch.inference_mode():
        maps, probabilities = flaw_map(highlighter(), images(5, 40), batch=2)
    assert maps.shape == (5, 40, 40) and probabilities.shape == (5,)
    assert maps.min() >= 0 and maps.max() <= 1 and maps.device.type == "cpu"
    assert torch.equal(probabilities, highlighter().generated_probability(images(5, 40)))


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (2, 33, 47, 3), (1, 16, 200, 3), (2, 64, 64, 1), (1, 50, 40, 4), (1, 1, 3, 3)])
def test_images_of_any_size_and_kind(shape):
    image = torch.rand(shape)
    maps, overlay, probability = FAMFlawMap.execute(highlighter(), image, "each image").result
    assert maps.shape == shape[:3] and torch.isfinite(maps).all()
    assert overlay.shape[-1] == 3 and min(overlay.shape[1:3]) >= 256
    assert 0 <= probability <= 1


def test_colours_follow_the_rules_for_grey_and_alpha():
    """Grey is three equal channels, alpha is left out."""
    grey, colour = torch.rand(1, 32, 32, 1), torch.rand(1, 32, 32, 3)
    alpha = torch.cat([colour, torch.rand(1, 32, 32, 1)], dim=-1)
    shape = HighlighterSettings("small", 32)
    assert torch.equal(fit_images(grey, shape), fit_images(grey.expand(-1, -1, -1, 3), shape))
    assert torch.equal(fit_images(alpha, shape), fit_images(colour, shape))


def test_batch_mean():
    """The mean over the batch of the single maps, as the paper's mFAM."""
    batch = images(4)
    each, _, probability = FAMFlawMap.execute(highlighter(), batch, "each image").result
    mean, overlay, same = FAMFlawMap.execute(highlighter(), batch, "batch mean").result
    assert mean.shape == (1, 32, 32) and torch.allclose(mean[0], each.mean(0))
    assert probability == same and len(overlay) == 4


def test_a_map_of_zeros_stays_one():
    maps = torch.stack([torch.zeros(4, 4), torch.full((4, 4), 0.2)])
    assert scale_to_one(maps).amax(dim=(1, 2)).tolist() == [0, 1]


@pytest.mark.parametrize("image, words", [
    (torch.full((1, 8, 8, 3), torch.nan), "image: the image holds NaN"), (torch.rand(1, 8, 8, 2), r"\(1, 8, 8, 2\) came"),
    (torch.rand(8, 8, 3), r"\(8, 8, 3\) came"),
])
def test_images_that_cannot_be_judged(image, words):
    with pytest.raises(ValueError, match=words):
        flaw_map(highlighter(), image)


def test_it_finds_what_it_was_shown(learned):
    """Spots it has never seen: found in nearly all images, and the map's peak lies on them."""
    judge, training = learned
    flawed, where = spoil(images(40, seed=11), seed=12)
    maps, probabilities = flaw_map(judge, flawed)
    clean = judge.generated_probability(images(40, seed=13))
    above = (probabilities[:, None] > clean[None]).float().mean()
    peaks = maps.flatten(1).argmax(dim=1, keepdim=True)
    assert training.accuracy >= 0.9 and above > 0.95
    assert where.flatten(1).gather(1, peaks).float().mean() >= 0.87
    assert not judge.settings.warnings


# Training

def test_same_seed_same_network():
    real, generated = images(12, seed=1), spoil(images(12, seed=2))[0]
    runs = []
    for seed in (0, 0, 1):
        training = Training(real, generated, settings(2, seed=seed), CPU)
        training.run()
        runs.append(training)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    for one, other in zip(runs[0].best.parameters(), runs[1].best.parameters()):
        assert torch.equal(one, other)


def test_batches_are_balanced_and_show_every_image_once():
    """16 real and 40 generated images: half of each batch is real, the larger class is gone through once an epoch."""
    real, generated = torch.zeros(18, 16, 16, 3), torch.ones(44, 16, 16, 3)
    training = Training(real, generated, settings(batch_size=8, size=16), CPU)
    assert [len(pool) for pool in training.train_images] == [16, 40]
    classes = [c for _, c in training.batches(0)]
    assert len(classes) == training.steps_per_epoch == 10
    assert all((c == REAL).sum() == (c == GENERATED).sum() == 4 for c in classes)
    bright = torch.stack([b.mean(dim=(1, 2, 3)) for b, _ in training.batches(0)])
    assert (bright[:, :4] < 0.3).all() and (bright[:, 4:] > 0.5).all()


def test_held_out_images_are_never_trained_on():
    real, generated = torch.zeros(20, 16, 16, 3), torch.ones(20, 16, 16, 3)
    real[:, 0, 0, 0] = torch.arange(20) / 40
    training = Training(real, generated, settings(size=16), CPU)
    held = set(training.held_images[REAL][:, 0, 0, 0].tolist())
    trained = set(training.train_images[REAL][:, 0, 0, 0].tolist())
    assert len(held) == 2 and len(trained) == 18 and not held & trained


def test_best_epoch_is_kept(monkeypatch):
    """Scores 0.6, 0.9, 0.7: the network after the second epoch is what comes out."""
    training = Training(images(10), images(10, seed=4), settings(3), CPU)
    scores, kept = iter([(0.6, -1.0), (0.9, -1.0), (0.7, -1.0)]), []

    def evaluate():
        kept.append([p.detach().clone() for p in training.network.parameters()])
        return next(scores)

    monkeypatch.setattr(training, "evaluate", evaluate)
    training.run()
    assert training.best_epoch == 2 and training.accuracy == 0.9
    assert all(torch.equal(a, b) for a, b in zip(training.best.parameters(), kept[1]))


def test_going_on_leaves_the_given_one_as_it_is(learned):
    """It keeps backbone and image size, counts epochs on, and starts where the other one ended."""
    judge, _ = learned
    before = [p.clone() for p in judge.network.parameters()]
    with torch.inference_mode():
        again, training = session.train_highlighter(
            images(20, seed=21), spoil(images(20, seed=22))[0], settings(1, size=256, backbone="vgg16", rate=1e-6), judge
        )
    assert again.settings.backbone == "small" and again.settings.image_size == 64
    assert again.settings.epochs == judge.settings.epochs + 1 and training.accuracy >= 0.75
    assert all(torch.equal(a, b) for a, b in zip(judge.network.parameters(), before))


def test_a_cancelled_run_saves_its_best_epoch(monkeypatch, caplog):
    """Cancelled in the second epoch: the first one's network is in a new file, which is named and can be loaded."""
    tell = session.LiveCurve.__call__

    def cancel_at_seven(curve, done, total):
        if done == 7:
            comfy.model_management.interrupt_current_processing()
        tell(curve, done, total)

    monkeypatch.setattr(session.LiveCurve, "__call__", cancel_at_seven)
    before = set(folder_paths.get_filename_list("flaw_highlighters"))
    with pytest.raises(comfy.model_management.InterruptProcessingException), torch.inference_mode():
        FAMTrainFlawHighlighter.execute(images(20), images(20, seed=3), 5, 8, 2e-5, 32, 0, "small")
    (new,) = set(folder_paths.get_filename_list("flaw_highlighters")) - before
    assert new.startswith("interrupted") and new in caplog.text
    assert FAMLoadFlawHighlighter.execute(new)[0].settings.epochs == 1


def test_the_node_tells_accuracy_and_curves():
    with torch.inference_mode():
        result = FAMTrainFlawHighlighter.execute(images(16), images(16, seed=3), 2, 8, 2e-5, 32, 0, "small")
    judge, curves, accuracy = result.result
    assert curves.shape == (1, 520, 768, 3) and 0 <= accuracy <= 1
    assert judge.settings.real_images == 14 and "Held-out accuracy" in result.ui["text"][0]


@pytest.mark.parametrize("real, generated, words", [
    (images(16), images(4), "generated: 4 images came; at least 8 of each class"),
    (images(2), images(16), "real: 2 images came"),
    (images(16, 32), images(16, 48), "real images are 32x32 pixels and generated ones 48x48"),
    (images(16)[..., :1], images(16), "real images have 1 channels and generated ones 3"),
    (images(16), torch.full((16, 32, 32, 3), torch.nan), "the image holds NaN"),
])
def test_training_images_that_cannot_work(real, generated, words):
    with pytest.raises(ValueError, match=words):
        Training(real, generated, settings(), CPU)


@pytest.mark.parametrize("wrong, words", [
    ({"epochs": 0}, "epochs is 0"), ({"batch_size": 1}, "batch_size is 1"), ({"rate": 0.0}, "learning_rate is 0.0"),
])
def test_training_settings_that_cannot_work(wrong, words):
    with pytest.raises(ValueError, match=words):
        settings(**wrong)


def test_augmentation_keeps_shape_and_range_and_hides_cues():
    """A quarter brighter, or a JPEG: after augmentation that difference is smaller than the differences it makes."""
    batch = images(32).movedim(-1, 1)
    out = augment(batch, torch.Generator().manual_seed(1))
    assert out.shape == batch.shape and out.min() >= 0 and out.max() <= 1
    assert not torch.equal(out, augment(batch, torch.Generator().manual_seed(2)))
    assert torch.equal(out, augment(batch, torch.Generator().manual_seed(1)))
    light = (out.mean(dim=(1, 2, 3)) / batch.mean(dim=(1, 2, 3))).std()
    assert light > 0.05
    assert 0.005 < (jpeg(batch[0], 40) - batch[0]).abs().mean() < 0.1


# Spurious cues

def train_on(real, generated, epochs=4):
    training = Training(real, generated, settings(epochs, 16), CPU)
    training.run()
    return {cue.part: cue for cue in check_cues(training.best, *training.held_out(), CPU)}


@pytest.mark.parametrize("part", ["border", "light and colour"])
def test_a_planted_cue_is_found(part):
    """Generated images that differ in one trivial respect alone: the check names it, in words."""
    real, generated = images(100, seed=1), images(100, seed=2)
    if part == "border":
        generated[:, :3], generated[:, -3:], generated[:, :, :3], generated[:, :, -3:] = 1, 1, 1, 1
    else:
        real, generated = real * 0.25, 0.75 + generated * 0.25
    cues = train_on(real, generated)
    assert cues[part].spurious and cues[part].pairs >= 4
    assert f"follow the {part}" in cues[part].words
    assert not cues["finest texture"].spurious


def test_a_sound_highlighter_passes(learned):
    judge, training = learned
    cues = check_cues(judge.network, *training.held_out(), CPU)
    assert [cue.part for cue in cues] == ["border", "background", "finest texture", "light and colour"]
    assert all(cue.pairs >= 8 and not cue.spurious for cue in cues)


def test_exchanged_parts():
    """The border is a frame; bands that are exchanged whole give the other image, none gives the own."""
    assert border_mask(24, 24).sum() == 24 * 24 - 20 * 20
    one, other = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    everything = band_mask(16, 16, 0.0, 1.0)
    assert torch.allclose(exchange_band(one, other, everything), other, atol=1e-5)
    assert torch.allclose(exchange_band(one, other, ~everything), one, atol=1e-5)


# Files

def test_saved_and_loaded_again():
    judge = highlighter(seed=4)
    path = FAMSaveFlawHighlighter.execute(judge, "unit/saved").ui["text"][0]
    name = next(n for n in folder_paths.get_filename_list("flaw_highlighters") if path.endswith(n))
    loaded = FAMLoadFlawHighlighter.execute(name)[0]
    assert loaded.settings == judge.settings
    assert torch.allclose(loaded.generated_probability(images(3)), judge.generated_probability(images(3)), atol=2e-3)
    assert FAMSaveFlawHighlighter.execute(judge, "unit/saved").ui["text"][0] != path


@pytest.mark.parametrize("prefix", ["../outside", "/outside", "a/../../outside", "", "..", "folder/.."])
def test_saving_outside_the_folder_is_refused(prefix):
    with pytest.raises(ValueError, match="a name inside models/flaw_highlighters is wanted"):
        FAMSaveFlawHighlighter.execute(highlighter(), prefix)


def test_files_that_are_no_highlighters(tmp_path):
    folder = folder_paths.get_folder_paths("flaw_highlighters")[0]
    save_model_file("flaw_highlighters", "unit/other", "time predictor", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="is a time predictor; a flaw highlighter is wanted"):
        FAMLoadFlawHighlighter.execute("unit/other_00001_.safetensors")
    with open(f"{folder}/unit/broken.safetensors", "wb") as file:
        file.write(b"\x80\x04not safetensors")
    with pytest.raises(ValueError, match="broken.safetensors cannot be read as a safetensors file"):
        FAMLoadFlawHighlighter.execute("unit/broken.safetensors")
    save_model_file("flaw_highlighters", "unit/torn", KIND, {"a": torch.zeros(1)}, {"backbone": "small", "image_size": 32})
    with pytest.raises(ValueError, match="its content does not fit"):
        FAMLoadFlawHighlighter.execute("unit/torn_00001_.safetensors")
    with pytest.raises(ValueError, match="there is no such file under models/flaw_highlighters"):
        load_model_file("flaw_highlighters", "../../../etc/passwd", KIND)


def test_vgg16_starts_from_a_standard_file(monkeypatch):
    """Weights under torchvision's names become the convolutions; a file that lacks one is refused."""
    network = new_network("vgg16", 1)
    standard = {f"features.{name}": torch.full_like(value, 0.01) for name, value in network.convolutions.state_dict().items()}
    assert sorted(standard)[-1] == "features.7.weight" and "features.28.bias" in standard
    take_vgg16_weights(network, standard)
    assert all((value == 0.01).all() for value in network.convolutions.state_dict().values())
    del standard["features.28.bias"]
    with pytest.raises(ValueError, match="features.28.bias is missing"):
        take_vgg16_weights(network, standard)


# Pictures

def test_heat_is_drawn_where_the_map_is_high():
    maps = torch.zeros(1, 32, 32)
    maps[:, 8:16, 8:16] = 1
    picture = draw_heat(torch.full((1, 32, 32, 3), 0.5), maps)
    assert picture.shape == (1, 256, 256, 3)
    assert (picture[0, 96, 96] - 0.5).abs().max() > 0.3 and torch.allclose(picture[0, 250, 250], torch.tensor(0.5))


def test_curves_of_a_run_without_epochs():
    assert draw_training([], [], 0).shape == (1, 520, 768, 3)
