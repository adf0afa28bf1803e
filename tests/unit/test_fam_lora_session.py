"""The run as the node makes it: cancelling, running out of memory, files that go on, and what is seen meanwhile."""

import gc
import math
import os
import weakref
from dataclasses import replace

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from artifact_guard.nodes.cancelled import CancelledRuns
from artifact_guard.nodes.fam import lora_schema, lora_session, train_steps
from artifact_guard.nodes.fam.flaw_aware import FlawAwareTraining, names_of
from artifact_guard.nodes.fam.lora_adapters import training_copy
from artifact_guard.nodes.fam.lora_state import FOLDER, KIND, NEW_RUN, changes, describe, read_run, run_names
from artifact_guard.nodes.model_files import KIND_KEY, save_model_file
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_train import LoraModelLoader
from safetensors import safe_open

from tests.small_models import shallow_sd15, small_model
from tests.unit.fam_lora_support import RoughPlaces, ToyVAE, equal, rough_highlighter, settings, start
from tests.unit.test_fam_lora_models import train

pytestmark = pytest.mark.usefixtures("repeatable")


@pytest.fixture
def small():
    return shallow_sd15()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An empty models/fam_training; gives the names in it."""
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], extensions))
    folder_paths.filename_list_cache.pop(FOLDER, None)
    yield lambda: sorted(os.listdir(tmp_path))
    folder_paths.filename_list_cache.pop(FOLDER, None)


def fail_at(monkeypatch, step, error):
    """The training raises before this step."""
    watched = lora_session.Session.before_step

    def before_step(self, number):
        if number == step and self.bar is not None:
            raise error
        watched(self, number)

    monkeypatch.setattr(lora_session.Session, "before_step", before_step)


def test_cancelled_keeps_what_was_learned_and_goes_on_as_if_nothing_had_been(small, files, monkeypatch):
    """Cancelled before step 3: the LoRA comes out, the run is in a file, and resumed it ends like the whole run."""
    whole, _, whole_map = train(small)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, comfy.model_management.InterruptProcessingException())
        part, _, _ = train(small)
    assert files() == ["fam_lora_00001_.safetensors", "fam_lora_00002_.safetensors"]
    assert part.keys() == whole.keys() and not equal(part, whole)
    resumed, _, resumed_map = train(small, resume="fam_lora_00002_.safetensors")
    assert equal(resumed, whole) and torch.equal(whole_map, resumed_map)
    assert files()[-1] == "fam_lora_00003_.safetensors", "the file that was resumed is not overwritten"
    assert run_names() == [NEW_RUN, *files()]


def test_cancelled_before_the_first_step_is_a_cancel(small, files, monkeypatch):
    fail_at(monkeypatch, 0, comfy.model_management.InterruptProcessingException())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(small)
    assert files() == []


@pytest.mark.parametrize(
    "error",
    [
        comfy.model_management.OOM_EXCEPTION("out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), RuntimeError("CUDA error: out of memory"),
    ],
)
def test_out_of_memory_saves_and_names_the_file(small, files, monkeypatch, error):
    fail_at(monkeypatch, 2, error)
    with pytest.raises(RuntimeError, match=r"Out of memory after 2 of 4 steps.*fam_lora_00001_.safetensors.*resume"):
        train(small)
    _, settings = read_run("fam_lora_00001_.safetensors", 3)
    assert settings["step"] == 2


def test_any_other_error_names_the_file_too(small, files, monkeypatch):
    fail_at(monkeypatch, 2, KeyError("weight"))
    with pytest.raises(RuntimeError, match="stopped after 2 of 4 steps: KeyError: 'weight' .*saved as .*fam_lora_00001_.safetensors"):
        train(small)


def test_a_run_that_cannot_be_saved_still_gives_its_lora(small, files, monkeypatch, caplog):
    caplog.set_level("INFO")
    whole, _, _ = train(small)

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(comfy.utils, "save_torch_file", full)
    lora, _, _ = train(small, save_every=2)
    assert equal(lora, whole) and files() == ["fam_lora_00001_.safetensors"], "nothing half written stays"
    assert caplog.text.count("The run could not be saved (") == 2 and "(No space left on device)" in caplog.text
    with monkeypatch.context() as patch:
        fail_at(patch, 2, MemoryError())
        with pytest.raises(RuntimeError, match="Out of memory after 2 of 4 steps. The run could not be saved"):
            train(small)


def test_out_of_memory_at_the_first_map_is_told(small, files, monkeypatch):
    def sample(self, seed):
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr("artifact_guard.nodes.fam.flaw_aware.FlawAwareTraining.sample", sample)
    with pytest.raises(ValueError, match="not enough memory to sample and decode 2 images.*Lower map_images"):
        train(small)


def test_out_of_memory_at_the_trial_step_is_told(small, files, monkeypatch):
    def trial(self):
        raise MemoryError

    monkeypatch.setattr("artifact_guard.nodes.fam.flaw_aware.FlawAwareTraining.trial", trial)
    with pytest.raises(ValueError, match="not enough memory for a single step.*Lower batch_size"):
        train(small)


def test_a_loss_that_is_no_number_ends_the_run_with_what_was_learned(small, files, monkeypatch):
    losses, loss_of = [], train_steps.prediction_loss

    def lost_at_the_fourth_step(*args):
        losses.append(loss_of(*args))
        return losses[-1] * (math.nan if len(losses) == 2 + 4 else 1)  # two trial steps come first

    monkeypatch.setattr(train_steps, "prediction_loss", lost_at_the_fourth_step)
    with pytest.raises(ValueError, match="The loss became nan at step 4.*Lower learning_rate.*fam_lora_00001_.safetensors"):
        train(small, steps=6, attention_strength=0.0)
    only_good_steps_are_saved(files, 3)


def only_good_steps_are_saved(files, steps):
    tensors, settings = read_run(files()[0], 3)
    assert settings["step"] == steps == len(tensors["losses"])
    assert all(torch.isfinite(value).all() for value in tensors.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_ends_the_run_with_what_was_learned(small, files, monkeypatch, value):
    """One layer's gradient: the loss of that step is sound. The file that was saved on the way is not spoilt."""
    after = FlawAwareTraining.after_backward

    def lost_at_the_fourth_step(self, step, loss):
        if step == 3:
            next(iter(self.parameters.values())).grad.view(-1)[0] = value
        after(self, step, loss)

    monkeypatch.setattr(FlawAwareTraining, "after_backward", lost_at_the_fourth_step)
    with pytest.raises(ValueError, match=f"The gradient became {value} at step 4.*fam_lora_00001_.safetensors"):
        train(small, steps=6, attention_strength=0.0, save_every=2)
    only_good_steps_are_saved(files, 3)


def test_saved_on_the_way_into_one_file(small, files, monkeypatch):
    saved, save = [], lora_session.RunFile.save

    def watched(self, training):
        saved.append(training.progress.step)
        return save(self, training)

    monkeypatch.setattr(lora_session.RunFile, "save", watched)
    train(small, steps=5, save_every=2)
    assert saved == [2, 4, 5] and files() == ["fam_lora_00001_.safetensors"]


def test_files_that_do_not_fit_are_refused_in_words(small, files):
    train(small)
    name = files()[0]
    with pytest.raises(ValueError, match="resume: .* has done 4 steps and the node asks for 4"):
        train(small, resume=name)
    with pytest.raises(ValueError, match="has rank 3 and the node says 5. Set rank to 3"):
        train(small, resume=name, rank=5)
    with pytest.raises(ValueError, match="a LoRA on another model"):
        train(small_model("sdxl"), resume=name, steps=9)
    save_model_file(FOLDER, "other", "flaw highlighter", {}, {})
    with pytest.raises(ValueError, match="is a flaw highlighter; a flaw-aware training run is wanted"):
        train(small, resume="other_00001_.safetensors")


def test_a_file_that_lacks_something_is_refused_in_words(small, files):
    train(small)
    tensors, about = read_run(files()[0], 3)
    lacking = [(tensors, {key: value for key, value in about.items() if key != "judged"})]
    lacking += [({key: value for key, value in tensors.items() if key != lost}, about) for lost in ("losses", next(
        key for key in tensors if key.startswith("average.")))]
    for number, parts in enumerate(lacking):
        save_model_file(FOLDER, f"part{number}", KIND, *parts)
        name = f"part{number}_00001_.safetensors"
        with pytest.raises(ValueError, match=f"resume: {name} is not a whole training run: it lacks (judged|losses|average)"):
            train(small, resume=name, steps=9)


def test_a_change_of_settings_is_told(small, files, caplog):
    caplog.set_level("INFO")
    train(small)
    train(small, resume=files()[0], steps=6, batch_size=1)
    assert "this was changed: batch_size 2 -> 1." in caplog.text


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("positive", lambda small: {"conditions": [small.conditioning(2)]}),
        ("negative", lambda small: {"negative": small.conditioning(3)}),
        ("vae", lambda small: {"vae": Decoder(small.channels)}),
        ("flaw_highlighter", lambda small: {"highlighter": rough_highlighter(RoughPlaces(0.05))}),
        ("model", lambda small: other_weights(small)),
        ("model", lambda small: with_lora(small)),
        (None, lambda small: {}),
    ],
)
def test_other_inputs_are_a_change(small, name, change):
    """Each is told by its name, and nothing is told of a run that is begun once more with the same."""
    begun = describe(start(small, settings())[0], 3)
    changed = change(small)
    model = None if isinstance(changed, dict) else changed
    training, _ = start(small, settings(), model)
    if model is None:
        training.names = names_of(training.model, replace(training.sampling, **changed))
    assert changes(training, 3, begun) == ([] if name is None else [name])
    assert changes(training, 3, {key: value for key, value in begun.items() if key != name}) == [], "a file of an earlier release"


class Decoder(ToyVAE):
    """A VAE with weights."""

    first_stage_model = torch.nn.Linear(2, 2)


def other_weights(small):
    """The model with one layer's weights changed."""
    with torch.inference_mode(False), torch.no_grad():
        model = training_copy(small.model)
        next(model.model.diffusion_model.parameters()).mul_(1.1)
    return model


def with_lora(small):
    """The model with a weight patch."""
    model = small.model.clone()
    name = next(key for key in model.model.state_dict() if key.endswith("weight"))
    assert model.add_patches({name: ("diff", (torch.zeros_like(model.model.state_dict()[name]),))}, 0.5)
    return model


def test_the_border_of_a_resumed_run_does_not_move_and_that_is_told(small, files, caplog):
    caplog.set_level("INFO")
    train(small)
    train(small, resume=files()[0], steps=5, base_fraction=1.0)
    assert "base_fraction 0.5 -> 1.0 (without effect: the base phase ends where it was to)." in caplog.text
    assert "New flaw map at step 4" in caplog.text


def test_a_patch_in_the_weights_is_no_change(small):
    """Once it is loaded, the model's patches are in its weights."""
    training, _ = start(small, settings(), with_lora(small))
    begun = describe(training, 3)
    training.trial()
    assert changes(training, 3, begun) == [] and describe(training, 3) == begun


def test_a_file_says_what_it_holds(small, files):
    train(small)
    with safe_open(os.path.join(folder_paths.get_folder_paths(FOLDER)[0], files()[0]), "pt") as file:
        assert file.metadata()[KIND_KEY] == "flaw-aware training run"


def test_cost_is_told_before_the_first_step(small, files, monkeypatch, caplog):
    """Steps, maps, time and memory, on the node and in the log: see test_told.py."""
    caplog.set_level("INFO")
    fail_at(monkeypatch, 0, comfy.model_management.InterruptProcessingException())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(small)
    assert "4 steps of about" in caplog.text and "2 maps of about" in caplog.text and "GB" in caplog.text


def test_noise_strength_on_latents_is_explained(small, files, caplog):
    caplog.set_level("INFO")
    train(small)
    assert "noise_strength is off: this model works on latents" in caplog.text
    caplog.clear()
    train(small, noise_strength=0.0)
    assert "noise_strength is off" not in caplog.text


def test_curve_map_and_samples_are_seen_meanwhile(small, files, monkeypatch):
    """The bar goes to the end; the pictures grow by the samples and maps of the newest batch."""
    seen = []

    class Bar:
        def __init__(self, total):
            pass

        def update_absolute(self, value, total, preview=None):
            seen.append((value, total, preview))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    monkeypatch.setattr(lora_session, "PREVIEW_SECONDS", 0.0)
    train(small)
    steps = [entry for entry in seen if entry[1] == 4]
    assert [value for value, _, _ in steps] == [0, 1, 2, 2, 3, 3, 4, 4]
    kind, picture, _ = steps[-1][2]
    assert kind == "JPEG" and picture.width == 768 and picture.height > 520


@pytest.mark.parametrize("cancelled_at, title", [(None, "step 4 of 4, refinement phase"), (3, "step 3 of 4, cancelled")])
def test_the_last_picture_is_of_the_last_step(small, files, monkeypatch, cancelled_at, title):
    """However short the time since the one before: the page keeps it. A cancel that arrives then comes too late."""
    titles, draw, update = [], lora_session.preview, comfy.utils.ProgressBar.update_absolute

    def drawn(progress, phases, batch, words):
        titles.append(words)
        return draw(progress, phases, batch, words)

    def interrupted(bar, value, total=None, preview=None):
        if total == 4 and titles[-1].endswith(title):
            comfy.model_management.throw_exception_if_processing_interrupted()
        update(bar, value, total, preview)

    monkeypatch.setattr(lora_session, "preview", drawn)
    monkeypatch.setattr(lora_session, "PREVIEW_SECONDS", 1e9)
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", interrupted)
    save = lora_session.Session.save

    def cancelled_while_saving(self):
        comfy.model_management.interrupt_current_processing(True)
        return save(self)

    monkeypatch.setattr(lora_session.Session, "save", cancelled_while_saving)
    if cancelled_at is not None:
        fail_at(monkeypatch, cancelled_at, comfy.model_management.InterruptProcessingException())
    lora, _, _ = train(small)
    assert lora and titles[-1] == f"Training loss, {title}"


def test_the_copy_that_was_trained_is_gone_afterwards(small, files, monkeypatch):
    """It is as large as the model: nodes behind this one need its memory, before Python's garbage collection has its turn."""
    copies, whole = [], lora_schema.training_copy

    def watched(model):
        made = whole(model)
        copies.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(lora_schema, "training_copy", watched)
    collecting = gc.isenabled()
    gc.disable()
    try:
        train(small)
        assert len(copies) == 1 and copies[0]() is None
    finally:
        if collecting:
            gc.enable()


def test_same_seed_same_lora(small, files):
    one, again, other = (train(small, seed=seed)[0] for seed in (3, 3, 4))
    assert equal(one, again) and not equal(one, other)


def test_durations_for_a_person():
    assert [lora_session.in_words(s) for s in (0.2, 59, 600, 7200)] == ["1 s", "59 s", "10 min", "2.0 h"]


def test_an_empty_prompt_is_cores():
    from nodes import ConditioningZeroOut

    small = small_model("sdxl")
    ((tokens, more),) = lora_schema.zeroed([small.conditioning(1)])
    ((wanted, others),) = ConditioningZeroOut().zero_out(small.conditioning(1))[0]
    assert torch.equal(tokens, wanted) and torch.equal(more["pooled_output"], others["pooled_output"])


@pytest.mark.parametrize(("capability", "emulated"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False), ("SVE256", False)])
def test_processors_without_bfloat16_calculate_in_float32(small, files, monkeypatch, capability, emulated):
    """And that is said: emulated it takes many times as long."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    setting = settings(training_dtype="bf16")
    assert setting.dtype_on(torch.device("cpu")) == (torch.float32 if emulated else torch.bfloat16)
    assert setting.dtype_on(torch.device("cuda")) == torch.bfloat16
    training, _ = start(small, setting)
    assert ("no arithmetic for bf16" in lora_session.measure_cost(training).words(training)) == emulated
    assert "no arithmetic" not in lora_session.Cost.precision(start(small, settings(training_dtype="fp32"))[0])


def test_resuming_tells_another_lora_and_another_schedule(small, files, caplog):
    """On the model input, each as strong as the other."""
    loras = [train(small, steps=1, seed=seed, base_fraction=1.0, learning_rate=0.1)[0] for seed in (1, 2)]
    with torch.inference_mode():
        one, other = (LoraModelLoader.execute(small.model, lora, 1.0).args[0] for lora in loras)
    train(small, one, steps=1)
    name = files()[-1]
    other_schedule = ModelSamplingDiscrete().patch(one, "v_prediction", False)[0]
    for model, told in ((one, False), (other, True), (other_schedule, True)):
        caplog.clear()
        with caplog.at_level("INFO"):
            train(small, model, steps=2, resume=name)
        assert ("this was changed: model" in caplog.text) == told


def test_resuming_with_pictures_of_another_shape_is_refused(small, files):
    train(small, steps=3)
    with pytest.raises(ValueError, match="pictures of another shape: its flaw map has .* the latents 24x12"):
        train(small, steps=4, resume=files()[-1], latents={"samples": torch.zeros(6, 4, 12, 24)})


def test_a_cancelled_run_is_another_one_to_the_cache_whatever_a_link_feeds():
    """ComfyUI shows the values of widgets alone; of one that a link feeds None."""
    runs = CancelledRuns()
    runs.add({"steps": 50, "seed": 3, "resume": None, "model": object()})
    assert [runs.fingerprint(given) for given in (
        {"steps": 50, "seed": 3}, {"steps": None, "seed": 3, "model": None}, {"steps": [None], "seed": 4}, {"steps": 49, "seed": 3})
    ] == [1, 1, 0, 0]


def test_a_cancelled_node_is_another_one_to_the_cache_and_one_beside_it_is_not():
    runs, widgets = CancelledRuns(), {"steps": 50, "seed": 3}
    beside, cancelled, pasted = "7:3", "7:2", "9"
    assert [runs.fingerprint(widgets, node) for node in (beside, cancelled)] == [0, 0]
    runs.add(widgets, cancelled)
    assert [runs.fingerprint(widgets, node) for node in (beside, cancelled, None)] == [0, 1, 1]
    assert [runs.fingerprint(given, pasted) for given in (widgets, widgets | {"seed": 4})] == [1, 0], "the cache has the cancelled run for it"
    runs.add(widgets, pasted)
    assert [runs.fingerprint(widgets, node) for node in (beside, cancelled, pasted)] == [0, 2, 2], "the first one comes back by undo"
