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
from support.errors import UserError, check_limits, flag_of, is_memory_error
from support.files import check_path, save_json, warn
from support.machine import choose_device
from support.published import PUBLISHED
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


def measure(images: Tensor, labels: Tensor | None, judge: Classifier, reference: dict[str, Tensor]) -> dict[str, float]:
    """The table's figures for uint8 images (N, C, H, W) and the labels (N,) asked for; no accuracy without labels."""
    x = normalize(images)
    features, logits = judge.read(x)
    test_features = reference["features"]
    accuracy = {} if labels is None else {"accuracy": (logits.argmax(1) == labels).float().mean().item()}
    return accuracy | {
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


def read_npz(path: str) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) uint8 and labels (N,) int64, or None, of an .npz as inference.py and the ADM suite write it.

    arr_0 is uint8 (N, H, W, C), or (N, H, W) where all is grey; arr_1, which may be missing, whole numbers of any type.

    Raises:
        UserError: for any other file.
    """
    try:
        with np.load(path) as arrays:  # never unpickles: allow_pickle is False
            images, labels = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays else None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # random bytes can fail in any way inside the reader
        if is_memory_error(error):
            raise
        raise UserError(f"{path} is not an .npz of images (arr_0) and labels (arr_1): {error!r}") from error
    whole = labels is None or (labels.dtype.kind in "iu" and labels.shape == images.shape[:1])
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not whole:
        found = f"arr_0 is {images.dtype} {images.shape}" + (
            "" if labels is None else f", arr_1 {labels.dtype} {labels.shape}"
        )
        raise UserError(f"{path}: {found}; they must be uint8 (N, H, W, C) or (N, H, W), and whole numbers (N,)")
    images = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def load_both(name: str, data_dir: Path, image_size: int | None = None) -> tuple[Dataset, Dataset]:
    """The training and the test part of a dataset; UserError where the second is not of the first's kind."""
    train = load_dataset(name, data_dir, image_size=image_size)
    test = load_dataset(train.name, data_dir, train=False, image_size=image_size)
    kinds = [f"{len(part.images[0])} channels of {part.size[0]} x {part.size[1]}" for part in (train, test)]
    if kinds[0] != kinds[1] or test.labels.max() > train.labels.max():
        labels = [f"labels up to {part.labels.max()}" for part in (train, test)]
        raise UserError(f"dataset {name}: to train {kinds[0]}, {labels[0]}; to test {kinds[1]}, {labels[1]}")
    return train, test


def crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of images (N, C, H, W), of the data's size: without the margin that load_dataset adds."""
    top, left = ((whole - part) // 2 for whole, part in zip(images.shape[2:], size))
    return images[:, :, top : top + size[0], left : left + size[1]]


def check_fit(shape: tuple[int, int, int], labels: Tensor | None, data: Dataset) -> None:
    """Refuse images of a shape (C, H, W), or labels (N,), that cannot be some of data's."""
    channels, classes = data.images.shape[1], data.num_classes
    padded = shape[1] == shape[2] >= max(data.size)
    if shape[0] != channels or not (padded or shape[1:] == data.size):
        what = "images of {1} x {2} pixels and {0} channels do not compare with".format(*shape)
        raise UserError(f"{what} {data.name}'s, of {data.size[0]} x {data.size[1]} and {channels}; name --dataset")
    if labels is not None and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"labels {labels.min()} to {labels.max()} are not all of {data.name}'s, 0 to {classes - 1}")


def check_model(model: DiT, data: Dataset, path: str) -> None:
    """Refuse a model of other images or other classes than data's."""
    check_fit((model.in_channels, model.image_size, model.image_size), None, data)
    if model.num_classes != data.num_classes:
        found = f"{path} draws {model.num_classes} classes"
        raise UserError(f"{found}, not {data.name}'s {data.num_classes}; name its --dataset")


def refuse_others(given: dict, flag: str) -> None:
    """Refuse the flags that are left: the one named makes them useless."""
    if given:
        flags = ", ".join(map(flag_of, given))
        raise UserError(f"{flags} would change nothing with {flag}; leave it out")


def report_bits(given: dict, data_dir: Path) -> dict:
    """The bound's mean over the first given["bits_per_dim"] test images, and its standard error."""
    count, checkpoint = given.pop("bits_per_dim"), given.pop("checkpoint", ROOT / "model.pth")
    device = choose_device(given.pop("device", "auto"))
    model, config = load_model(checkpoint, device, given.pop("published", None))
    name, seed = given.pop("dataset", config.dataset), given.pop("seed", config.seed)
    refuse_others(given, "--bits-per-dim")
    process = build_process(config)
    if not isinstance(process, Diffusion):
        raise UserError(f"--bits-per-dim is a bound of diffusions; {checkpoint} is a model of {config.process}")
    train, test = load_both(name, data_dir, model.image_size)
    check_model(model, train, checkpoint)
    check_limits("bits_per_dim", count, most=len(test.labels))  # as many as there are test images
    generator = torch.Generator(device).manual_seed(seed)
    bits = []
    for images, y in zip(test.images[:count].split(500), test.labels[:count].split(500)):
        bits.append(bits_per_dim(process, model, normalize(images.to(device)), y.to(device), generator))
    # The margin of a padded image takes bits too, but is no data: all bits are shared out among the data's own pixels.
    bits = torch.cat(bits) * model.image_size**2 / math.prod(test.size)
    if not bits.isfinite().all():
        raise UserError(f"the bound of {checkpoint} is not a finite number; its weights are damaged or have diverged")
    mean, error = bits.mean().item(), bits.std().item() / count**0.5
    print(f"at most {mean:.4f} +- {error:.4f} bits per dimension, for {count} test images of {test.name}")
    return {"images": count, "dataset": test.name, "bits_per_dim": mean, "standard_error": error}


def print_table(report: dict) -> None:
    """The figures of all seeds beside those of real digits."""
    print(f"\n{report['images']} images of {report['dataset']}, {report['settings']}\n")
    print(f"{'':12}{'generated':>12}{'+-':>10}{'real':>12}")
    for name, real in report["real"].items():
        values = [figures[name] for figures in report["generated"] if name in figures]
        mean = f"{statistics.mean(values):.4f}" if values else "?"
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name:12}{mean:>12}{spread:>10}{real:12.4f}")
    print(f"{'FD ratio':12}{report['FD ratio']:12.2f}")


def write_json(report: dict, path: str | None) -> None:
    """Write the figures to a file, if one is wanted."""
    if path:
        save_json(report, path)


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
    parser.group("network").add_argument("--published", choices=PUBLISHED, help="whose weights, if a file cannot tell")
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
        if labels is None:
            warn(f"{npz} has no labels (arr_1), so that the accuracy cannot be told")
    else:
        checkpoint, num_samples = given.pop("checkpoint", ROOT / "model.pth"), given.pop("num_samples", HELD_OUT)
        seeds, device = given.pop("seeds", 1), choose_device(given.pop("device", "auto"))
        model, config = load_model(checkpoint, device, given.pop("published", None))
        config = config.replace(**given)
        name = config.dataset
        check_limits("seed + seeds", config.seed + seeds, most=2**32)  # as Config limits a seed
    what = f"the number of images in {npz}" if npz else "num_samples"
    check_limits(what, num_samples, least=100, most=HELD_OUT)  # as many as there are unseen real images

    train, test = load_both(name, data_dir)
    if npz:
        check_fit(tuple(images.shape[1:]), labels, train)
    else:
        check_model(model, train, checkpoint)
    if len(test.labels) < num_samples:
        raise UserError(f"{num_samples} samples: {train.name} has {len(test.labels)} test images; give at most as many")
    train_images = crop(train.images, train.size)
    judge = judge_of(train.name, data_dir, train_images, train.labels)
    features, _ = judge.read(normalize(crop(test.images, train.size)))
    training = normalize(train_images[:-HELD_OUT]).flatten(1)
    reference = {"features": features, "radii": kth_neighbour(features), "training": training}
    unseen = slice(-HELD_OUT, num_samples - HELD_OUT or None)
    real = measure(train_images[unseen], train.labels[unseen], judge, reference)

    report = {"images": num_samples, "dataset": train.name, "real": real, "generated": []}
    if npz:
        report["settings"] = f"from {npz}"
        report["generated"].append(measure(crop(images, train.size), labels, judge, reference))
    else:
        y, speeds = test.labels[:num_samples], []  # in the test set's proportions
        for seed in range(config.seed, config.seed + seeds):
            images, speed = timed_draw(model, config, y.to(device), seed)
            speeds.append(speed)
            report["generated"].append(measure(crop(images, train.size), y, judge, reference))
        report |= {name: getattr(config, name) for name in SAMPLING}
        report |= {"evaluations": network_evaluations(config), "images_per_second": statistics.mean(speeds)}
        speed = f"{report['images_per_second']:.0f} images/s on {device}"
        report["settings"] = f"{describe_sampling(config)} an image, {speed}, {seeds} seed(s)"
    # At least the FD's own rounding: real images that are the same few over and over are at no distance.
    report["FD ratio"] = statistics.mean(figures["FD"] for figures in report["generated"]) / max(real["FD"], 1e-6)
    print_table(report)
    write_json(report, json_path)


if __name__ == "__main__":
    run_script(main)
