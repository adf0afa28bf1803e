"""A LoRA on a model in training, made of ComfyUI's own weight adapters in bypass mode: f(x) + up(down(x)) / rank.

The model they are put on is a copy of the user's. Names are those that core's Load LoRA Model understands.
"""

import copy
from contextlib import contextmanager

import torch

import comfy.model_management
import comfy.model_patcher
from comfy.weight_adapter import adapter_maps
from comfy.weight_adapter.bypass import BypassInjectionManager

ALPHA = 1.0
"""Scale of a LoRA, over its rank: core's own choice. It is not trained."""


def training_copy(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """The user's model once more, with weights of its own that a gradient may pass through, and all its patches.

    The model given is taken off its device first, so that no patch is baked into the weights that are copied. Call
    under torch.inference_mode(False).

    Raises:
        ValueError: a LoRA in bypass mode is on the model: it holds on to the modules of the original.
    """
    if model.injections:
        raise ValueError(
            "model: a LoRA in bypass mode (or another injection) is on it, which cannot follow onto the copy that is "
            "trained. Load that LoRA without bypass."
        )
    if model.is_dynamic():
        if getattr(model, "cached_patcher_init", None) is None:
            raise ValueError(
                "model: ComfyUI loads it piece by piece (dynamic VRAM), and the node that loaded it does not say how to load it whole, "
                "which training needs. Load it with one of ComfyUI's own loaders, or start ComfyUI with --disable-dynamic-vram."
            )
        return model.clone(disable_dynamic=True)  # core loads its file once more
    management = comfy.model_management
    loaded = management.current_loaded_models
    others = [entry for entry in loaded if entry.model is None or entry.model.model is not model.model]
    management.free_memory(1e30, model.load_device, others)
    config, current = model.model.model_config, getattr(model.model, "current_patcher", None)
    shared = {id(config): config} | ({} if current is None else {id(current): None})
    twin = copy.deepcopy(model.model, shared | copies_of_quantized(model.model))
    nothing_kept = tuple(type(part)() for part in model.get_clone_model_override()[1])
    return model.clone(model_override=(twin, nothing_kept))


def copies_of_quantized(model: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """Copies of the weights that deepcopy cannot make one of, by id: quantized ones, which are classes of their own."""
    weights = (weight for weight in model.parameters() if type(weight) not in (torch.Tensor, torch.nn.Parameter))
    return {id(weight): torch.nn.Parameter(weight.data.clone(), requires_grad=False) for weight in weights}


def adaptable(module: torch.nn.Module) -> bool:
    """Whether core's bypass adapters are made for this layer: linear layers and convolutions that are not grouped."""
    kind = type(module).__name__.lower()
    layer = ("linear" in kind or "conv" in kind) and "transpose" not in kind and hasattr(module, "weight_function")
    weight = getattr(module, "weight", None)
    return layer and weight is not None and weight.ndim >= 2 and getattr(module, "groups", 1) == 1


class LoRAWeights:
    """The trained part of a run: two factors for every linear layer and convolution of a model's network.

    Attributes:
        parameters: name -> parameter, float32. The names are those of the LoRA's file.

    Raises:
        ValueError: a network without such layers.
    """

    def __init__(self, model: comfy.model_patcher.ModelPatcher, rank: int, seed: int):
        self.model, self.rank = model, rank
        self.manager, self.adapters, self.parameters = BypassInjectionManager(), {}, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % (1 << 63))
            for name, module in model.model.named_modules():
                if name.startswith("diffusion_model.") and adaptable(module):
                    self.add(name, module)
        if not self.parameters:
            raise ValueError("model: its network has no linear layer or convolution of ComfyUI's that a LoRA could go on.")
        self.injections = self.manager.create_injections(model.model)
        for injection in self.injections:
            injection.inject(model)

    def add(self, name: str, module: torch.nn.Module) -> None:
        """Make the adapter of one layer."""
        shape = torch.empty(module.weight.shape, device="cpu")
        adapter = adapter_maps["LoRA"].create_train(shape, rank=self.rank, alpha=ALPHA).requires_grad_(True)
        adapter.alpha.requires_grad_(False)
        self.adapters[name] = adapter
        self.manager.add_adapter(f"{name}.weight", adapter)
        for part, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                self.parameters[f"{name}.{part}"] = parameter

    def remove(self) -> None:
        """Take the adapters off again."""
        for injection in self.injections:
            injection.eject(self.model)

    @contextmanager
    def attached(self):
        """The adapters act on the model; they are off it after the block."""
        try:
            yield self
        finally:
            self.remove()

    def lora(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A LORA_MODEL of these values of the parameters: what core's loaders and Save LoRA take; on the CPU."""
        result = {name: value.detach().float().cpu().clone().contiguous() for name, value in values.items()}
        for name in self.adapters:
            result[f"{name}.alpha"] = torch.tensor(ALPHA)
        return result
