"""A classifier of CIFAR-10 for the features of its distances: a small residual network, trained in about a minute on a GPU.

Nine layers as in D. Page's "How to train your ResNet" (2018): random crops and flips, one cycle of the learning rate.
Its accuracy on the test images is part of every figure that uses it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .training_runs import quick_autocast

EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY, SMOOTHING = 16, 512, 0.005, 0.05, 0.1
BORDER = 4
"""Pixels by which crops move."""


def block(before: int, after: int, pool: bool = False) -> torch.nn.Sequential:
    layers = [torch.nn.Conv2d(before, after, 3, padding=1, bias=False), torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, *([torch.nn.MaxPool2d(2)] if pool else []))


class CifarClassifier(torch.nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> logits (B, classes); `features` is (B, 128)."""

    def __init__(self, width: int = 64, classes: int = 10):
        super().__init__()
        self.stem, self.second = block(3, width), block(width, 2 * width, pool=True)
        self.first_pair = torch.nn.Sequential(block(2 * width, 2 * width), block(2 * width, 2 * width))
        self.third, self.fourth = block(2 * width, 4 * width, pool=True), block(4 * width, 8 * width, pool=True)
        self.second_pair = torch.nn.Sequential(block(8 * width, 8 * width), block(8 * width, 8 * width))
        self.hidden, self.head = torch.nn.Linear(8 * width, 128), torch.nn.Linear(128, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.second(self.stem(images))
        x = self.fourth(self.third(x + self.first_pair(x)))
        x = x + self.second_pair(x)
        return F.relu(self.hidden(x.amax(dim=(2, 3))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def moved(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Each image (B, C, H, W) shifted by up to BORDER pixels and, one in two, mirrored."""
    count, _, height, width = images.shape
    drawn = {"generator": random, "device": images.device}
    x = torch.arange(width, device=images.device).expand(count, -1)
    x = torch.where(torch.rand(count, 1, **drawn) < 0.5, x, width - 1 - x)
    x = x + torch.randint(2 * BORDER + 1, (count, 1), **drawn)
    y = torch.arange(height, device=images.device) + torch.randint(2 * BORDER + 1, (count, 1), **drawn)
    padded = F.pad(images, (BORDER,) * 4, "reflect").movedim(1, -1)
    each = torch.arange(count, device=images.device)
    return padded[each[:, None, None], y[:, :, None], x[:, None]].movedim(-1, 1)


def trained_cifar_classifier(
    images: torch.Tensor, labels: torch.Tensor, cache: Path, device: torch.device, width: int = 64, epochs: int = EPOCHS,
    seed: int = 0,
) -> CifarClassifier:
    """A classifier trained on images (N, 3, 32, 32), or the one an earlier call left in the folder `cache`; on `device`."""
    path = cache / f"cifar-classifier-{len(images)}-{width}-{epochs}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = CifarClassifier(width).to(device, memory_format=torch.channels_last)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    images, labels = images.to(device), labels.to(device)
    batch = min(BATCH, len(images) // 2)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.25)
    random = torch.Generator(device).manual_seed(seed)
    for _ in tqdm(range(steps), desc="classifier", mininterval=5):
        chosen = torch.randint(len(images), (batch,), generator=random, device=device)
        given = moved(images[chosen], random).contiguous(memory_format=torch.channels_last)
        with quick_autocast(device):
            told = model(given)
        loss = F.cross_entropy(told.float(), labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, path)
    return model.eval()
