"""The three methods on one model: the all-in-one node, and stacks by hand in any order."""

import itertools

import pytest
import torch
from artifact_guard.nodes.asced.guard import guard_model
from artifact_guard.nodes.asced.options import GuardSettings
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.tag.guidance import guide_model
from artifact_guard.nodes.tag.settings import TagSettings
from artifact_guard.nodes.together.schema import ArtifactGuard

from tests.small_models import sample, small_model


def flaw_map():
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 48:100] = 1.0
    return mask


def test_strength_0_is_the_bare_model():
    small = small_model("sd15")
    model, artifacts, gaps = ArtifactGuard.execute(small.model, 0.0, True, True, flaw_map=flaw_map()).result
    output = sample(small, model, steps=8)
    assert torch.equal(output, sample(small, steps=8))
    assert "off" in artifacts.find({"samples": output}).summary()["reason"]
    assert gaps.find({"samples": output}).time_gap() >= 0


@pytest.mark.parametrize("used", list(itertools.product((False, True), repeat=3)))
def test_each_part_acts_only_where_it_is_switched_on(used):
    """Every combination of the three parts runs, fills its reports, and only what is on changes the result."""
    small = small_model("sd15")
    use_asced, use_tag, use_map = used
    model, artifacts, gaps = ArtifactGuard.execute(
        small.model, 1.0, use_asced, use_tag, flaw_map=flaw_map() if use_map else None
    ).result
    output = sample(small, model, steps=8)
    record = artifacts.find({"samples": output})
    assert torch.isfinite(output).all() and (record.reason is None) == use_asced
    gaps.find({"samples": output}).summary()
    if not (use_tag or use_map or record.restarts):
        assert torch.equal(output, sample(small, steps=8))
    if use_map and not use_tag:
        assert not torch.equal(output, sample(small, steps=8))


@pytest.mark.parametrize("order", list(itertools.permutations(("asced", "tag", "fam"))))
def test_the_methods_stack_in_any_order(order):
    small = small_model("flux")
    model, reports = small.model, {}
    for method in order:
        if method == "asced":
            model, reports["asced"] = guard_model(model, GuardSettings(mode="detect only"))
        elif method == "tag":
            model, reports["tag"] = guide_model(model, TagSettings())
        else:
            model = patch_attention(model, flaw_map(), AttentionSettings())
    output = sample(small, model, steps=8)
    assert torch.isfinite(output).all()
    for report in reports.values():
        assert report.find({"samples": output}).summary()["status"] != "not guarded"


def test_the_node_on_the_demo_model():
    """A batch of the embedded model goes through all of it, with a predictor left out."""
    model, _ = load_demo_model()
    guarded, artifacts, gaps = ArtifactGuard.execute(model, 1.0, True, True).result
    import nodes as core_nodes

    positive, negative = ([[class_token(label), {}]] for label in (0, None))
    with torch.inference_mode():
        (latent,) = core_nodes.common_ksampler(
            guarded, 3, 10, 2.5, "euler", "normal", positive, negative, {"samples": torch.zeros(2, 3, 32, 32)}
        )
    assert torch.isfinite(latent["samples"]).all()
    assert len(artifacts.find(latent).summary()["images"]) == 2 and gaps.find(latent).time_gap() > 0
