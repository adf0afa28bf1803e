"""graph_to_prompt against prompts written down by hand, after what the page itself makes of such graphs."""

import pytest

from tests.harness.graph import GraphError, graph_to_prompt

SAMPLER_WIDGETS = [5, "randomize", 20, 7.5, "euler"]

OBJECT_INFO = {
    "Loader": {"input": {"required": {}}, "input_order": {"required": []}, "display_name": "Load It"},
    "Sampler": {
        # The dictionary is shuffled on purpose: input_order says how the page lays widgets out.
        "input": {
            "required": {
                "sampler_name": ["COMBO", {"options": ["euler", "heun"]}],
                "cfg": ["FLOAT", {"default": 8.0}],
                "steps": ["INT", {"default": 20}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "model": ["MODEL"],
            },
            "optional": {"mask": ["MASK", {}], "strength": ["FLOAT", {"default": 1.0}]},
        },
        "input_order": {
            "required": ["model", "seed", "steps", "cfg", "sampler_name"],
            "optional": ["mask", "strength"],
        },
    },
    "OldStyle": {"input": {"required": {"mode": [["fast", "slow"], {}], "amount": ["INT", {"forceInput": True}]}}},
    "LoadImage": {
        "input": {
            "required": {"image": [["a.png"], {"image_upload": True}]},
            "optional": {"scale": ["FLOAT", {"default": 1.0}]},
        }
    },
    "Patch": {"input": {"required": {"model": ["MODEL", {}], "amount": ["FLOAT", {"default": 0.5}]}}},
    "Pick": {"input": {"required": {"choice": [["x", "y"], {"control_after_generate": True}], "text": ["STRING", {}]}}},
}


def node(number, kind, widgets=None, inputs=(), outputs=("MODEL",), mode=0, **more):
    """A saved node; inputs are (name, type, link id or None)."""
    slots = [{"name": name, "type": type_, "link": link} for name, type_, link in inputs]
    made = {"id": number, "type": kind, "mode": mode, "inputs": slots, "outputs": [{"type": o} for o in outputs]}
    return {**made, **({} if widgets is None else {"widgets_values": widgets}), **more}


def convert(*nodes, links=(), **more):
    graph = {"version": 0.4, "nodes": list(nodes), "links": [list(link) for link in links], **more}
    return graph_to_prompt(graph, OBJECT_INFO)


def inputs(prompt, number):
    return prompt[str(number)]["inputs"]


def test_widgets_and_links_become_inputs():
    prompt = convert(
        node(1, "Loader"),
        node(2, "Sampler", [*SAMPLER_WIDGETS, 0.25], [("model", "MODEL", 10)], title="Mine"),
        links=[(10, 1, 0, 2, 0, "MODEL")],
    )
    assert prompt == {
        "1": {"class_type": "Loader", "inputs": {}, "_meta": {"title": "Load It"}},
        "2": {
            "class_type": "Sampler",
            "inputs": {
                "model": ["1", 0],
                "seed": 5,
                "steps": 20,
                "cfg": 7.5,
                "sampler_name": "euler",
                "strength": 0.25,
            },
            "_meta": {"title": "Mine"},
        },
    }


def test_widgets_added_after_the_graph_was_saved_get_their_default():
    assert inputs(convert(node(2, "Sampler", SAMPLER_WIDGETS)), 2)["strength"] == 1.0


def test_a_value_where_the_control_word_belongs_is_an_error():
    with pytest.raises(GraphError, match=r"node 2 \(Sampler\): behind 'seed'.*here it is 20"):
        convert(node(2, "Sampler", [5, 20, 7.5, "euler"]))


def test_seed_has_a_control_value_by_its_name_unless_the_schema_forbids_it():
    info = {"Seeded": {"input": {"required": {"seed": ["INT", {}], "steps": ["INT", {}]}}}}
    graph = {"nodes": [node(1, "Seeded", [3, "fixed", 9])], "links": []}
    assert graph_to_prompt(graph, info)["1"]["inputs"] == {"seed": 3, "steps": 9}
    info["Seeded"]["input"]["required"]["seed"][1]["control_after_generate"] = False
    graph = {"nodes": [node(1, "Seeded", [3, 9])], "links": []}
    assert graph_to_prompt(graph, info)["1"]["inputs"] == {"seed": 3, "steps": 9}


def test_a_combo_with_control_also_saves_its_list_filter():
    assert inputs(convert(node(1, "Pick", ["y", "increment-wrap", "", "hello"])), 1) == {"choice": "y", "text": "hello"}


def test_a_linked_widget_keeps_its_place_and_the_link_wins():
    prompt = convert(
        node(1, "Loader", outputs=("INT",)),
        node(2, "Sampler", SAMPLER_WIDGETS, [("steps", "INT", 4)]),
        links=[(4, 1, 0, 2, 0, "INT")],
    )
    assert inputs(prompt, 2)["steps"] == ["1", 0]
    assert inputs(prompt, 2)["cfg"] == 7.5


def test_old_style_combo_and_forced_input():
    assert inputs(convert(node(1, "OldStyle", ["slow"])), 1) == {"mode": "slow"}


def test_upload_button_value_is_skipped_before_optional_widgets():
    assert inputs(convert(node(1, "LoadImage", ["a.png", "image", 0.5])), 1) == {"image": "a.png", "scale": 0.5}


def test_widget_values_by_name():
    assert inputs(convert(node(1, "Patch", {"amount": 0.75})), 1) == {"amount": 0.75}


def test_a_list_value_is_told_from_a_link():
    assert inputs(convert(node(1, "Pick", ["x", "fixed", "", ["1", 0]])), 1)["text"] == {"__value__": ["1", 0]}


def test_muted_node_is_dropped_with_its_links():
    prompt = convert(
        node(1, "Loader", mode=2),
        node(2, "Sampler", SAMPLER_WIDGETS, [("model", "MODEL", 1), ("steps", "INT", 2)]),
        links=[(1, 1, 0, 2, 0, "MODEL"), (2, 1, 1, 2, 1, "INT")],
    )
    assert list(prompt) == ["2"]
    assert "model" not in inputs(prompt, 2)
    assert inputs(prompt, 2)["steps"] == 20


def test_bypassed_nodes_pass_a_link_on_by_type():
    # Both bypassed nodes have an image before the model: the position does not decide, the type does.
    wires = [("image", "IMAGE", None), ("model", "MODEL", 1)]
    prompt = convert(
        node(1, "Loader"),
        node(2, "Patch", [0.1], wires, mode=4),
        node(3, "Unknown", [0.1], [("image", "IMAGE", None), ("model", "MODEL", 2)], mode=4),
        node(4, "Sampler", SAMPLER_WIDGETS, [("model", "MODEL", 3)]),
        links=[(1, 1, 0, 2, 1, "MODEL"), (2, 2, 0, 3, 1, "MODEL"), (3, 3, 0, 4, 0, "MODEL")],
    )
    assert list(prompt) == ["1", "4"]
    assert inputs(prompt, 4)["model"] == ["1", 0]


def test_bypass_prefers_the_input_at_the_output_position():
    prompt = convert(
        node(1, "Loader", outputs=("LATENT", "LATENT")),
        node(2, "Unknown", None, [("a", "LATENT", 1), ("b", "LATENT", 2)], ("LATENT", "LATENT"), mode=4),
        node(3, "Patch", [0.5], [("latent", "LATENT", 3)]),
        links=[(1, 1, 0, 2, 0, "LATENT"), (2, 1, 1, 2, 1, "LATENT"), (3, 2, 1, 3, 0, "LATENT")],
    )
    assert inputs(prompt, 3)["latent"] == ["1", 1]


def test_bypass_without_an_input_of_the_type_gives_nothing():
    prompt = convert(
        node(1, "Unknown", None, [("image", "IMAGE", None)], mode=4),
        node(2, "Patch", [0.5], [("model", "MODEL", 1)]),
        links=[(1, 1, 0, 2, 0, "MODEL")],
    )
    assert inputs(prompt, 2) == {"amount": 0.5}


def test_notes_reroutes_and_primitives_leave_no_node():
    prompt = convert(
        node(1, "Loader"),
        node(2, "Reroute", None, [("", "*", 1)], ("*",)),
        node(3, "Reroute", None, [("", "*", 2)], ("*",)),
        node(4, "PrimitiveNode", [12, "fixed"], outputs=("INT",)),
        node(5, "Note", ["read me"]),
        node(6, "MarkdownNote", ["# read me"]),
        node(7, "Sampler", SAMPLER_WIDGETS, [("model", "MODEL", 3), ("steps", "INT", 4)]),
        links=[(1, 1, 0, 2, 0, "*"), (2, 2, 0, 3, 0, "*"), (3, 3, 0, 7, 0, "MODEL"), (4, 4, 0, 7, 1, "INT")],
    )
    assert list(prompt) == ["1", "7"]
    assert inputs(prompt, 7)["model"] == ["1", 0]
    assert inputs(prompt, 7)["steps"] == 12


def test_unknown_type_is_named():
    with pytest.raises(GraphError, match="node 9 is of type 'Nowhere'"):
        convert(node(9, "Nowhere"))


def test_subgraph_is_named():
    definitions = {"subgraphs": [{"id": "1b2c", "name": "My group"}]}
    with pytest.raises(GraphError, match="node 3 is the subgraph 'My group'"):
        convert(node(3, "1b2c"), definitions=definitions)


def test_dynamic_combo_is_refused():
    info = {"Resize": {"input": {"required": {"how": ["COMFY_DYNAMICCOMBO_V3", {"options": []}]}}}}
    with pytest.raises(GraphError, match="node 1 .*'how' is a dynamic combo"):
        graph_to_prompt({"nodes": [node(1, "Resize", ["a"])], "links": []}, info)


@pytest.mark.parametrize("graph", [{"1": {"class_type": "Loader", "inputs": {}}}, {"nodes": [], "links": [{"id": 1}]}])
def test_other_formats_are_refused(graph):
    with pytest.raises(GraphError, match="version 0.4"):
        graph_to_prompt(graph, OBJECT_INFO)
