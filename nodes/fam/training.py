"""Training of a flaw highlighter: balanced batches, augmentation, a tenth held out, the best epoch kept."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .augment import augment
from .backbones import Backbone, new_network
from .highlighter import GENERATED, REAL, HighlighterSettings, fit_images

FEWEST_IMAGES = 8
HELD_OUT = 0.1
JUDGED_AT_ONCE = 16
BETAS = (0.5, 0.999)
LARGEST_GRADIENT = 1.0
"""Norm to which gradients are clipped: a network that starts from nothing may be thrown off in its first steps."""
RATE_FACTOR = {"vgg16": 1.0, "small": 100.0}
"""The node's learning rate is the published one, for VGG16. The small backbone starts from nothing and has norms: its
rate is this many times as high."""


@dataclass(frozen=True)
class TrainingSettings:
    """What the node sets. Raises ValueError for values that cannot work."""

    epochs: int
    batch_size: int
    learning_rate: float
    image_size: int
    seed: int
    backbone: str

    def __post_init__(self):
        for name in ("epochs", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a whole number of 1 or more is wanted.")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; at least 2 are wanted, one real and one generated image.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; a value above 0 is wanted, such as 2e-5.")


def check_classes(real: torch.Tensor, generated: torch.Tensor) -> None:
    """Refuse training images that a highlighter could only learn something wrong from.

    Raises:
        ValueError: no batch of images, too few of a class, or classes that differ in size or channels.
    """
    for name, images in (("real", real), ("generated", generated)):
        if images.ndim != 4:
            raise ValueError(
                f"{name}: an IMAGE of shape (count, height, width, channels) is wanted, {tuple(images.shape)} came."
            )
        if len(images) < FEWEST_IMAGES:
            raise ValueError(
                f"{name}: {len(images)} images came; at least {FEWEST_IMAGES} of each class are wanted, and a few hundred for "
                "a highlighter that is of use. Load a folder of images. If it came one by one, as Load Image (from Folder) gives it, "
                "put Rebatch Images between, with a batch_size as large as the folder."
            )
    if real.shape[1:3] != generated.shape[1:3]:
        sizes = [f"{images.shape[2]}x{images.shape[1]}" for images in (real, generated)]
        raise ValueError(
            f"real images are {sizes[0]} pixels and generated ones {sizes[1]}: the highlighter would learn the trace of "
            "the resizing. Scale both the same way to one size before this node."
        )
    if real.shape[-1] != generated.shape[-1]:
        raise ValueError(
            f"real images have {real.shape[-1]} channels and generated ones {generated.shape[-1]}: the highlighter would "
            "learn that. Convert both the same way (grey, RGB or RGBA)."
        )


def split_held_out(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) indices of one class: a tenth held out, at least two."""
    order = torch.randperm(count, generator=generator)
    held = max(2, round(HELD_OUT * count))
    return order[held:], order[:held]


def per_class(real: int, generated: int, draw: Callable, generator: torch.Generator) -> list:
    """`draw(count, generator)` for each class; one draw for both where the counts are equal, so that pairs stay pairs."""
    first = draw(real, generator)
    return [first, first if generated == real else draw(generated, generator)]


class Training:
    """One training run. `run` goes through the epochs; `best` is there at any time, also after an interruption.

    Args:
        real, generated: IMAGE (N, H, W, C), both of one size. Equally many are taken for pairs, image by image: a pair is
            held out as a whole and shown in one batch, so that of a picture and its flawed copy the flaw alone is left
            to learn. Sets that are no pairs lose nothing by it.
        device: where the network is trained.
        start: the network to begin with; its own weights stay as they are. Without one a new network is made.
        earlier: of a highlighter that is gone on with, its settings. Its seed chooses the held-out images. Of as many images as
            before they are the same ones, and it stays the best until an epoch is better; of others some that are held out may
            have been trained on, so that its own score would say too much, and the first epoch takes its place.

    Raises:
        ValueError: see `check_classes` and `fit_images`.
    """

    def __init__(
        self, real, generated, settings: TrainingSettings, device, start: Backbone | None = None,
        earlier: HighlighterSettings | None = None,
    ):
        check_classes(real, generated)
        self.settings, self.device, self.earlier = settings, device, earlier
        shape = HighlighterSettings(settings.backbone, settings.image_size)
        self.split_seed = settings.seed if earlier is None else earlier.seed
        generator = torch.Generator().manual_seed(self.split_seed)
        self.train_images, self.held_images = [], []
        split = per_class(len(real), len(generated), split_held_out, generator)
        for (train, held), images, name in zip(split, (real, generated), ("real", "generated")):
            pixels = (fit_images(images, shape, name) * 255).round().byte()
            self.train_images.append(pixels[train])
            self.held_images.append(pixels[held])
        if start is None:
            start = new_network(settings.backbone, settings.seed)
        with torch.inference_mode(False):
            self.network = copy.deepcopy(start).to(device).requires_grad_(True)
            self.best = copy.deepcopy(start).to(device).eval()
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.best_epoch, self.best_score = 0, (-1.0, 0.0)

    @property
    def accuracy(self) -> float:
        """Held-out accuracy of the best epoch, or of the highlighter that was gone on with; each class counts half."""
        return max(self.best_score[0], 0.0)

    @property
    def counts(self) -> tuple[int, int]:
        """How many real and generated images are trained on."""
        return len(self.train_images[REAL]), len(self.train_images[GENERATED])

    @property
    def steps_per_epoch(self) -> int:
        """Until every image of the larger class has been seen once."""
        return math.ceil(max(map(len, self.train_images)) / self.half_batch)

    @property
    def judged_at_once(self) -> int:
        """Images that are judged side by side: no more than memory has to hold in a step anyway."""
        return min(JUDGED_AT_ONCE, self.settings.batch_size)

    @property
    def half_batch(self) -> int:
        """Images of one class in a batch: no more than there are of the larger one."""
        return min(max(1, self.settings.batch_size // 2), max(map(len, self.train_images)))

    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out images (N, 3, h, w) in 0..1 and their classes (N,), real ones first."""
        classes = [torch.full((len(images),), c) for c, images in zip((REAL, GENERATED), self.held_images)]
        return torch.cat(self.held_images).float() / 255, torch.cat(classes)

    def batches(self, epoch: int):
        """Augmented images and classes of each step, half real, half generated; they depend on seed and epoch only.

        The smaller class is gone through as often as it takes.
        """
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + epoch) % (1 << 63))
        half = self.half_batch
        wanted = self.steps_per_epoch * half

        def order(count: int, generator: torch.Generator) -> torch.Tensor:
            rounds = math.ceil(wanted / count)
            return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:wanted]

        orders = per_class(*map(len, self.train_images), order, generator)
        classes = torch.tensor([REAL] * half + [GENERATED] * half)
        for chosen in zip(*(order.split(half) for order in orders)):
            images = torch.cat([pool[index] for pool, index in zip(self.train_images, chosen)])
            yield augment(images.float() / 255, generator), classes

    def evaluate(self) -> tuple[float, float]:
        """(balanced accuracy, minus loss) on the held-out images: larger is better."""
        images, classes = self.held_out()
        self.network.eval()
        with torch.no_grad():
            logits = torch.cat([self.network(part.to(self.device)).float().cpu() for part in images.split(self.judged_at_once)])
        right = (logits.argmax(dim=1) == classes).float()
        accuracy = (right[classes == REAL].mean() + right[classes == GENERATED].mean()).item() / 2
        weights = torch.where(classes == REAL, 1 / (classes == REAL).sum(), 1 / (classes == GENERATED).sum())
        loss = (F.cross_entropy(logits, classes, reduction="none") * weights).sum().item() / 2
        return accuracy, -loss

    def run(self, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Train for all epochs. `tell` gets (steps done, steps in all) after each step, of an epoch's last one when
        it has been judged; what it raises ends the run."""
        settings, steps = self.settings, self.steps_per_epoch
        total, rate = steps * settings.epochs, settings.learning_rate * RATE_FACTOR[settings.backbone]
        with torch.inference_mode(False), torch.enable_grad():
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate, betas=BETAS)
            rise = max(0.1, 2 / (total + 1))  # of a rise of less than two steps torch cannot make a schedule
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=rate, total_steps=total + 1, pct_start=rise, cycle_momentum=False
            )
            if self.earlier is not None and self.counts == (self.earlier.real_images, self.earlier.generated_images):
                self.best_score = self.evaluate()
            for epoch in range(settings.epochs):
                self.network.train()
                losses = []
                for step, (images, classes) in enumerate(self.batches(epoch)):
                    logits = self.network(images.to(self.device))
                    loss = F.cross_entropy(logits.float(), classes.to(self.device))
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
                    optimizer.step()
                    schedule.step()
                    losses.append(loss.item())
                    if step + 1 < steps:
                        tell(epoch * steps + step + 1, total)
                self.losses.append(sum(losses) / len(losses))
                self.keep_best(epoch)
                tell((epoch + 1) * steps, total)

    def keep_best(self, epoch: int) -> None:
        """Judge the network after an epoch and remember it if no earlier one was better.

        Raises:
            ValueError: the network holds NaN, which no later epoch mends.
        """
        score = self.evaluate()
        if math.isnan(score[1]):
            raise ValueError(f"The loss on held-out images became NaN in epoch {epoch + 1}. Lower learning_rate.")
        self.accuracies.append(score[0])
        if score > self.best_score:
            self.best_score, self.best_epoch = score, epoch + 1
            self.best.load_state_dict(self.network.state_dict())

    def result(self, warnings: tuple[str, ...] = ()) -> HighlighterSettings:
        """Settings for a highlighter made of `best`."""
        epochs = self.best_epoch + (0 if self.earlier is None else self.earlier.epochs)
        return HighlighterSettings(
            self.settings.backbone, self.settings.image_size, epochs, self.accuracy, self.split_seed, *self.counts, warnings,
        )
