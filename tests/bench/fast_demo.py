"""Training and sampling of the demo model, or of a smaller one, for many long runs: the node's step, without what a graph
editor needs around it.

A step is the one of nodes/fam/train_steps.py (a test compares loss and gradients), with whole timesteps: of images x0,
    e = eps + lambda M,   u = sqrt(abar) x0 + sqrt(1 - abar) e,   loss = |network(u, t) - (sqrt(abar) e - sqrt(1 - abar) x0)|^2,
and K, V (1 + lambda M) in self-attention. lambda M is 0 in ordinary training, which leaves every bit as it is, so that
one step serves all arms. Data, draws, weights, their average and the map stay on the device, no step waits for it, and
with CUDA the step is one CUDA graph: launched one by one, its 2,000 kernels take several times as long.
"""

import copy
import functools
import logging

import torch
import torch.nn.functional as F

from .flaw_aware_demo import BETAS, LABEL_DROPOUT, trainable, trainable_demo
from .training_runs import quick_dtype

WEIGHT_DECAY, LARGEST_GRADIENT = 0.01, 1.0
SMALL = {
    "image_size": 16, "channel_mult": (1, 1), "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
}
"""What the small network has instead of the demo model's: images of 16x16, two levels of 32 channels, attention on 8x8."""
WARMING_UP = 3
"""Steps that are thrown away before a graph is captured: libraries choose their kernels in them."""


def small_model(demo_model):
    """A network of 0.36 million fresh weights, the same at every call, and a schedule that ends in noise alone: a model patcher."""
    from .train_demo import initialise

    model = trainable(demo_model, demo_model.UNET_CONFIG | SMALL, {"zsnr": True})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initialise(model.model.diffusion_model)
    return model


NETWORKS = {"demo": trainable_demo, "small": small_model}


class FastDemo:
    """The demo model in training, and its moving average.

    Args:
        images: (N, 3, S, S) in [-1, 1], S 32 for the demo model. labels: (N,). batch: images a step.
        graph: capture a CUDA graph, where there is CUDA.
        network: of `NETWORKS`.
    """

    def __init__(self, demo_model, images: torch.Tensor, labels: torch.Tensor, batch: int, graph: bool = True, network: str = "demo"):
        model = NETWORKS[network](demo_model)
        self.device, self.batch, self.dtype = model.load_device, batch, quick_dtype(model.load_device)
        self.network = model.model.diffusion_model.requires_grad_(True)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.sampling = model.model.model_sampling
        self.sigmas = self.sampling.sigmas.detach().float().to(self.device)
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.shape = tuple(images.shape[1:])
        self.grids = [self.shape[-1] // 2, self.shape[-1] // 4]  # sides of the levels that have attention
        self.mean_image = self.images.mean(dim=0)
        classes = [*range(len(demo_model.LABELS)), None]
        self.tokens = torch.cat([demo_model.class_token(label) for label in classes]).to(self.device)
        self.make_buffers()
        self.make_optimizer()
        self.graph = self.capture() if graph and self.device.type == "cuda" else None

    def make_buffers(self) -> None:
        """What a step reads: written before it, never replaced, since a graph knows them by their place."""
        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.generator = torch.Generator(self.device)
        self.clean, self.noise = zeros(self.batch, *self.shape), zeros(self.batch, *self.shape)
        self.timesteps = zeros(self.batch, dtype=torch.long)
        self.context = zeros(self.batch, *self.tokens.shape[1:])
        self.noise_map = zeros(1, 1, *self.shape[1:])
        self.amounts = {side * side: zeros(self.batch, side * side) for side in self.grids}
        self.loss_now = zeros()

    def make_optimizer(self) -> None:
        """AdamW with its moments there from the start, so that a state can be put into them."""
        self.parameters = dict(self.network.named_parameters())
        self.averages = list(self.averaged.parameters())
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=cuda, capturable=cuda
        )
        if cuda:
            self.optimizer.param_groups[0]["lr"] = torch.zeros((), device=self.device)
        for parameter in self.parameters.values():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device=self.device if cuda else "cpu")
            self.optimizer.state[parameter] = {"step": step} | moments

    # One step

    def patch(self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options) -> tuple:
        """attn1_patch: K, V (1 + lambda M)."""
        from artifact_guard.kernels.kv_scale import scale_pair

        return n, *scale_pair(context, value, self.amounts[n.shape[1]])

    def scaled(self, amount: float, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options) -> tuple:
        """attn1_patch: K, V (1 + amount), whatever the batch."""
        return n, context * (1 + amount), value * (1 + amount)

    def loss(self) -> torch.Tensor:
        """Of what is in the buffers."""
        sigma = self.sigmas[self.timesteps].view(-1, 1, 1, 1)
        scale, noise = (sigma.square() + 1).rsqrt(), self.noise + self.noise_map
        u, v = (self.clean + sigma * noise) * scale, (noise - sigma * self.clean) * scale
        options = {"patches": {"attn1_patch": [self.patch]}}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.network(u, self.timesteps, context=self.context, transformer_options=options)
        return F.mse_loss(predicted.float(), v)

    def update(self) -> None:
        """Loss, gradient, AdamW."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self.loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.loss_now.copy_(loss.detach())

    def capture(self) -> torch.cuda.CUDAGraph | None:
        """The update as a graph; None, said in the log, where this torch or device cannot. The weights stay as they were."""
        before = {name: value.clone() for name, value in self.state().items()}
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMING_UP):
                self.update()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        try:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.update()
        except RuntimeError as error:
            logging.warning("The training step could not be captured as a CUDA graph, it goes kernel by kernel: %s", error)
            graph = None
        self.load(before)
        return graph

    def draw(self, seed: int) -> None:
        """Fill the buffers; it depends on the seed, and on the kind of device, alone."""
        generator = self.generator.manual_seed(seed)
        chosen = torch.randint(len(self.images), (self.batch,), generator=generator, device=self.device)
        self.clean.copy_(self.images[chosen])
        self.noise.normal_(generator=generator)
        self.timesteps.random_(0, len(self.sigmas), generator=generator)
        dropped = torch.rand(self.batch, generator=generator, device=self.device) < LABEL_DROPOUT
        self.context.copy_(self.tokens[torch.where(dropped, len(self.tokens) - 1, self.labels[chosen])])

    def step(self, seed: int, rate: float, decay: float) -> torch.Tensor:
        """A step and the moving average's; the loss as a tensor, which the next step overwrites."""
        self.draw(seed)
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if self.graph is None:
            self.update()
        else:
            self.graph.replay()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, list(self.parameters.values()), 1 - decay)
        return self.loss_now

    @torch.no_grad()
    def set_map(self, flaw_map: torch.Tensor | None, attention_strength: float = 0.0, noise_strength: float = 0.0) -> None:
        """The map (1, S, S) that acts on the steps from now on; None: ordinary training."""
        from artifact_guard.nodes.fam.token_maps import resize_tokens

        given = torch.zeros(1, *self.shape[1:]) if flaw_map is None else flaw_map.float()
        self.noise_map.copy_((noise_strength * given)[None])
        for side in self.grids:
            self.amounts[side * side].copy_(attention_strength * resize_tokens(given[None], side, side))

    # Going on later

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, their average and the optimizer's moments, by name; the tensors themselves."""
        tensors = {}
        for (name, parameter), average in zip(self.parameters.items(), self.averages):
            tensors |= {f"weights.{name}": parameter.detach(), f"average.{name}": average}
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put a state into the tensors that are there."""
        for name, value in self.state().items():
            value.copy_(state[name])

    @torch.no_grad()
    def begin_with(self, weights: dict[str, torch.Tensor]) -> None:
        """Weights and their average as given, the moments at zero."""
        for name, value in self.state().items():
            kind, _, parameter = name.partition(".")
            value.copy_(weights[parameter]) if kind in ("weights", "average") else value.zero_()

    # Sampling

    @torch.no_grad()
    def sample(
        self, labels: torch.Tensor, seed: int, steps: int, part: int = 1000, from_mean: bool = False, attention: float = 0.0
    ) -> torch.Tensor:
        """Images (N, 3, S, S) in [-1, 1] of the average, on the CPU, by Euler's method without guidance; ComfyUI's
        sampler `euler` and scheduler `normal`. The noise depends on seed and number alone.

        attention: K, V (1 + attention) in self-attention. from_mean: the mean training image is added to the noise of the start. Of the noisiest images of Stable Diffusion's
        schedule 0.5 % of the variance are image, so that the brightness of a start of noise alone says "grey".
        """
        import comfy.samplers

        options = {} if attention == 0 else {"patches": {"attn1_patch": [functools.partial(self.scaled, attention)]}}
        schedule = comfy.samplers.calculate_sigmas(self.sampling, "normal", steps)
        timesteps = self.sampling.timestep(schedule[:-1].to(self.sigmas.device)).to(self.device)
        schedule, done = schedule.tolist(), []
        for number, chosen in enumerate(labels.split(part)):
            noise = torch.randn(len(chosen), *self.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
            context = self.tokens[chosen.to(self.device)]
            x = noise.to(self.device) * (schedule[0] ** 2 + 1) ** 0.5
            if from_mean:
                x = x + self.mean_image
            for index, (sigma, following) in enumerate(zip(schedule, schedule[1:])):
                scale = (sigma**2 + 1) ** -0.5
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    v = self.averaged(x * scale, timesteps[index].expand(len(x)), context=context, transformer_options=options)
                denoised = x * scale**2 - v.float() * sigma * scale
                x = x + (x - denoised) * ((following - sigma) / sigma)
            done.append(x.clamp(-1, 1).cpu())
        return torch.cat(done)
