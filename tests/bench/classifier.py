"""A small classifier of Fashion-MNIST: judges the demo model's samples, and gives the features for FD."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

CPU = torch.device("cpu")
EPOCHS = 4
BATCH = 128


class Classifier(torch.nn.Module):
    """Three convolutions of stride 2 and two linear layers on the mean of the colours; `features` is (B, 128)."""

    def __init__(self, classes: int = 10):
        super().__init__()
        widths = (1, 32, 64, 128)
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 5, stride=2, padding=2) for a, b in zip(widths, widths[1:])
        )
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(width) for width in widths[1:])
        self.hidden = torch.nn.Linear(128 * 16, 128)
        self.head = torch.nn.Linear(128, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = images.mean(dim=1, keepdim=True)
        for convolution, norm in zip(self.convolutions, self.norms):
            x = F.relu(norm(convolution(x)))
        return F.relu(self.hidden(F.dropout(x.flatten(1), 0.25, self.training)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def trained_classifier(
    images: torch.Tensor, labels: torch.Tensor, cache: Path, seed: int = 0, device: torch.device = CPU
) -> Classifier:
    """A classifier trained on images (N, 3, 32, 32), or the one an earlier call left in the folder `cache`; on `device`."""
    path = cache / f"classifier-{seed}-{EPOCHS}.safetensors"
    torch.manual_seed(seed)
    model = Classifier()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.to(device).eval()
    model, images, labels = model.to(device), images.to(device), labels.to(device)
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="classifier", mininterval=5):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(device)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model.eval()


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Classes (N,) of images (N, 3, 32, 32) in [-1, 1], on the CPU; the model may be anywhere."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).argmax(dim=1).cpu() for part in images.split(500)])


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose class the model names."""
    return round((predict(model, images) == labels).float().mean().item(), 4)
