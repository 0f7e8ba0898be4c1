"""How good are the digits? `python evaluate.py` prints a table for a checkpoint or an .npz, beside real digits.

Every figure compares a set of images with the test set, by a classifier that has seen neither (support/classifier.py):

    accuracy         share of images that it reads as the label asked for
    FD               Frechet distance between Gaussians fitted to its features (Heusel et al., 2017, eq. 6)
    IS               Inception Score over its classes (Salimans et al., 2016): sharp and various, 1 to 10
    precision        share of the images that lie among the test images; recall, the other way round
                     (Kynkaanniemi et al., 2019: among = within the distance to some image's third neighbour)
    nearest          mean Euclidean distance to the nearest of the first 50,000 training images, pixels in [-1, 1];
                     memorised images would be near

The "real" column is the same for as many of the last 10,000 training digits: what a perfect model would get.

With --bits-per-dim N it prints, instead, how well a diffusion predicts N test digits: its variational bound.
"""

from support.start import start_quietly

if __name__ == "__main__":
    start_quietly()  # before all else is imported

import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import ROOT, SAMPLING, Config
from dataset import Dataset, denormalize, load_dataset, normalize
from diffusion import Diffusion
from dit import DiT
from inference import describe_sampling, draw_images, network_evaluations
from support.checkpoint import build_process, load_model
from support.classifier import HELD_OUT, Classifier, judge_of
from support.command_line import Parser, run_script
from support.errors import UserError, check_limits
from support.files import check_path, writing
from support.machine import choose_device
from variants.learned_variance import bits_per_dim


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), in float64."""
    a, b = a.double(), b.double()
    gap, cov_a, cov_b = a.mean(0) - b.mean(0), a.T.cov(), b.T.cov()
    # tr (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of C_a C_b, real and not negative.
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    return (gap.square().sum() + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()).item()


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) of logits (N, K): 1 ... K."""
    log_p = logits.double().log_softmax(1)
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item()


def kth_neighbour(features: Tensor, k: int = 3) -> Tensor:
    """Distance of each of features (N, D) to its k-th nearest neighbour among the others -> (N,)."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(1000)])


def share_within(points: Tensor, among: Tensor, radii: Tensor) -> float:
    """The share of points (N, D) that lie within some ball around `among` (M, D) with its radius (M,)."""
    inside = [(torch.cdist(part, among) <= radii).any(1) for part in points.split(1000)]
    return torch.cat(inside).float().mean().item()


def nearest_distance(images: Tensor, training: Tensor) -> float:
    """Mean over images (N, D) of the Euclidean distance to the nearest of training (M, D)."""
    half_norms = training.square().sum(1) / 2
    # |x - t|^2 = |x|^2 - 2 (x t - |t|^2 / 2): one matrix product, twice as fast as torch.cdist here.
    closest = [torch.addmm(half_norms, part, training.T, beta=-1).amax(1) for part in images.split(500)]
    return (images.square().sum(1) - 2 * torch.cat(closest)).clamp(min=0).sqrt().mean().item()


def measure(images: Tensor, labels: Tensor, judge: Classifier, reference: dict[str, Tensor]) -> dict[str, float]:
    """The table's figures for uint8 images (N, C, H, W) and the labels (N,) asked for."""
    x = normalize(images)
    features, logits = judge.read(x)
    test_features = reference["features"]
    return {
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        "FD": frechet_distance(features, test_features),
        "IS": inception_score(logits),
        "precision": share_within(features, test_features, reference["radii"]),
        "recall": share_within(test_features, features, kth_neighbour(features)),
        "nearest": nearest_distance(x.flatten(1), reference["training"]),
    }


def timed_draw(model: DiT, config: Config, y: Tensor, seed: int) -> tuple[Tensor, float]:
    """Images (N, C, H, W) uint8 for the labels y (N,), and how many were drawn a second."""
    start = time.perf_counter()
    images = denormalize(draw_images(model, config, y, torch.Generator(y.device).manual_seed(seed))).cpu()
    return images, len(y) / (time.perf_counter() - start)


def read_npz(path: str) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) of an .npz as inference.py writes it; UserError if it is none."""
    try:
        arrays = np.load(path)  # never unpickles: allow_pickle is False
        images, labels = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["arr_1"])
    except Exception as error:
        raise UserError(f"{path} is not an .npz of images (arr_0) and labels (arr_1): {error!r}") from error
    if images.dtype != torch.uint8 or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: arr_0 is {images.dtype}, arr_1 {labels.dtype} {tuple(labels.shape)}; "
            f"they must be uint8 (N, H, W, C) and int64 (N,)"
        )
    return images, labels


def crop(images: Tensor, size: int) -> Tensor:
    """The middle of images (N, C, H, W): without the margin that load_dataset adds for a larger image_size."""
    start = (images.shape[-1] - size) // 2
    return images[:, :, start : start + size, start : start + size]


def check_fit(shape: tuple, labels: Tensor, data: Dataset) -> None:
    """Refuse images of a shape (C, H, W), or labels (N,), that cannot be some of data's."""
    channels, size, classes = *data.images.shape[1:3], int(data.labels.max()) + 1
    if shape[0] != channels or shape[1] != shape[2] or shape[1] < size:
        raise UserError(f"images of {shape} do not compare with {data.name}'s {(channels, size, size)}; name --dataset")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"labels {labels.min()} to {labels.max()} are not all of {data.name}'s, 0 to {classes - 1}")


def check_model(model: DiT, data: Dataset, path: str) -> None:
    """Refuse a model of other images or other classes than data's."""
    check_fit((model.in_channels, model.image_size, model.image_size), data.labels, data)
    if model.num_classes != int(data.labels.max()) + 1:
        raise UserError(f"{path} draws {model.num_classes} classes, not {data.name}'s; name its --dataset")


def refuse_others(given: dict, flag: str) -> None:
    """Refuse the flags that are left: the one named makes them useless."""
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{flags} would change nothing with {flag}; leave it out")


def report_bits(given: dict, data_dir: Path) -> dict:
    """The bound's mean over the first given["bits_per_dim"] test images, and its standard error."""
    count, checkpoint = given.pop("bits_per_dim"), given.pop("checkpoint", ROOT / "model.pth")
    device = choose_device(given.pop("device", "auto"))
    model, config = load_model(checkpoint, device)
    name, seed = given.pop("dataset", config.dataset), given.pop("seed", config.seed)
    refuse_others(given, "--bits-per-dim")
    process = build_process(config)
    if not isinstance(process, Diffusion):
        raise UserError(f"--bits-per-dim is a bound of diffusions; {checkpoint} is a model of {config.process}")
    test = load_dataset(name, data_dir, train=False, image_size=model.image_size)
    check_model(model, test, checkpoint)
    check_limits("bits_per_dim", count, most=len(test.labels))  # as many as there are test images
    generator = torch.Generator(device).manual_seed(seed)
    bits = []
    for images, y in zip(test.images[:count].split(500), test.labels[:count].split(500)):
        bits.append(bits_per_dim(process, model, normalize(images.to(device)), y.to(device), generator))
    # A padded image's bits are all its own: the margin is no data, so the dimensions are those of the data alone.
    bits = torch.cat(bits) * model.image_size**2 / math.prod(test.size)
    mean, error = bits.mean().item(), bits.std().item() / count**0.5
    print(f"at most {mean:.4f} +- {error:.4f} bits per dimension, for {count} test images of {test.name}")
    return {"images": count, "dataset": test.name, "bits_per_dim": mean, "standard_error": error}


def print_table(report: dict) -> None:
    """The figures of all seeds beside those of real digits."""
    print(f"\n{report['images']} images of {report['dataset']}, {report['settings']}\n")
    print(f"{'':12}{'generated':>12}{'+-':>10}{'real':>12}")
    for name, real in report["real"].items():
        values = [figures[name] for figures in report["generated"]]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name:12}{statistics.mean(values):12.4f}{spread:>10}{real:12.4f}")
    print(f"{'FD ratio':12}{report['FD ratio']:12.2f}")


def write_json(report: dict, path: str | None) -> None:
    """Write the figures to a file, if one is wanted."""
    if path:
        with writing(path) as file:
            file.write(json.dumps(report, indent=1).encode())


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Measure a model's digits, or an .npz of them, beside real ones.")
    basics = parser.group("basics")
    basics.add_argument("--checkpoint", metavar="FILE", help="weights (default: the repository's model.pth)")
    basics.add_argument("--npz", metavar="FILE", help="measure these images instead of drawing some")
    parser.add_number(
        "--num-samples",
        "images to draw, and real ones beside them (default: 10000)",
        "basics",
        least=100,
        most=HELD_OUT,
    )
    parser.add_number("--seeds", "draw so many times, from so many seeds (default: 1)", "basics", most=1000)
    parser.add_number("--bits-per-dim", "instead, the variational bound for so many test images", "basics", least=2)
    basics.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_fields("dataset", default="the checkpoint's, or mnist for an .npz")
    parser.add_fields("data_dir")
    parser.add_fields(*SAMPLING, "seed", default="the checkpoint's", title="sampling")
    parser.add_fields("device", title="machine")
    given = vars(parser.parse_args(argv))
    json_path, data_dir = given.pop("json", None), Config(data_dir=given.pop("data_dir", None)).data_folder
    if json_path:
        check_path("--json", json_path, ".json")
    if "bits_per_dim" in given:
        write_json(report_bits(given, data_dir), json_path)
        return
    npz = given.pop("npz", None)
    if npz:
        name = given.pop("dataset", "mnist")
        refuse_others(given, "the images of --npz")
        images, labels = read_npz(npz)
        num_samples = len(images)
    else:
        checkpoint, num_samples = given.pop("checkpoint", ROOT / "model.pth"), given.pop("num_samples", HELD_OUT)
        seeds, device = given.pop("seeds", 1), choose_device(given.pop("device", "auto"))
        model, config = load_model(checkpoint, device)
        config = config.replace(**given)
        name = config.dataset
    check_limits("num_samples", num_samples, least=100, most=HELD_OUT)  # as many as there are unseen real images

    train, test = (load_dataset(name, data_dir, train=part) for part in (True, False))
    if npz:
        check_fit(tuple(images.shape[1:]), labels, train)
    else:
        check_model(model, train, checkpoint)
    if len(test.labels) < num_samples:
        raise UserError(f"{num_samples} samples: {train.name} has {len(test.labels)} test images; give at most as many")
    size = train.images.shape[-1]
    judge = judge_of(train.name, data_dir, train.images, train.labels)
    features, _ = judge.read(normalize(test.images))
    training = normalize(train.images[:-HELD_OUT]).flatten(1)
    reference = {"features": features, "radii": kth_neighbour(features), "training": training}
    unseen = slice(-HELD_OUT, num_samples - HELD_OUT or None)
    real = measure(train.images[unseen], train.labels[unseen], judge, reference)

    report = {"images": num_samples, "dataset": train.name, "real": real, "generated": []}
    if npz:
        report["settings"] = f"from {npz}"
        report["generated"].append(measure(crop(images, size), labels, judge, reference))
    else:
        y, speeds = test.labels[:num_samples], []  # in the test set's proportions
        for seed in range(config.seed, config.seed + seeds):
            images, speed = timed_draw(model, config, y.to(device), seed)
            speeds.append(speed)
            report["generated"].append(measure(crop(images, size), y, judge, reference))
        report |= {name: getattr(config, name) for name in SAMPLING}
        report |= {"evaluations": network_evaluations(config), "images_per_second": statistics.mean(speeds)}
        speed = f"{report['images_per_second']:.0f} images/s on {device}"
        report["settings"] = f"{describe_sampling(config)} an image, {speed}, {seeds} seed(s)"
    report["FD ratio"] = statistics.mean(figures["FD"] for figures in report["generated"]) / real["FD"]
    print_table(report)
    write_json(report, json_path)


if __name__ == "__main__":
    run_script(main)
