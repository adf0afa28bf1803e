"""An exponential moving average of the weights that are trained: what is sampled for the maps, and what a run gives."""

from contextlib import contextmanager

import torch


class WeightAverage:
    """The average of named parameters. `standing_in` puts it in their place for as long as the block lasts."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        self.parameters = parameters
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights."""
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def standing_in(self):
        """The parameters hold the average inside the block, and their own values, bit for bit, after it."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
