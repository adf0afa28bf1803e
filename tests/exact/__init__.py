"""A diffusion model whose truth is known: exact denoiser, planted score traps, images made by code."""
