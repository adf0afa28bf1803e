"""The trained LoRA on real architectures at reduced width: core's own loader takes it, and it does what was trained."""

import copy

import comfy.lora
import comfy.sd
import pytest
import torch
from artifact_guard.nodes.fam.flaw_batch import FlawSampling
from artifact_guard.nodes.fam.lora_adapters import copies_of_quantized
from artifact_guard.nodes.fam.lora_schema import FAMTrainLoRA
from artifact_guard.nodes.fam.training_data import LatentData
from comfy_extras.nodes_train import LoraModelLoader

from tests.small_models import not_in_this_release, reachable, sample, small_model
from tests.unit.fam_lora_support import RoughPlaces, ToyVAE, rough_highlighter, settings, smooth_latents, start


def train(small, model=None, **more):
    """The node's outputs of a run of four steps, under inference mode as ComfyUI runs nodes."""
    given = dict(
        model=model or small.model, vae=ToyVAE(small.channels), flaw_highlighter=rough_highlighter(), latents=smooth_latents(small),
        positive=small.conditioning(1), steps=4, base_fraction=0.5, map_every=1, attention_strength=0.025, noise_strength=0.01,
        rank=3, learning_rate=1e-2, batch_size=2, seed=0, map_images=2, map_steps=2, map_cfg=2.0,
    )
    with torch.inference_mode():
        return FAMTrainLoRA.execute(**(given | more)).args


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_core_loads_it_and_it_acts(family):
    """Every key finds its layer; the samples change; strength 0 and the model that was given are as before."""
    small = reachable(small_model(family))
    before = sample(small)
    lora, curves, flaw_map = train(small)
    layers = {name.rpartition(".lora_")[0] for name in lora if ".lora_" in name}
    keys = comfy.lora.model_lora_keys_unet(small.model.model, {})
    assert set(comfy.lora.load_lora(lora, keys, log_missing=True).keys()) == {f"{layer}.weight" for layer in layers}
    with torch.inference_mode():
        (loaded,) = LoraModelLoader.execute(small.model, lora, 1.0).args
        (bypassed,) = LoraModelLoader.execute(small.model, lora, 1.0, bypass=True).args
    after = sample(small, loaded)
    assert torch.isfinite(after).all() and not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(sample(small, bypassed), after, rtol=1e-2, atol=1e-2)
    assert torch.equal(sample(small), before)
    assert curves.shape[0] == 1 and curves.shape[-1] == 3
    assert flaw_map.shape == (1, 16, 16) and 0 <= flaw_map.min() and 0 < flaw_map.max() <= 1


def test_core_gives_what_was_trained():
    """Sampled with core's loader: the same as with the adapters on the copy that was trained, the average in their place."""
    small = small_model("sd15")
    training, weights = start(small, settings(learning_rate=1e-2))
    training.run()
    with torch.inference_mode(False), torch.no_grad(), training.average.standing_in():
        trained = sample_outside_inference(small, training.model)
    with torch.inference_mode():
        (loaded,) = LoraModelLoader.execute(small.model, weights.lora(training.average.values), 1.0).args
    assert torch.allclose(sample(small, loaded), trained, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample(small), trained, atol=1e-2)


def sample_outside_inference(small, model):
    import nodes as core_nodes

    (out,) = core_nodes.common_ksampler(
        model, 3, 4, 4.0, "euler", "simple", small.conditioning(1), small.conditioning(2), small.latent()
    )
    return out["samples"]


@pytest.mark.parametrize("family", ["wan", "qwen_image"])
def test_latents_with_a_time_axis(family):
    lora, _, flaw_map = train(reachable(small_model(family)), vae=FrameVAE())
    assert any(value.abs().max() > 0 for name, value in lora.items() if "lora_down" in name)
    assert flaw_map.shape[0] == 1


@pytest.mark.parametrize("under_inference_mode", [True, False])
def test_a_real_vae(under_inference_mode, monkeypatch):
    """Core's VAE with a network, loaded under inference mode as the executor does, or not: no gradient is asked of it, none kept."""
    vae, kept, judge = small_vae(under_inference_mode), [], FlawSampling.judge
    assert {parameter.is_inference() for parameter in vae.first_stage_model.parameters()} == {under_inference_mode}

    def watched(self, images):
        kept.append(images.requires_grad)
        return judge(self, images)

    monkeypatch.setattr(FlawSampling, "judge", watched)
    lora, _, flaw_map = train(small_model("sd15"), vae=vae, flaw_highlighter=rough_highlighter(RoughPlaces(0.075), size=64))
    assert kept == [False] * 5  # training images, spoilt ones, the model's own before and at two maps
    assert flaw_map.shape == (1, 128, 128) and flaw_map.max() > 0 and any(value.any() for value in lora.values())


def small_vae(under_inference_mode: bool):
    """ComfyUI's AutoencoderKL of SD 1.5, narrow, with random weights."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    shape = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2, 2],
             "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    parameters = {"embed_dim": 4, "ddconfig": shape}
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.ndim == 1:
            return torch.full(value.shape, float(name.endswith("weight")))
        return torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5

    weights = {name: drawn(name, value) for name, value in AutoencoderKL(**parameters).state_dict().items()}
    with torch.inference_mode(under_inference_mode):
        return comfy.sd.VAE(sd=weights, config={"params": parameters})


class FrameVAE:
    """Decodes every frame of a video."""

    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).sigmoid()


def test_a_model_whose_attention_cannot_be_reached_trains_without_that_part(monkeypatch):
    from artifact_guard.nodes.fam import families

    small = small_model("sd15")
    monkeypatch.setattr(families, "FAMILIES", ())
    with pytest.raises(ValueError, match="of a kind this patch was not tried on"):
        train(small)
    lora, _, _ = train(small, attention_strength=0.0)
    assert lora


@pytest.mark.parametrize("prompts", ["one for all", "one each"])
def test_every_latent_is_trained_with_its_own_reference_picture(prompts, monkeypatch):
    """An editing model; core's ReferenceLatent gives one prompt the pictures of the whole batch."""
    from comfy_extras.nodes_edit_model import ReferenceLatent

    small, seen = small_model("flux"), []
    latents = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 16, 16, 16)
    given = [latents] if prompts == "one for all" else list(latents.split(1))
    positive = [ReferenceLatent.execute(small.conditioning(1), {"samples": part}).args[0][0] for part in given]
    network, draw = type(small.model.model.diffusion_model), LatentData.draw
    forward = network.forward

    def noted(self, x, *args, **more):
        if torch.is_grad_enabled():
            seen[-1].append(more["ref_latents"][0].mean(dim=(1, 2, 3)))
        return forward(self, x, *args, **more)

    def drawn(self, *args):
        seen.append([self.latents[draw(self, *args).indices].mean(dim=(1, 2, 3))])
        return draw(self, *args)

    monkeypatch.setattr(network, "forward", noted)
    monkeypatch.setattr(LatentData, "draw", drawn)
    train(
        small, positive=positive, latents={"samples": latents}, steps=4, base_fraction=1.0, map_steps=1, gradient_checkpointing=False,
        training_dtype="fp32",  # what a network is given is compared with what was drawn; bfloat16 rounds it
    )
    assert len(seen) >= 4 and len({tuple(clean.tolist()) for clean, _ in seen}) > 2
    assert all(torch.allclose(clean, shown) for clean, shown in seen)


def test_quantized_weights_are_copied():
    """ComfyUI's own float8 checkpoints, where models are loaded whole."""
    layer = torch.nn.Linear(32, 32)
    try:
        from comfy.quant_ops import QuantizedTensor

        weight = QuantizedTensor.from_float(layer.weight.detach(), "TensorCoreFP8E4M3Layout", scale="recalculate")
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        not_in_this_release(f"makes quantized tensors another way: {error}")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    copies = copies_of_quantized(layer)
    twin = copy.deepcopy(layer, dict(copies))
    assert list(copies) == [id(layer.weight)] and twin.weight is not layer.weight
    assert torch.equal(twin.weight.dequantize(), layer.weight.dequantize())
