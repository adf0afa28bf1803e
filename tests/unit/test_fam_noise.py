"""Flaw noise: what is amplified, of images, videos and nested latents, and what is refused."""

import comfy.nested_tensor
import pytest
import torch
from artifact_guard.nodes.fam.noise import FlawNoise
from artifact_guard.nodes.fam.schema import FAMNoise
from comfy_extras.nodes_custom_sampler import RandomNoise


def test_noise_gains_the_map():
    """eps + strength * map, the same on all channels; the seed is the wrapped one's."""
    noise = RandomNoise.execute(7)[0]
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    flaw_map = torch.zeros(1, 64, 64)
    flaw_map[:, :32] = 1
    amplified = FAMNoise.execute(noise, flaw_map, 0.25)[0]
    difference = amplified.generate_noise(latent) - noise.generate_noise(latent)
    assert torch.allclose(difference[:, :, :4], torch.tensor(0.25), atol=1e-6) and not difference[:, :, 4:].any()
    assert amplified.seed == 7


def test_noise_is_deterministic_and_off_bit_for_bit():
    noise, latent = RandomNoise.execute(7)[0], {"samples": torch.zeros(1, 4, 8, 8)}
    flaw_map = torch.ones(1, 8, 8)
    assert torch.equal(FlawNoise(noise, flaw_map, 0.0).generate_noise(latent), noise.generate_noise(latent))
    one, other = (FlawNoise(noise, flaw_map, 0.1).generate_noise(latent) for _ in range(2))
    assert torch.equal(one, other)


def test_noise_of_videos_and_nested_latents():
    noise = RandomNoise.execute(1)[0]
    frames = torch.zeros(3, 8, 8)
    frames[2] = 1
    video = {"samples": torch.zeros(1, 4, 3, 8, 8)}
    difference = FlawNoise(noise, frames, 1.0).generate_noise(video) - noise.generate_noise(video)
    assert torch.allclose(difference[:, :, 2], torch.tensor(1.0), atol=1e-6) and not difference[:, :, :2].any()
    parts = [torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 8, 20)]

    class Wrapped:
        seed = 0

        def generate_noise(self, latent):
            return comfy.nested_tensor.NestedTensor([p.clone() for p in parts])

    result = FlawNoise(Wrapped(), frames, 1.0).generate_noise({}).unbind()
    assert result[0][:, :, 2].min() == 1 and not result[1].any()


def test_maps_of_a_videos_image_frames():
    """9 masks of 9 image frames, 3 latent frames: each of the later ones has the mean of its 4."""
    noise, video = RandomNoise.execute(1)[0], {"samples": torch.zeros(2, 4, 3, 8, 8)}
    frames = torch.arange(9.0).div(10).view(-1, 1, 1).expand(-1, 16, 16)
    difference = FlawNoise(noise, torch.cat([frames, frames]), 1.0).generate_noise(video) - noise.generate_noise(video)
    wanted = torch.tensor([0.0, 0.25, 0.65]).view(1, 1, 3, 1, 1).expand_as(difference)
    assert torch.allclose(difference, wanted, atol=1e-5)


def test_maps_are_cut_off_at_0_and_1():
    noise, latent = RandomNoise.execute(1)[0], {"samples": torch.zeros(1, 4, 8, 8)}
    for value, wanted in ((5.0, 0.5), (-5.0, 0.0)):
        flaw_map = torch.full((1, 8, 8), value)
        difference = FlawNoise(noise, flaw_map, 0.5).generate_noise(latent) - noise.generate_noise(latent)
        assert torch.allclose(difference, torch.tensor(wanted), atol=1e-6)


def test_a_strength_that_is_no_number():
    with pytest.raises(ValueError, match="strength is nan"):
        FlawNoise(RandomNoise.execute(1)[0], torch.ones(1, 8, 8), float("nan")).generate_noise({"samples": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize("flaw_map, words", [
    (torch.full((1, 8, 8), torch.nan), "flaw_map: the mask holds NaN"), (torch.ones(1, 8, 16), "does not have the shape"),
    (torch.ones(5, 8, 8), "5 masks came for 2 samples"), (torch.ones(10, 8, 8), "10 masks came for 2 samples"),
])
def test_maps_that_do_not_fit_the_noise(flaw_map, words):
    with pytest.raises(ValueError, match=words):
        FlawNoise(RandomNoise.execute(1)[0], flaw_map, 0.1).generate_noise({"samples": torch.zeros(2, 4, 8, 8)})
