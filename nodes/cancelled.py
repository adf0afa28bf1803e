"""Training that a user cancelled and its second start: ComfyUI keeps what a node gave, and would give the part again."""

from collections import Counter

PLAIN = (bool, int, float, str)


class CancelledRuns:
    """How often a node of one kind was cancelled with the same widgets; that is its fingerprint for ComfyUI's cache.

    A node that is cancelled and gives what it has learned so far ends well, as far as ComfyUI can tell. With another
    fingerprint the next Run trains, as after any other cancel.
    """

    def __init__(self):
        self.counts: Counter = Counter()

    def add(self, inputs: dict) -> None:
        """A run with these inputs of the node was cancelled."""
        self.counts[widgets(inputs)] += 1

    def fingerprint(self, inputs: dict) -> int:
        """What fingerprint_inputs gives; ComfyUI shows it the widgets' values alone."""
        return self.counts[widgets(inputs)]


def widgets(inputs: dict) -> tuple:
    """Those of a node's inputs that are widgets' values, or lists of them."""
    def plain(value) -> bool:
        return isinstance(value, PLAIN) or isinstance(value, list) and all(isinstance(entry, PLAIN) for entry in value)

    return tuple(sorted((name, str(value)) for name, value in inputs.items() if plain(value)))
