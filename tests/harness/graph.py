"""Turns a workflow as the page saves it (graph format, version 0.4) into the prompt the server takes.

It follows the page's own conversion, so that what our workflows/ hold can be run without a browser. A saved graph has
nodes with a bare list of widget values, in the order of the node's schema, and links as
[id, from node, from output, to node, to input, type].
"""

from typing import Any

ALWAYS, MUTED, BYPASSED = 0, 2, 4

NOTES = {"Note", "MarkdownNote"}
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"

# Types the page shows a widget for; every other type is a socket only.
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "TEXTAREA"}
UNSUPPORTED_PREFIX = "COMFY_DYNAMICCOMBO"

# What the page saves behind a value it may change after each run, and the inputs that get it without asking.
CONTROL_VALUES = {"fixed", "increment", "decrement", "randomize", "increment-wrap"}
SEED_NAMES = {"seed", "noise_seed"}
UPLOADS = ("image_upload", "video_upload", "animated_image_upload", "audio_upload")


class GraphError(ValueError):
    """The graph cannot be converted; the message names the node and the reason."""


def graph_to_prompt(graph: dict, object_info: dict) -> dict:
    """The API-format prompt of a saved graph, given the server's /object_info.

    Muted nodes are left out, bypassed ones passed through by type, Reroute and PrimitiveNode resolved, notes skipped.
    Raises GraphError for subgraphs, unknown node types and anything that is no graph of version 0.4.
    """
    links = _Links(graph)
    prompt = {}
    for node in graph["nodes"]:
        kind = node["type"]
        if node.get("mode", ALWAYS) in (MUTED, BYPASSED) or kind in NOTES or kind in (REROUTE, PRIMITIVE):
            continue
        if kind not in object_info:
            raise GraphError(f"node {node['id']} is of type {kind!r}, which the server does not know")
        schema = object_info[kind]
        inputs = _widget_values(node, schema)
        for slot in node.get("inputs") or []:
            source = links.resolve(slot.get("link"), slot["type"])
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or schema.get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _protected(value: Any) -> Any:
    """A literal as the prompt holds it: a list would be taken for a link."""
    return {"__value__": value} if isinstance(value, list) else value


class _Links:
    """Answers where the value behind a link comes from."""

    def __init__(self, graph: dict):
        if not isinstance(graph.get("nodes"), list) or not isinstance(graph.get("links"), list):
            raise GraphError("no `nodes` and `links` lists: this is not a graph-format workflow (version 0.4)")
        if any(not isinstance(link, list) for link in graph["links"]):
            raise GraphError("`links` holds something else than lists: only version 0.4 of the format is read")
        subgraphs = {s["id"]: s.get("name") for s in graph.get("definitions", {}).get("subgraphs", [])}
        for node in graph["nodes"]:
            if node["type"] in subgraphs:
                name = subgraphs[node["type"]]
                raise GraphError(f"node {node['id']} is the subgraph {name!r}: unpack it in the page and save again")
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        self.sources = {link[0]: (link[1], link[2]) for link in graph["links"]}

    def resolve(self, link_id: int | None, wanted: str) -> Any:
        """What an input of type `wanted` gets over this link: [node id, output], a literal, or None for nothing."""
        visited = set()
        while link_id in self.sources and link_id not in visited:
            visited.add(link_id)
            node_id, output = self.sources[link_id]
            if node_id not in self.nodes:
                raise GraphError(f"link {link_id} comes from node {node_id}, which is not in the graph")
            node = self.nodes[node_id]
            mode = node.get("mode", ALWAYS)
            if mode == MUTED:
                return None
            if mode == BYPASSED:
                link_id = _bypass(node, output, wanted)
            elif node["type"] == REROUTE:
                link_id = node["inputs"][0].get("link")
            elif node["type"] == PRIMITIVE:
                return _protected(node["widgets_values"][0])
            else:
                return [str(node_id), output]
        return None


def _compatible(a: str, b: str) -> bool:
    return "*" in (a, b) or bool(set(a.split(",")) & set(b.split(",")))


def _bypass(node: dict, output: int, wanted: str) -> int | None:
    """The link a bypassed node hands on for this output: the input in the same place if types agree, else the first."""
    inputs, made = node.get("inputs") or [], node["outputs"][output]["type"]
    if wanted == "*" and inputs:
        return inputs[output if output < len(inputs) else 0].get("link")
    fitting = [s for s in inputs if _compatible(s["type"], made) and _compatible(s["type"], wanted)]
    here = [s for s in inputs[output : output + 1] if s in fitting]
    exact = [s for s in inputs if s["type"] == wanted]
    return next(iter(here or exact or fitting), {}).get("link")


def _inputs_of(schema: dict):
    """(name, type, options, in required) of each input in the order the page lays them out.

    A combo is told as ["COMBO", {"options": [...]}] by V3 nodes and as [[...], {...}] by older ones.
    """
    for group in ("required", "optional"):
        members = schema["input"].get(group) or {}
        for name in (schema.get("input_order") or {}).get(group) or members:
            kind, *rest = members[name]
            options = rest[0] if rest else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            yield name, options.get("widgetType", kind), options, group == "required"


def _has_control(name: str, kind: str, options: dict) -> bool:
    asked = options.get("control_after_generate")
    return bool(asked) if asked is not None else kind == "INT" and name in SEED_NAMES


def _widget_values(node: dict, schema: dict) -> dict:
    """Widget name -> value. Values the page saves for its own widgets (control, upload) are read past.

    A widget that is also a linked input still has its value in the list. Widgets the list is too short for were added
    to the node after the graph was saved, and get their default, as in the page.
    """
    saved = node.get("widgets_values") or []
    by_name = saved if isinstance(saved, dict) else {}
    rest = [] if isinstance(saved, dict) else list(saved)
    values, upload_pending = {}, False
    for name, kind, options, required in _inputs_of(schema):
        if upload_pending and not required:
            # The page appends its upload button to the required inputs.
            rest, upload_pending = rest[1:], False
        if kind.startswith(UNSUPPORTED_PREFIX):
            raise GraphError(f"node {node['id']} ({node['type']}): input {name!r} is a dynamic combo, not supported")
        if kind not in WIDGET_TYPES or options.get("forceInput"):
            continue
        upload_pending |= required and any(options.get(upload) for upload in UPLOADS)
        if name in by_name:
            values[name] = _protected(by_name[name])
        elif rest:
            values[name] = _protected(rest.pop(0))
            if _has_control(name, kind, options):
                rest = _past_control(rest, node, name, kind)
        elif "default" in options:
            values[name] = _protected(options["default"])
        elif kind == "COMBO" and options.get("options"):
            values[name] = options["options"][0]
    return values


def _past_control(rest: list, node: dict, name: str, kind: str) -> list:
    """The values behind a control widget; a combo's control is followed by the filter for its list."""
    if rest and rest[0] not in CONTROL_VALUES:
        raise GraphError(
            f"node {node['id']} ({node['type']}): behind {name!r} the page saves one of "
            f"{', '.join(sorted(CONTROL_VALUES))}; here it is {rest[0]!r}, so the values after it would be shifted"
        )
    return rest[2:] if kind == "COMBO" else rest[1:]
