"""What `fam_training` runs: its sizes, arms and sweeps, and the order and needs of the jobs. The plan is in fam_training.py."""

from dataclasses import dataclass

from .job_queue import Job

ARMS = {"base": (0.0, 0.0), "forward": (0.0, 0.01), "reverse": (0.025, 0.0), "both": (0.025, 0.01)}
"""Attention strength, noise strength."""
PUBLISHED = {"base": 8.985, "forward": 8.514, "reverse": 8.450, "both": 8.369}
SPLITS = {"1:4": 0.2, "4:1": 0.8}
ATTENTION, NOISE = ARMS["both"]


@dataclass(frozen=True)
class Variant:
    """A refinement. change: what is done to each map, see `CHANGES` in fam_training_runs.py. sampled: K, V (1 + sampled) in the samples
    that it is judged by, without any map in training."""

    attention: float = ATTENTION
    noise: float = NOISE
    map_every: int | None = None
    base_fraction: float = 0.5
    change: str = ""
    sampled: float = 0.0


VARIANTS = {
    "forward": Variant(attention=0), "reverse": Variant(noise=0), "both": Variant(),
    "forward 0.1": Variant(0, 0.1), "reverse 0.1": Variant(0.1, 0), "both, uniform map": Variant(change="uniform"),
    "both, rolled map": Variant(change="rolled"), "both, inverted map": Variant(change="inverted"),
    "forward -0.1": Variant(0, -0.1),
    "reverse 0.2": Variant(0.2, 0), "reverse 0.1, uniform map": Variant(0.1, 0, change="uniform"), "reverse 0.4": Variant(0.4, 0),
    "base, weaker by 0.045 while sampling": Variant(0, 0, sampled=-0.045),
    "base, weaker by 0.15 while sampling": Variant(0, 0, sampled=-0.15),
    "forward 0.05": Variant(0, 0.05), "reverse 0.05": Variant(0.05, 0),
    "forward 0.1, uniform map": Variant(0, 0.1, change="uniform"),
    "both, split 1:4": Variant(base_fraction=0.2), "both, split 4:1": Variant(base_fraction=0.8),
    "both, map every 500": Variant(map_every=500), "both, map every 50": Variant(map_every=50),
    "both, map every 250": Variant(map_every=250),
    "forward 0.0025": Variant(0, 0.0025), "reverse 0.0025": Variant(0.0025, 0),
    "forward 0.005": Variant(0, 0.005), "reverse 0.005": Variant(0.005, 0),
}
"""Without the base. What says most comes first, in case the time runs out."""
SWEEPS = [name for name in VARIANTS if name not in ARMS]


@dataclass(frozen=True)
class Size:
    """How large the bench is.

    base_steps, base_batch, peak_rate: of the base's own training; 0: the shipped weights are the base. rate: at which it ends, and of all runs.
    points: how often FD is taken on the way. steps: of a run, both phases. decay: of the moving average.
    judged, euler: samples a run is judged by, and their steps, the maps' too. map_images: of a map's batch.
    highlighter_images: of each class; highlighter_side: pixels that it sees a picture with.
    network: of `fast_demo.NETWORKS`. side: of the images, 32 or halves of it. from_mean: judge a second time, see fam_training.py.
    """

    base_steps: int = 6000
    base_batch: int = 256
    peak_rate: float = 5e-4
    rate: float = 1e-4
    warmup: int = 100
    points: int = 6
    steps: int = 2000
    batch: int = 128
    map_every: int = 100
    decay: float = 0.995
    judged: int = 5000
    euler: int = 20
    map_images: int = 64
    highlighter_images: int = 3000
    highlighter_epochs: int = 12
    highlighter_side: int = 64
    network: str = "demo"
    side: int = 32
    from_mean: bool = True
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sweep_seeds: tuple[int, ...] = (0, 1, 2)


SIZES = {
    "gpu": Size(),
    "cpu": Size(0, steps=120, batch=32, map_every=30, decay=0.98, judged=400, euler=10, map_images=16,
                highlighter_images=400, highlighter_epochs=10, seeds=(0, 1, 2), sweep_seeds=(0, 1)),
    "small": Size(5000, 64, peak_rate=2e-3, steps=800, batch=64, map_every=50, judged=2000, euler=10, highlighter_images=2000,
                  highlighter_side=32, network="small", side=16, from_mean=False, seeds=(0, 1, 2)),
    "tiny": Size(4, 4, warmup=2, points=2, steps=5, batch=4, map_every=2, judged=16, euler=2, map_images=2,
                 highlighter_images=20, highlighter_epochs=1, network="small", side=16, seeds=(0, 1), sweep_seeds=(0,)),
}


def jobs_of(size: Size, only: list[str] | None = None) -> list[Job]:
    """In the order in which they are begun. only: variants that are wanted, beside the base; all without it."""
    jobs = [Job("base model"), Job("highlighter", needs=["base model"])]
    jobs += [Job(f"base {seed}", "base", seed, ["base model"]) for seed in size.seeds]
    order = [(name, seed) for seed in size.seeds for name in ("both", "forward", "reverse")]
    order += [(name, seed) for seed in size.sweep_seeds for name in SWEEPS]
    order = [(name, seed) for name, seed in order if only is None or name in only]
    return jobs + [Job(f"{name} {seed}", name, seed, ["highlighter", f"base {seed}"]) for name, seed in order]
