"""The judge: a small convolutional classifier, whose reading of an image and whose features `evaluate.py` uses.

It learns from at most the first 50,000 training images; it never sees a fifth of them (the last 10,000 of MNIST), the
test set, or anything generated. MNIST's ships as support/classifier.pth, so that two people's figures compare; for any
other data `python evaluate.py` trains one first and keeps it for as long as the data stay the same: seconds for a
thousand images, about five minutes on two cores for 50,000 of 32 x 32 pixels in colour, of which it then reads four in
five right.

Where there is one class, as in a folder without subfolders, it learns to tell by how many quarters an image was turned
(Gidaris et al., 2018), for which it has to know what is up in it, and so what is in it.
"""

import hashlib
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import normalize
from support.command_line import Progress
from support.errors import DamagedFile, UserError, believing
from support.files import load_file, save_file

HELD_OUT = 10_000  # at most so many training images are the "real" column of the evaluation
LEARNT = 50_000  # at most so many of the others does the judge learn from
FEATURES = 128
LARGEST = 64  # pixels a side: larger images are reduced, so that a judge of photographs takes minutes too
STEPS = 1000  # at least, in training: few images are seen more often
SHIPPED = Path(__file__).with_name("classifier.pth")
# The checksum of the training images and labels that the shipped one is of.
MNIST = "efb55c3fdc23066589e368a7dea03a5f122b2ea8c148a7bae9b0544d21152e97"


class Classifier(nn.Module):
    """Four convolutions and two linear layers: x (B, C, H, W) in [-1, 1] -> features (B, 128) and logits (B, K)."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        # Width, stride, pooling. What is in a photograph takes more filters, and less of its resolution, than a digit.
        digits = (24, 1, False), (24, 1, True), (48, 1, False), (48, 1, True)
        photographs = (48, 2, False), (64, 1, True), (128, 1, True), (256, 1, False)
        layers: list[nn.Module] = []
        width = in_channels
        for c_out, stride, pool in digits if in_channels == 1 else photographs:
            layers += [nn.Conv2d(width, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
            width = c_out
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3))
        self.hidden = nn.Linear(width * 16, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.hidden(self.convolutions(x)))
        return features, self.head(features)

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 128) and logits (N, K) of any number of images (N, C, H, W) uint8, in batches."""
        features, logits = map(torch.cat, zip(*(self(as_judged(part)) for part in images.split(200))))
        if not logits.isfinite().all():
            raise UserError("the classifier's answers are not finite numbers; its file is damaged, delete it")
        return features, logits


def as_judged(images: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 -> floats in [-1, 1], reduced to at most 64 pixels a side."""
    x = normalize(images)
    larger = max(x.shape[2:]) / LARGEST
    if larger <= 1:
        return x
    size = [max(1, round(side / larger)) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def mixed_order(labels: Tensor) -> Tensor:
    """An order of labels (N,), as indices (N,), in which every part is like the whole.

    It is the order that they have, as in MNIST, where most of them differ from the one before; otherwise, as in folders
    of a class each, or where all labels are the same, it is a fixed permutation.
    """
    if 2 * labels.diff(dim=0).count_nonzero() > len(labels):
        return torch.arange(len(labels))
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))


def split_training(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the training images that the judge learns from, and of those that are held out for the real column.

    Held out are the last fifth of the mixed order, at most 10,000.
    """
    order = mixed_order(labels)
    cut = len(labels) - min(HELD_OUT, max(1, len(labels) // 5))
    return order[: min(cut, LEARNT)], order[cut:]


def random_affine(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, stretched and shifted a little, as another hand might have written it."""
    B = len(x)

    def uniform(size: float, *shape: int) -> Tensor:
        return ((torch.rand(B, *shape, generator=generator) * 2 - 1) * size).to(x.device)

    matrix = torch.eye(2, device=x.device) + uniform(0.15, 2, 2)
    affine = torch.cat([matrix, uniform(0.15, 2, 1)], dim=2)
    return F.grid_sample(x + 1, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False) - 1


def mirror_and_shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, each shifted by whole pixels, at most a tenth of its size."""
    B, _, H, W = x.shape
    affine = torch.eye(2, 3).repeat(B, 1, 1)
    affine[:, 0, 0] = 1 - 2.0 * torch.randint(2, (B,), generator=generator)
    for axis, side in enumerate((W, H)):
        affine[:, axis, 2] = torch.randint(-(side // 10), side // 10 + 1, (B,), generator=generator) * 2 / side
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="reflection", align_corners=False)


def quarter_turns(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image, or the square at its corner, turned by 0, 1, 2 or 3 quarters, and the number of these (B,)."""
    side = min(x.shape[2:])
    turns = torch.randint(4, (len(x),), generator=generator)
    return torch.stack([image.rot90(k, (1, 2)) for image, k in zip(x[:, :, :side, :side], turns.tolist())]), turns


def train_classifier(images: Tensor, labels: Tensor, learnt: Tensor, seed: int = 0) -> Classifier:
    """Train on some of the uint8 images (N, C, H, W), which may be on disk, and their labels (N,): those of an index.

    Grey images are taken for digits, or drawings, which may be turned a little and not mirrored; all others for
    photographs, which may be mirrored.
    """
    grey, classes = images.shape[1] == 1, int(labels.max()) + 1
    augment, epochs, batch_size, rate, decay = (
        (random_affine, 10, 250, 4e-3, 0.01) if grey else (mirror_and_shift, 8, 64, 3e-3, 0.05)
    )
    batch_size = min(batch_size, max(10, len(learnt) // 20), len(learnt))
    in_epoch = len(learnt) // batch_size
    epochs = max(epochs, math.ceil(STEPS / in_epoch))
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(images.shape[1], classes if classes > 1 else 4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=epochs * in_epoch)
    with Progress(epochs * in_epoch, "classifier", leave=True) as bar:
        for _ in range(epochs):
            order = learnt[torch.randperm(len(learnt), generator=generator)]
            for index in order.split(batch_size)[:in_epoch]:
                x, y = augment(as_judged(images[index]), generator), labels[index]
                if classes == 1:
                    x, y = quarter_turns(x, generator)
                _, logits = model(x.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, y)
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


def kept_judge(dataset: str, data_dir: str | Path, data: str) -> Path:
    """Where the judge of a dataset is kept, which may be called by a path: a readable name and the data's checksum."""
    name = re.sub(r"\W+", "-", Path(dataset).stem).strip("-")[:40]
    return Path(data_dir) / "judges" / f"{name}-{data[:12]}.pth"


def judge_of(dataset: str, data_dir: str | Path, images: Tensor, labels: Tensor) -> Classifier:
    """The classifier of a dataset's training images (N, C, H, W) uint8, which may be on disk, and labels (N,).

    The shipped one for MNIST, else one that is trained the first time and kept in data_dir, with a checksum of what it
    learned from: for other images or labels of the same name another is trained. Of one class it is a judge of quarter
    turns, with four logits.
    """
    data = checksum(images, labels)
    if data == MNIST and SHIPPED.exists():
        return load_classifier(SHIPPED)[0]
    path = kept_judge(dataset, data_dir, data)
    if path.exists():
        judge, learned_from = load_classifier(path)
        if learned_from == data:
            return judge
        print(f"{path} does not say that it learned from these images and labels, so it is replaced")
    learnt, _ = split_training(labels)
    of = "" if labels.max() else ", of one class: it learns to tell quarter turns"
    print(f"training a classifier of {dataset}, by {len(learnt):,} images, to be kept as {path}{of}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({}, path.with_suffix(".try"))  # better to fail now than after minutes of training
    path.with_suffix(".try").unlink(missing_ok=True)  # another may have done so
    save_file({"model": train_classifier(images, labels, learnt).state_dict(), "data": data}, path)
    return load_classifier(path)[0]
