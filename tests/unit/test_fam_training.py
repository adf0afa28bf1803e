"""Training a highlighter: balanced, repeatable, cancellable, resumable, and honest about what it has learned."""

from dataclasses import replace

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from artifact_guard.nodes import told
from artifact_guard.nodes.fam import session
from artifact_guard.nodes.fam.augment import augment, jpeg
from artifact_guard.nodes.fam.backbones import Backbone, new_network
from artifact_guard.nodes.fam.highlighter import GENERATED, KIND, REAL
from artifact_guard.nodes.fam.schema import FAMLoadFlawHighlighter, FAMTrainFlawHighlighter
from artifact_guard.nodes.fam.spurious import band_mask, border_mask, check_cues, exchange_band, warnings_of
from artifact_guard.nodes.fam.training import Training
from artifact_guard.nodes.model_files import write_model_file

from tests.unit.fam_support import highlighter, images, settings, spoil, train_on_grids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def learned():
    return train_on_grids()


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


@pytest.mark.parametrize("seed", [2**50 - 3, 2**63, 2**64 - 1])
def test_any_seed_of_the_page_trains(seed):
    with torch.inference_mode():
        result = FAMTrainFlawHighlighter.execute(images(8), images(8, seed=3), 1, 8, 2e-5, 32, seed, "small").result
    assert result[0].settings.seed == seed and 0 <= result[2] <= 1


def test_a_negative_seed_over_a_wire_is_the_one_it_is_modulo_2_to_the_64():
    with torch.inference_mode():
        result = FAMTrainFlawHighlighter.execute(images(8), images(8, seed=3), 1, 8, 2e-5, 32, -5, "small").result
    assert result[0].settings.seed == 2**64 - 5


def test_a_failed_rescue_does_not_hide_the_cancellation(monkeypatch, caplog):
    def cancel(curve, done, total):
        if curve.training.losses:
            raise comfy.model_management.InterruptProcessingException

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(session.LiveCurve, "__call__", cancel)
    monkeypatch.setattr(session, "save_model_file", full)
    with pytest.raises(comfy.model_management.InterruptProcessingException), torch.inference_mode():
        session.train_highlighter(images(12), images(12, seed=3), settings(2))
    assert "could not be saved (No space left on device)" in caplog.text


@pytest.mark.parametrize("epochs", [1, 2, 8, 9, 10, 19])
def test_any_number_of_steps_trains(epochs):
    """One step an epoch; torch has no schedule that rises within less than two steps."""
    training, told = Training(images(8, 16), images(8, 16, seed=3), settings(epochs, 64, size=16), CPU), []
    training.run(lambda done, total: told.append((done, total)))
    assert told == [(step, epochs) for step in range(1, epochs + 1)] and len(training.losses) == epochs


def test_a_batch_larger_than_the_set_shows_every_image_once():
    training = Training(images(12, 16), images(12, 16, seed=3), settings(1, 4096, size=16), CPU)
    (batch,) = training.batches(0)
    assert len(batch[0]) == 20


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


def test_pairs_stay_pairs():
    """Equally many of both: image i of one meets image i of the other in one batch, and both are held out or neither."""
    numbers = (torch.arange(40) / 50).view(-1, 1, 1, 1).expand(-1, 16, 16, 3)
    training = Training(numbers, numbers + 0.1, settings(size=16), CPU)
    held, trained = (
        [(pool.float() / 255).mean(dim=(1, 2, 3)) for pool in pools] for pools in (training.held_images, training.train_images)
    )
    assert torch.allclose(held[GENERATED] - held[REAL], torch.tensor(0.1), atol=0.01)
    assert torch.allclose(trained[GENERATED] - trained[REAL], torch.tensor(0.1), atol=0.01)
    for images_of_step, _ in training.batches(0):
        real, generated = (part.mean(dim=(1, 2, 3)) for part in images_of_step.chunk(2))
        # Augmentation changes each image's light by itself; the order of the pairs outlives it.
        assert torch.corrcoef(torch.stack([real, generated]))[0, 1] > 0.6


def test_an_image_is_judged_by_itself():
    """Not by what else is in its batch, nor does judging change the network: its norms are at rest."""
    training = Training(images(12), images(12, seed=3), settings(), CPU)
    training.run()
    batch = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        together, alone = training.best(batch), torch.cat([training.best(image[None]) for image in batch])
        again = training.best(batch)
    assert torch.allclose(together, alone, atol=1e-5) and torch.equal(together, again)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba_images_train(channels):
    """Both classes grey, or both with an alpha channel, which is left out: the network sees three channels."""
    batch = torch.rand(10, 16, 16, channels)
    training = Training(batch, batch.flip(1), settings(size=16), CPU)
    training.run()
    assert training.train_images[REAL].shape[1] == 3 and training.best_epoch == 1


def test_vgg16_learns_from_nothing():
    """Without a file to start from: 72 images with a grid and their originals, three times seen, tell new ones apart."""
    real = images(80, seed=1)
    generated = spoil(real, size=14)[0]
    with torch.inference_mode():
        judge, training = session.train_highlighter(
            real, generated, settings(epochs=3, batch_size=16, rate=1e-4, size=32, backbone="vgg16")
        )
    sound, flawed = (judge.generated_probability(batch) for batch in (images(30, seed=13), spoil(images(30, seed=11), 14)[0]))
    assert training.losses[-1] < 0.5 * training.losses[0]
    assert (flawed[:, None] > sound[None]).float().mean() > 0.9


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
    assert again.settings.backbone == "small" and again.settings.image_size == 48
    assert again.settings.epochs == judge.settings.epochs + training.best_epoch and training.accuracy >= 0.75
    assert all(torch.equal(a, b) for a, b in zip(judge.network.parameters(), before))


@pytest.mark.parametrize("later, best", [((0.7, -1.0), 0), ((0.9, -0.5), 1)])
def test_going_on_never_gives_a_worse_one(later, best, monkeypatch):
    """The one that was given scores 0.9: it comes out as it was, unless an epoch is better."""
    given = highlighter()
    earlier = replace(given.settings, real_images=8, generated_images=8)
    training = Training(images(10), images(10, seed=4), settings(1, seed=5), CPU, given.network, earlier)
    scores = iter([(0.9, -1.0), later])
    monkeypatch.setattr(training, "evaluate", lambda: next(scores))
    training.run()
    same = all(torch.equal(a, b) for a, b in zip(training.best.parameters(), given.network.parameters()))
    assert training.best_epoch == best and same == (best == 0) and training.accuracy == 0.9


def test_going_on_with_more_images_takes_the_first_epoch(monkeypatch):
    """Some of what is held out then was trained on: the score of the one that was given would say too much."""
    given = highlighter()
    earlier = replace(given.settings, real_images=8, generated_images=8)
    training = Training(images(14), images(14, seed=4), settings(1), CPU, given.network, earlier)
    monkeypatch.setattr(training, "evaluate", lambda: (0.5, -1.0))
    training.run()
    assert training.best_epoch == 1 and training.accuracy == 0.5


def test_going_on_holds_the_same_images_out():
    """Whatever the seed of the second run: of as many images the same ones are held out."""
    real = torch.rand(40, 16, 16, 3)
    given = highlighter(size=16, seed=3)
    runs = [
        Training(real, real.flip(1), settings(size=16, seed=seed), CPU, given.network, earlier)
        for seed, earlier in ((given.settings.seed, None), (77, given.settings))
    ]
    assert torch.equal(runs[0].held_images[REAL], runs[1].held_images[REAL])
    assert runs[1].result().seed == given.settings.seed
    other = Training(real, real.flip(1), settings(size=16, seed=77), CPU)
    assert not torch.equal(runs[0].held_images[REAL], other.held_images[REAL])


def vgg16_file(name, monkeypatch, tmp_path, write):
    path = tmp_path / name
    write(path)
    monkeypatch.setattr(session.folder_paths, "get_filename_list", lambda folder: [name])
    monkeypatch.setattr(session.folder_paths, "get_full_path_or_raise", lambda folder, name: str(path))
    return lambda: session.starting_network(settings(size=32, backbone="vgg16"))


def test_a_highlighter_named_vgg16_is_no_start(monkeypatch, tmp_path):
    judge = highlighter("small")
    start = vgg16_file("vgg16_faces_00001_.safetensors", monkeypatch, tmp_path,
                       lambda path: write_model_file(str(path), KIND, *judge.state()))
    fresh = new_network("vgg16", 0)
    assert all(torch.equal(a, b) for a, b in zip(start().parameters(), fresh.parameters()))


@pytest.mark.parametrize("content", [b"no safetensors", b""])
def test_a_damaged_start_is_named(content, monkeypatch, tmp_path):
    start = vgg16_file("vgg16.safetensors", monkeypatch, tmp_path, lambda path: path.write_bytes(content))
    with pytest.raises(ValueError, match="vgg16.safetensors in models/flaw_highlighters is to be the start of a vgg16, but cannot"):
        start()


def test_a_failed_check_loses_nothing(monkeypatch, caplog):
    """Out of memory after the last epoch: the best one is in a file."""
    monkeypatch.setattr(session, "check_cues", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    monkeypatch.setattr(told, "show_text", lambda *_: (_ for _ in ()).throw(RuntimeError("the page is gone")))
    before = set(folder_paths.get_filename_list("flaw_highlighters"))
    with pytest.raises(RuntimeError, match="out of memory"), torch.inference_mode():
        session.train_highlighter(images(12), images(12, seed=3), settings())
    (new,) = set(folder_paths.get_filename_list("flaw_highlighters")) - before
    assert new.startswith("interrupted") and new in caplog.text


def test_a_diverged_network_is_never_the_best(monkeypatch, caplog):
    """NaN after the second epoch: said so, and the first epoch is kept."""
    judge, epochs = Training.evaluate, []

    def evaluate(training):
        epochs.append(None)
        return (0.5, torch.nan) if len(epochs) == 2 else judge(training)

    monkeypatch.setattr(Training, "evaluate", evaluate)
    before = set(folder_paths.get_filename_list("flaw_highlighters"))
    with pytest.raises(ValueError, match="NaN in epoch 2. Lower learning_rate"), torch.inference_mode():
        session.train_highlighter(images(12), images(12, seed=3), settings(3))
    (new,) = set(folder_paths.get_filename_list("flaw_highlighters")) - before
    assert FAMLoadFlawHighlighter.execute(new)[0].settings.epochs == 1


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
    assert "Spurious cues could not be looked for" in result.ui["text"][1] == judge.settings.warnings[0]


def test_the_last_picture_on_the_page_is_the_curves_that_come_out(monkeypatch):
    """The page keeps the last live picture of a node over the one in its `ui`."""
    seen = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, *told: seen.append(told))
    with torch.inference_mode():
        curves = FAMTrainFlawHighlighter.execute(images(16), images(16, seed=3), 2, 8, 2e-5, 32, 0, "small").result[1]
    (done, total, (kind, picture, _)) = seen[-1]
    assert done == total and kind == "JPEG"
    assert np.array_equal(np.asarray(picture), (curves[0].numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize("real, generated, words", [
    (images(16), images(4), "generated: 4 images came; at least 8 of each class"),
    (images(2), images(16), "real: 2 images came"),
    (images(16), images(16)[:0], "generated: 0 images came; at least 8 of each class are wanted"),
    (images(16), torch.cat([images(16), torch.ones(16, 32, 32, 1)], dim=-1), "3 channels and generated ones 4"),
    (images(16, 32), images(16, 48), "real images are 32x32 pixels and generated ones 48x48"),
    (images(16)[..., :1], images(16), "real images have 1 channels and generated ones 3"),
    (images(16), torch.full((16, 32, 32, 3), torch.nan), "generated: the image holds NaN"),
    (images(16), images(16)[0], r"generated: an IMAGE of shape \(count, height, width, channels\) is wanted, \(32, 32, 3\) came"),
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
    assert warnings_of(cues) == judge.settings.warnings == ()


def test_exchanged_parts():
    """The border is a frame; bands that are exchanged whole give the other image, none gives the own."""
    assert border_mask(24, 24).sum() == 24 * 24 - 20 * 20
    one, other = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    everything = band_mask(16, 16, 0.0, 1.0)
    assert torch.allclose(exchange_band(one, other, everything), other, atol=1e-5)
    assert torch.allclose(exchange_band(one, other, ~everything), one, atol=1e-5)


def test_no_more_images_at_once_than_a_batch(monkeypatch):
    """Judging the held-out ones and looking for cues included: batch_size is what bounds the memory. Before it other models make room."""
    made_room, counts, forward = [], [], Backbone.forward

    def counted(network, given):
        counts.append(len(given))
        return forward(network, given)

    monkeypatch.setattr(Backbone, "forward", counted)
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *given: made_room.append(given))
    with torch.inference_mode():
        session.train_highlighter(images(60, seed=1), spoil(images(60, seed=2))[0], settings(1, batch_size=4))
    assert max(counts) == 4 and len(made_room) == 1


def test_images_that_came_one_by_one_are_told_how_to_come_together():
    with pytest.raises(ValueError, match="real: 1 images came.*Rebatch Images"):
        FAMTrainFlawHighlighter.execute(images(1), images(8), 1, 8, 2e-5, 32, 0, "small")
