"""What a node says and shows on the page: the text in a node's `ui` is drawn for a few of core's nodes alone, and of a node with live
pictures the last one stays. A picture in its `ui` too is not drawn, or, with Nodes 2.0, beside it as a second one.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from server import PromptServer


def id_of(node: type[io.ComfyNode]) -> str | None:
    """The id of a node that runs and asks for io.Hidden.unique_id; None outside of a run."""
    return node.hidden.unique_id if node.hidden else None


def tell(node_id: str | None, text: str) -> None:
    """A text on the node, in place of the one before, and in the log."""
    logging.info("Artifact Guard: %s", text)
    show_text(node_id, text)


def show_text(node_id: str | None, text: str) -> None:
    """A text on the node alone, of the page that runs it: on others' pages its id is another node's."""
    server = getattr(PromptServer, "instance", None)
    if node_id is not None and server is not None:
        server.send_progress_text(text, node_id, server.client_id)


def saved_as(path: str | Path) -> str:
    """A file in words, its name first: a node on the page shows about two lines, and folders can be long."""
    return f"{Path(path).name} in {Path(path).parent}"


def show_last(bar: comfy.utils.ProgressBar, done: int, total: int, preview: tuple) -> None:
    """The picture that stays on the node. A cancellation that arrives here comes too late: there is nothing left to stop."""
    try:
        bar.update_absolute(done, total, preview)
    except comfy.model_management.InterruptProcessingException:
        bar.update_absolute(done, total, preview)


def keep(save: Callable[[], str | Path], what: str, node_id: str | None) -> None:
    """Save what a training that did not end well has made, and say so in the log and on the node. Raises nothing: what ended the
    training is to be told, not this.

    save: writes a file and gives its path. what: that is saved, as the subject of a sentence.
    """
    try:
        text = f"Training stopped early. {what} is saved as {saved_as(save())}. Load it to go on."
    except Exception as error:
        logging.warning("Artifact Guard: training stopped early. %s could not be saved (%s).", what, error)
        return
    logging.warning("Artifact Guard: %s", text)
    try:
        show_text(node_id, text)
    except Exception as error:
        logging.warning("Artifact Guard: the node could not be told so (%s).", error)
