"""What the tests of the attention patch share: maps, patched models, and a spy on the keys and values of a run."""

import torch
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention

from tests.small_models import sample

STRENGTH = 0.3


def square(height=16, width=16, count=1):
    """A map of one marked square in the upper left quarter."""
    mask = torch.zeros(count, height, width)
    mask[:, 2:7, 1:6] = 1
    return mask


def patch(small, flaw_map, strength=STRENGTH, model=None, **settings):
    return patch_attention(model or small.model, flaw_map, AttentionSettings(strength, **settings))


def close(one, other):
    return torch.allclose(one / other.abs().max(), other / other.abs().max(), atol=2e-5)


class Spy:
    """An attention override that notes the keys and values of every call. A patch applied after it hands on to it."""

    def __init__(self, model):
        self.model, self.keys, self.values = model.clone(), [], []
        self.model.model_options["transformer_options"]["optimized_attention_override"] = self

    def __call__(self, func, q, k, v, *args, **kwargs):
        self.keys.append(k.clone())
        self.values.append(v.clone())
        return func(q, k, v, *args, **kwargs)


def watched(small, flaw_map=None, model=None, steps=1, settings={}, strength=STRENGTH, **more):
    """The keys and values of all attention calls of a short run; patched if there is a map."""
    spy = Spy(model or small.model)
    patched = spy.model if flaw_map is None else patch(small, flaw_map, strength, model=spy.model, **settings)
    sample(small, patched, steps=steps, **more)
    return spy
