"""The VAE that a node was given: whether it is the model's, and pictures out of latents."""

import torch

from ..latents import image_channels


def check_vae(model, vae) -> None:
    """Refuse no VAE, or one of another latent format, as far as its channels tell."""
    if vae is None:
        raise ValueError("vae: none came: this checkpoint holds none. Connect the model's own VAE (Load VAE).")
    wanted, has = image_channels(model.get_model_object("latent_format")), getattr(vae, "latent_channels", None)
    if None not in (has, wanted) and has != wanted:
        raise ValueError(
            f"vae: it decodes latents of {has} channels and this model's have {wanted}. Connect the VAE that belongs to the model."
        )


def decode(vae, samples: torch.Tensor) -> torch.Tensor:
    """A latent as IMAGE (frames, H, W, 3), the frames of a video one after the other."""
    image = vae.decode(samples)
    return image.flatten(0, 1) if image.ndim == 5 else image
