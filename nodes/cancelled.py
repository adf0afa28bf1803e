"""Training that a user cancelled and its second start: ComfyUI keeps what a node gave, and would give the part again."""

PLAIN = (bool, int, float, str)


class CancelledRuns:
    """How often a node of one kind was cancelled with the same widgets; that is its fingerprint for ComfyUI's cache.

    A node that is cancelled and gives what it has learned so far ends well, as far as ComfyUI can tell. With another
    fingerprint the next Run trains, as after any other cancel.
    """

    def __init__(self):
        self.runs: list[set] = []

    def add(self, inputs: dict) -> None:
        """A run with these inputs of the node was cancelled."""
        self.runs.append(widgets(inputs))

    def fingerprint(self, inputs: dict) -> int:
        """What fingerprint_inputs gives. ComfyUI shows it the values of the node's own widgets alone: of one that a link feeds
        there is None, and runs of any value of it count."""
        known = widgets(inputs)
        return sum(known <= run for run in self.runs)


def widgets(inputs: dict) -> set:
    """Those of a node's inputs that are widgets' values, or lists of them."""
    def plain(value) -> bool:
        return isinstance(value, PLAIN) or isinstance(value, list) and all(isinstance(entry, PLAIN) for entry in value)

    return {(name, str(value)) for name, value in inputs.items() if plain(value)}
