"""The highlighter: judging images of any kind, maps equal to captum's, files, pictures."""

import folder_paths
import pytest
import torch
from artifact_guard.nodes.fam.backbones import new_network, take_vgg16_weights
from artifact_guard.nodes.fam.grad_cam import flaw_map, grad_cam, scale_to_one
from artifact_guard.nodes.fam.highlighter import GENERATED, KIND, REAL, FlawHighlighter, HighlighterSettings, fit_images
from artifact_guard.nodes.fam.pictures import draw_heat, draw_training
from artifact_guard.nodes.fam.schema import FAMFlawMap, FAMLoadFlawHighlighter, FAMSaveFlawHighlighter
from artifact_guard.nodes.fam.session import starting_network
from artifact_guard.nodes.model_files import load_model_file, save_model_file
from captum.attr import LayerGradCam
from safetensors.torch import save_file

from tests.unit.fam_support import highlighter, images, settings, spoil, train_on_grids


@pytest.fixture(scope="module")
def learned():
    return train_on_grids()


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
    assert torch.allclose(probabilities, highlighter().generated_probability(images(5, 40)), atol=1e-6)


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


# Files

def test_saved_and_loaded_again():
    judge = highlighter(seed=4)
    path = FAMSaveFlawHighlighter.execute(judge, "unit/saved").ui["text"][0]
    name = next(n for n in folder_paths.get_filename_list("flaw_highlighters") if path.endswith(n))
    loaded = FAMLoadFlawHighlighter.execute(name)[0]
    assert loaded.settings == judge.settings
    assert torch.allclose(loaded.generated_probability(images(3)), judge.generated_probability(images(3)), atol=2e-3)
    assert FAMSaveFlawHighlighter.execute(judge, "unit/saved").ui["text"][0] != path


def test_what_half_precision_cannot_hold_is_saved_whole():
    """Running variances of a network trained at a high rate."""
    judge = highlighter()
    name, variance = next((n, v) for n, v in judge.network.named_buffers() if n.endswith("running_var"))
    variance.fill_(3e5)
    tensors, settings = judge.state()
    assert tensors[name].dtype == torch.float32 and torch.float16 in {value.dtype for value in tensors.values()}
    batch = images(3)
    wanted = judge.generated_probability(batch)
    assert torch.allclose(FlawHighlighter.from_state(tensors, settings).generated_probability(batch), wanted, atol=2e-3)


@pytest.mark.parametrize("spoilt", [{"image_size": 0}, {"image_size": "256"}, {"image_size": 64.5}, {"epochs": -1}, {"seed": None}, None])
def test_spoilt_content_is_refused(spoilt):
    tensors, settings = highlighter().state()
    if spoilt is None:
        next(iter(tensors.values())).fill_(torch.nan)
    words = "weights hold NaN" if spoilt is None else f"its {next(iter(spoilt))} is "
    with pytest.raises(ValueError, match=f"does not fit the networks of this version .*{words}"):
        FlawHighlighter.from_state(tensors, settings | (spoilt or {}))


@pytest.mark.parametrize("prefix", ["../outside", "/outside", "a/../../outside", "", "..", "folder/..", "C:outside", "a\\..\\outside", "a\nb"])
def test_saving_outside_the_folder_is_refused(prefix):
    with pytest.raises(ValueError, match="no name inside models/flaw_highlighters"):
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
        load_model_file("flaw_highlighters", "nowhere.safetensors", KIND)
    with pytest.raises(ValueError, match="no name inside models/flaw_highlighters"):
        load_model_file("flaw_highlighters", "../../../etc/passwd", KIND)


def test_files_of_the_first_small_backbone_are_refused_in_words(tmp_path):
    """Its six convolutions had other shapes: the error says what to do, in a length a person reads."""
    path = save_model_file(
        "flaw_highlighters", "unit/first", KIND, {"convolutions.0.weight": torch.zeros(16, 3, 4, 4)},
        {"backbone": "small", "image_size": 128},
    )
    with pytest.raises(ValueError, match="another version of Artifact Guard: train it again") as refusal:
        FAMLoadFlawHighlighter.execute(f"unit/{path.rsplit('/')[-1]}")
    assert len(str(refusal.value)) < 500


def test_training_starts_from_the_users_vgg16(tmp_path, monkeypatch):
    """A file of torchvision's whole VGG16, classifier and all, under models/flaw_highlighters: found, and taken as a start."""
    standard = {f"features.{n}": torch.full_like(v, 0.02) for n, v in new_network("vgg16", 1).convolutions.state_dict().items()}
    standard["classifier.0.weight"] = torch.zeros(4, 4)
    save_file(standard, tmp_path / "VGG16-torchvision.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "flaw_highlighters", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("flaw_highlighters", None)
    network = starting_network(settings(backbone="vgg16"))
    assert all((value == 0.02).all() for value in network.convolutions.state_dict().values())
    assert network.head.hidden.weight.std() > 0
    folder_paths.filename_list_cache.pop("flaw_highlighters", None)


def test_vgg16_takes_standard_names_and_no_others():
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
