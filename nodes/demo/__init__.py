"""The embedded demo model: a small class-conditional diffusion model that needs no download."""
