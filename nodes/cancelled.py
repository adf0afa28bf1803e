"""Training that a user cancelled and its second start: ComfyUI keeps what a node gave, and would give the part again."""

PLAIN = (bool, int, float, str)


class CancelledRuns:
    """How often each node of one kind was cancelled with the same widgets; that is its fingerprint for ComfyUI's cache.

    A node that is cancelled and gives what it has learned so far ends well, as far as ComfyUI can tell. With another
    fingerprint the next Run trains, as after any other cancel.
    """

    def __init__(self):
        self.runs: list[tuple[str | None, set]] = []
        self.met: dict[tuple, int] = {}

    def add(self, inputs: dict, node: str | None = None) -> None:
        """A run of the node with this id and these inputs was cancelled."""
        self.runs.append((node, widgets(inputs)))

    def fingerprint(self, inputs: dict, node: str | None = None) -> int:
        """What fingerprint_inputs gives. ComfyUI shows it the values of the node's own widgets alone: of one that a link feeds
        there is None, and runs of any value of it count; so do those of every node where the id is not known.

        A node that was never cancelled keeps what it had when it was met, so that another's cancel costs it nothing. But what
        was cancelled may go on under another id, pasted or put into a subgraph, where ComfyUI's cache knows it still: so a
        node that is new counts the cancels of all others before it, and one that was cancelled itself all there are.
        """
        known = widgets(inputs)
        cancelled = [of for of, run in self.runs if known <= run]
        if node is None or node in cancelled:
            return len(cancelled)
        return self.met.setdefault((node, frozenset(known)), len(cancelled))


def widgets(inputs: dict) -> set:
    """Those of a node's inputs that are widgets' values, or lists of them."""
    def plain(value) -> bool:
        return isinstance(value, PLAIN) or isinstance(value, list) and all(isinstance(entry, PLAIN) for entry in value)

    return {(name, str(value)) for name, value in inputs.items() if plain(value)}
