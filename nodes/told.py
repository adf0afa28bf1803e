"""What a node says on the page: a line below its widgets. ComfyUI shows the text in a node's `ui` for a few of core's nodes alone."""

import logging

from comfy_api.latest import io
from server import PromptServer


def id_of(node: type[io.ComfyNode]) -> str | None:
    """The id of a node that runs and asks for io.Hidden.unique_id; None outside of a run."""
    return node.hidden.unique_id if node.hidden else None


def tell(node_id: str | None, text: str) -> None:
    """A text on the node, in place of the one before, and in the log."""
    logging.info("Artifact Guard: %s", text)
    server = getattr(PromptServer, "instance", None)
    if node_id is not None and server is not None:
        server.send_progress_text(text, node_id)
