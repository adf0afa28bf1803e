"""Which blocks of a network a user names: "double.0-5, single.3", "middle, output.3-5", or plain "7-9"."""

import re

from comfy.ldm.modules.attention import SpatialTransformer

from .families import UNET, Family

ITEM = re.compile(r"([a-z]*)\s*[.: ]?\s*(?:(\d+)(?:\s*-\s*(\d+))?)?")


def count_blocks(family: Family, network) -> dict[str, int]:
    """Kinds of blocks and how many there are of each."""
    return {kind: len(getattr(network, attribute)) if attribute else 1 for kind, attribute in family.numbered.items()}


def parse_blocks(text: str, family: Family, network) -> set[tuple[str, int]] | None:
    """The (kind, number) of every block that is named; None for all.

    Raises:
        ValueError: something else than kinds and numbers, a block the network does not have, or a family that does
            not tell its blocks apart.
    """
    if not text.strip():
        return None
    counts = count_blocks(family, network)
    if not counts:
        raise ValueError(
            f"blocks is {text!r}, but {family.name} does not tell which of its blocks is running. Leave blocks empty: all."
        )
    there = ", ".join(f"{kind}.0-{count - 1}" if kind else f"0-{count - 1}" for kind, count in counts.items())
    chosen = set()
    for item in text.lower().split(","):
        match = ITEM.fullmatch(item.strip())
        if not item.strip() or match is None:
            raise ValueError(f"blocks is {text!r}: {item.strip()!r} is not understood. This model has {there}.")
        kind, first, last = match.groups()
        if not kind and len(counts) == 1:
            (kind,) = counts
        if kind not in counts:
            raise ValueError(f"blocks is {text!r}: this model has no {item.strip()!r}; it has {there}.")
        first = 0 if first is None else int(first)
        last = int(last) if last else (first if match[2] else counts[kind] - 1)
        if not first <= last < counts[kind]:
            raise ValueError(f"blocks is {text!r}: {item.strip()!r} is not there. This model has {there}.")
        chosen |= {(kind, number) for number in range(first, last + 1)}
    if family is UNET:
        attending = attending_blocks(network)
        if not chosen & attending:
            names = ", ".join(f"{kind}.{number}" for kind, number in sorted(attending))
            raise ValueError(f"blocks is {text!r}: there is no attention in them. It is in {names}.")
    return chosen


def attending_blocks(network) -> set[tuple[str, int]]:
    """Those blocks of a UNet that have attention, which convolutions make up the rest of."""
    parts = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
    return {
        (kind, number) for kind, blocks in parts.items() for number, block in enumerate(blocks)
        if block is not None and any(isinstance(module, SpatialTransformer) for module in block.modules())  # small UNets have no middle
    }


def running_block(options: dict) -> tuple[str, int] | None:
    """The (kind, number) of the block that is running, from a hook's options."""
    if "block" in options:
        return tuple(options["block"][:2])
    if "block_index" in options:
        return options.get("block_type", ""), options["block_index"]
    return None
