"""The judge: a small convolutional classifier, whose reading of a digit and whose features `evaluate.py` uses.

It learns from the first 50,000 training images alone; it never sees the last 10,000, the test set, or anything
generated. MNIST's ships as support/classifier.pth, so that two people's figures compare; for any other data
`python evaluate.py` trains one first (a few minutes on two cores) and keeps it for as long as the data stay the same.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import normalize
from support.command_line import Progress
from support.errors import DamagedFile, UserError, believing
from support.files import load_file, save_file

HELD_OUT = 10_000  # the last training images: the "real" column of the evaluation
FEATURES = 128
SHIPPED = Path(__file__).with_name("classifier.pth")
# The checksum of the training images and labels that the shipped one is of.
MNIST = "efb55c3fdc23066589e368a7dea03a5f122b2ea8c148a7bae9b0544d21152e97"


class Classifier(nn.Module):
    """Four convolutions and two linear layers: x (B, C, H, W) in [-1, 1] -> features (B, 128) and logits (B, K)."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out, pool in ((in_channels, 24, False), (24, 24, True), (24, 48, False), (48, 48, True)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3))
        self.hidden = nn.Linear(48 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.hidden(self.convolutions(x)))
        return features, self.head(features)

    @torch.no_grad()
    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 128) and logits (N, K) of any number of images, in batches."""
        features, logits = map(torch.cat, zip(*(self(part) for part in x.split(200))))
        if not logits.isfinite().all():
            raise UserError("the classifier's answers are not finite numbers; its file is damaged, delete it")
        return features, logits


def random_affine(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, stretched and shifted a little, as another hand might have written it."""
    B = len(x)

    def uniform(size: float, *shape: int) -> Tensor:
        return ((torch.rand(B, *shape, generator=generator) * 2 - 1) * size).to(x.device)

    matrix = torch.eye(2, device=x.device) + uniform(0.15, 2, 2)
    affine = torch.cat([matrix, uniform(0.15, 2, 1)], dim=2)
    return F.grid_sample(x + 1, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False) - 1


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 10, seed: int = 0) -> Classifier:
    """Train on uint8 images (N, C, H, W) and their labels (N,), leaving out the last 10,000."""
    images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(images.shape[1], int(labels.max()) + 1)
    batch_size = 250
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with Progress(steps, "classifier", leave=True) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in order.split(batch_size)[: len(images) // batch_size]:
                _, logits = model(random_affine(normalize(images[index]), generator))
                loss = F.cross_entropy(logits, labels[index])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
    return model.eval()


def load_classifier(path: str | Path) -> tuple[Classifier, str | None]:
    """A classifier from its file, in evaluation mode, and the checksum of what it learned from, if the file has it.

    Raises:
        UserError: if the file holds no classifier, or one of weights that are not finite.
    """
    try:
        content = load_file(path)
    except DamagedFile as error:
        raise UserError(f"{error}; delete it to have a classifier trained") from error
    with believing(f"{path} holds no classifier; delete it to have one trained"):
        state, data = content.get("model", content), content.get("data")
        model = Classifier(state["convolutions.0.weight"].shape[1], len(state["head.bias"]))
        model.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("its weights are not finite")
    return model.eval().to(memory_format=torch.channels_last), data  # the faster order of pixels on a CPU


def checksum(*tensors: Tensor) -> str:
    """One number, in hexadecimal, for the sizes, types and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def judge_of(dataset: str, data_dir: str | Path, images: Tensor, labels: Tensor) -> Classifier:
    """The classifier of a dataset's training images (N, C, H, W) uint8 and labels (N,).

    The shipped one for MNIST, else one that is trained the first time and kept in data_dir, with a checksum of what it
    learned from: for other images or labels of the same name another is trained.
    """
    data, path = checksum(images, labels), Path(data_dir) / dataset / "classifier.pth"
    if data == MNIST and SHIPPED.exists():
        return load_classifier(SHIPPED)[0]
    if path.exists():
        judge, learned_from = load_classifier(path)
        if learned_from == data:
            return judge
        of = "learned from other images or labels" if learned_from else "does not say what it learned from"
        print(f"{path} {of}, so it is replaced")
    if len(images) < 2 * HELD_OUT:
        raise UserError(f"{dataset} has {len(images)} training images; a judge needs {2 * HELD_OUT} or more")
    classes, seen = int(labels.max()) + 1, len(labels[:-HELD_OUT].unique())
    if classes == 1:
        raise UserError(f"{dataset} has one class, or no labels; there is nothing that a judge could learn to tell")
    if seen < classes:
        raise UserError(f"{dataset}: all but the last {HELD_OUT} images show {seen} of {classes} classes; shuffle them")
    print(f"training a classifier of {dataset}, to be kept as {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({}, path.with_suffix(".try"))  # better to fail now than after minutes of training
    path.with_suffix(".try").unlink(missing_ok=True)  # another may have done so
    save_file({"model": train_classifier(images, labels).state_dict(), "data": data}, path)
    return load_classifier(path)[0]
