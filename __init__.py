"""Artifact Guard: nodes for ComfyUI that find and repair visual artifacts of diffusion models."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"


class ArtifactGuardExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ArtifactGuardExtension:
    return ArtifactGuardExtension()
