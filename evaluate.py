"""How good are the images? `python evaluate.py` prints a table for a checkpoint or an .npz, beside real images.

Every figure compares a set of images with as many test images, by a classifier that has seen neither: the judge
(support/classifier.py). It is a good one where it reads real images right, which the table says.

    accuracy         share of images that it reads as the label asked for
    FD               Frechet distance between Gaussians fitted to its features (Heusel et al., 2017, eq. 6)
    IS               Inception Score over its classes (Salimans et al., 2016): sharp and various, 1 to their number
    precision        share of the images that lie among the test images; recall, the other way round
                     (Kynkaanniemi et al., 2019: among = within the distance to some image's third neighbour)
    nearest          mean Euclidean distance to the nearest of the training images that the judge learned from, at most
                     50,000, pixels in [-1, 1]; memorised images would be near

The "real" column is the same for as many training images that the judge has not seen (of MNIST, among the last 10,000):
what a perfect model would get. All three sets are equally large, because FD falls with the number of images. Images of
more than 64 pixels a side are reduced to that. Without classes there is no accuracy and no IS; with fewer than 50 test
images only the nearest distance is told.

Of scenes it counts, instead, how many obey their captions: the test part's, in turn, whose images are the real column
(support/scene_judge.py). Seen are pairs of digits that are in the training part too.

With --fid it prints, instead, the figure of papers: Frechet distance to all training images, by an Inception network.
With --bits-per-dim N it prints, instead, how well a diffusion predicts N test images: its variational bound.
"""

from support.start import start_quietly

if __name__ == "__main__":
    start_quietly()  # before all else is imported

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import ROOT, SAMPLING, Config
from dataset import DATASETS, Dataset, denormalize, load_dataset, normalize
from dit import DiT
from inference import draw_images
from loaders.scenes import scenes_of
from support.autoencoder import decode, load_vae
from support.checkpoint import build_process, load_model
from support.classifier import HELD_OUT, Classifier, judge_of, mixed_order, quarter_turns, split_training
from support.command_line import Parser, run_script, shown
from support.errors import UserError, check_limits, flag_of, is_memory_error
from support.files import check_path, save_json, warn
from support.machine import choose_device
from support.metrics import (
    frechet_distance,
    inception_distance,
    inception_score,
    kth_neighbour,
    nearest_distance,
    share_within,
    update_distance,
)
from support.published import PUBLISHED
from support.sampling import describe_sampling, network_evaluations
from support.scene_judge import obedience, scene_judge_of
from variants.learned_variance import bits_per_dim

LEAST = 50  # images to compare: with fewer, distances between features say nothing


class Reference(NamedTuple):
    """What images are measured against; without a judge, the training images alone."""

    training: Tensor  # (N, C, H, W) uint8, perhaps on disk
    learnt: Tensor  # the indices of those that count
    judge: Classifier | None = None
    features: Tensor | None = None  # of the test images (M, 128)
    radii: Tensor | None = None  # of the balls around these (M,)
    labelled: bool = True  # whether the judge reads classes, not quarter turns


def measure(images: Tensor, labels: Tensor | None, reference: Reference) -> dict[str, float]:
    """The table's figures for uint8 images (N, C, H, W) and the labels (N,) asked for; no accuracy without labels."""
    nearest = {"nearest": nearest_distance(images, reference.training, reference.learnt)}
    if reference.judge is None:
        return nearest
    features, logits = reference.judge.read(images)
    figures = {"FD": frechet_distance(features, reference.features)}
    if reference.labelled:
        accuracy = {} if labels is None else {"accuracy": (logits.argmax(1) == labels).float().mean().item()}
        figures = accuracy | figures | {"IS": inception_score(logits)}
    return figures | {
        "precision": share_within(features, reference.features, reference.radii),
        "recall": share_within(reference.features, features, kth_neighbour(features)),
        **nearest,
    }


class Scale(NamedTuple):
    """A way to measure: a function of images (N, C, H, W) uint8 and labels (N,), its figures of real images, words."""

    measure: Callable[[Tensor, Tensor | None], dict[str, float]]
    real: dict[str, float]
    compared: str


def most_compared(train: Dataset, test: Dataset) -> int:
    """As many images as can be compared with unseen real ones of both kinds, held out and test images."""
    return min(len(split_training(train.labels)[1]), len(test.labels), HELD_OUT)


def scale_by_pixels(train: Dataset, test: Dataset) -> Scale:
    """The nearest distance alone, where there are too few images for a judge."""
    learnt, held_out = split_training(train.labels)
    reference = Reference(crop(train.images, train.size), learnt)
    there = f"{len(train.labels)} training and {len(test.labels)} test images"
    return Scale(
        lambda images, labels: measure(images, labels, reference),
        measure(reference.training[held_out], None, reference),
        f"{train.name} has {there}: too few for a judge, and so for accuracy, FD, IS, precision and recall.\n"
        f"Told is how near they are to {len(learnt)} training images; the real ones are {len(held_out)} others",
    )


def scale_by_judge(train: Dataset, test: Dataset, count: int, data_dir: Path) -> Scale:
    """The table's figures by the dataset's own judge, for `count` images."""
    learnt, held_out = split_training(train.labels)
    training, labels, unseen = crop(train.images, train.size), train.labels, held_out[:count]
    judge = judge_of(train.name, data_dir, training, labels)
    features, _ = judge.read(crop(test.images, test.size)[mixed_order(test.labels)[:count]])
    labelled = train.num_classes > 1
    reference = Reference(training, learnt, judge, features, kth_neighbour(features), labelled)
    real = measure(training[unseen], labels[unseen], reference)
    if labelled:
        told = f"reads {real['accuracy']:.1%} of {count} real images right"
        right, doubtful, missing = real["accuracy"], "accuracy means", ""
    else:
        turned, turns = quarter_turns(training[unseen], torch.Generator().manual_seed(0))
        right = (judge.read(turned)[1].argmax(1) == turns).float().mean().item()
        told = f"tells of {right:.1%} of {count} real images by how many quarters they were turned"
        doubtful, missing = "its features mean", "\nThere is one class, and so no accuracy and no IS"
    if right < 0.8:
        warn(f"the judge {told}: with less than 80% {doubtful} little")
    compared = f"compared with {count} test images, by a judge that {told}{missing}"
    return Scale(lambda images, labels: measure(images, labels, reference), real, compared)


def scale_by_captions(train: Dataset, test: Dataset, count: int, data_dir: Path) -> Scale:
    """The shares of scenes that obey their captions; of real ones, of the first `count` test scenes."""
    judge = scene_judge_of(data_dir, crop(train.images, train.size), train.labels)

    def measure_scenes(images: Tensor, captions: Tensor) -> dict[str, float]:
        return obedience(scenes_of(captions), judge.read(images))

    unseen = mixed_order(test.labels)[:count]
    real = measure_scenes(crop(test.images, test.size)[unseen], test.labels[unseen])
    told = f"sees both digits and their relation in {real['digits and relation, seen']:.1%} of {count} test scenes"
    if real["digits and relation, seen"] < 0.8:
        warn(f"the judge {told}: with less than 80% its figures mean little")
    return Scale(measure_scenes, real, f"judged by what is to be seen in them; the judge {told}")


def scale_by_inception(train: Dataset, test: Dataset, count: int, weights: str | None, device: torch.device) -> Scale:
    """FID between all training images and others; for the real column `count` test images, or all of them."""
    fid = inception_distance(weights, device if device.type == "cuda" else torch.device("cpu"))  # mps lacks float64
    if count < fid.real_features_sum.numel():
        warn(f"FID of {count} images is larger than that of more; compare it with figures of as many images alone")
    update_distance(fid, crop(train.images, train.size), True, "training images")

    def measure_fid(images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        fid.reset()  # of the training images it keeps what it saw
        update_distance(fid, images, False, "images")
        return {"FID": fid.compute().item()}

    real = crop(test.images, test.size)[mixed_order(test.labels)[:count]]
    numbers = f"compared with all {len(train.labels)} training images; the real ones are {len(real)} test images"
    return Scale(measure_fid, measure_fid(real), numbers)


def timed_draw(model: DiT, config: Config, y: Tensor, seed: int, vae: nn.Module | None = None) -> tuple[Tensor, float]:
    """Images (N, C, H, W) uint8 for the labels y (N,), decoded by a VAE if there is one, and how many a second."""
    start = time.perf_counter()
    drawn = draw_images(model, config, y, torch.Generator(y.device).manual_seed(seed))
    images = torch.cat([denormalize(decode(vae, part)).cpu() for part in drawn.split(100)])
    return images, len(y) / (time.perf_counter() - start)


def read_npz(path: str) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) uint8 and labels (N,) int64, or None, of an .npz as inference.py and the ADM suite write it.

    arr_0 is uint8 (N, H, W, C), or (N, H, W) where all is grey; arr_1, which may be missing, whole numbers of any type,
    labels (N,) or captions (N, L).

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
    whole = labels is None or (labels.dtype.kind in "iu" and labels.shape[:1] == images.shape[:1] and labels.ndim <= 2)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not whole:
        found = f"arr_0 is {images.dtype} {images.shape}" + (
            "" if labels is None else f", arr_1 {labels.dtype} {labels.shape}"
        )
        wanted = "uint8 (N, H, W, C) or (N, H, W), and whole numbers (N,), or (N, L) of captions"
        raise UserError(f"{path}: {found}; they must be {wanted}")
    images = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def load_both(name: str, data_dir: Path, image_size: int | None, skip_damaged: bool) -> tuple[Dataset, Dataset]:
    """The training and the test part of a dataset; UserError where the second is not of the first's kind.

    Args:
        image_size: to pad images to, or to bring them to where they are image files.
    """
    options = dict(image_size=image_size, skip_damaged=skip_damaged)
    train = load_dataset(name, data_dir, **options)
    test = load_dataset(train.name, data_dir, train=False, **options)
    kinds = [f"{len(part.images[0])} channels of {part.size[0]} x {part.size[1]}" for part in (train, test)]
    if kinds[0] != kinds[1] or test.labels.max() > train.labels.max():
        labels = [f"labels up to {part.labels.max()}" for part in (train, test)]
        raise UserError(f"dataset {name}: to train {kinds[0]}, {labels[0]}; to test {kinds[1]}, {labels[1]}")
    return train, test


def crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of images (N, C, H, W), of the data's size: without the margin that load_dataset adds."""
    top, left = ((whole - part) // 2 for whole, part in zip(images.shape[2:], size))
    return images[:, :, top : top + size[0], left : left + size[1]]


def check_kind(caption_length: int | None, data: Dataset, what: str) -> None:
    """Refuse labels where data has captions, captions where it has labels, and those of another length."""
    kinds = ["labels" if n is None else f"captions of {n} words" for n in (caption_length, data.caption_length)]
    if caption_length != data.caption_length:
        raise UserError(f"{what} {kinds[0]}, and {data.name} has {kinds[1]}; name its --dataset")


def check_fit(shape: tuple[int, int, int], labels: Tensor | None, data: Dataset) -> None:
    """Refuse images of a shape (C, H, W), or labels (N,) or captions (N, L), that cannot be some of data's."""
    channels = data.images.shape[1]
    padded = shape[1] == shape[2] >= max(data.size)
    if shape[0] != channels or not (padded or shape[1:] == data.size):
        what = "images of {1} x {2} pixels and {0} channels do not compare with".format(*shape)
        raise UserError(f"{what} {data.name}'s, of {data.size[0]} x {data.size[1]} and {channels}; name --dataset")
    if labels is not None:
        check_kind(labels.shape[1] if labels.ndim == 2 else None, data, "arr_1 has")
    most = data.num_classes - (0 if data.caption_length else 1)  # the empty caption, too, is one that can be drawn
    if labels is not None and not 0 <= labels.min() <= labels.max() <= most:
        raise UserError(f"labels {labels.min()} to {labels.max()} are not all of {data.name}'s, 0 to {most}")


def check_scenes(captions: Tensor | None, path: str) -> None:
    """Refuse images of no captions, or of captions of no scene, before the minutes that their judge may take."""
    if captions is None:
        raise UserError(f"{path} has no captions (arr_1); without them it cannot be told whether scenes obey")
    scenes_of(captions)


def check_model(config: Config, shape: tuple[int, int, int], data: Dataset, path: str) -> None:
    """Refuse a model that draws other images than data's, of a shape (C, H, W), or other classes."""
    check_fit(shape, None, data)
    check_kind(config.caption_length, data, f"{path} draws")
    if config.num_classes != data.num_classes:
        found = f"{path} draws {config.num_classes} classes"
        raise UserError(f"{found}, not {data.name}'s {data.num_classes}; name its --dataset")


def shape_drawn(model: DiT, vae: nn.Module | None, device: torch.device) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model draws, through its VAE if it has one."""
    return tuple(
        decode(vae, torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=device))[0].shape
    )


def comparable(images: Tensor, data: Dataset) -> Tensor:
    """Drawn images (N, C, H, W) uint8 as data's are: without margin, and grey where a VAE made colours of grey."""
    images = crop(images, data.size)
    if images.shape[1] == 3 and data.images.shape[1] == 1:
        return images.float().mean(1, keepdim=True).round().to(torch.uint8)
    return images


def check_number(count: int | None, train: Dataset, test: Dataset, fid: bool) -> int:
    """How many images to measure, where none are asked for or given as many as can be compared; UserError for others.

    Where so few are there that nothing but the nearest distance is told, any number will do.
    """
    if len(train.labels) < 2 or (fid and len(test.labels) < 2):
        which = "training" if len(train.labels) < 2 else "test"
        raise UserError(f"{train.name} has one {which} image; there is nothing to compare with")
    most = len(test.labels) if fid else most_compared(train, test)
    few = most < LEAST and not fid
    count = count or min(max(most, LEAST), HELD_OUT)
    check_limits("the number of images", count, least=1 if few else LEAST, most=10**7 if fid else HELD_OUT)
    if count > most and not few and not fid:
        there = f"{train.name} has {len(test.labels)} test images and {len(split_training(train.labels)[1])} held out"
        raise UserError(f"{count} images: {there} to compare them with; give at most {most}")
    return count


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
    skip_damaged = given.pop("skip_damaged", config.skip_damaged)
    refuse_others(given, "--bits-per-dim")
    process = build_process(config)
    if config.process != "diffusion":
        raise UserError(f"--bits-per-dim is a bound of diffusions; {checkpoint} is a model of {config.process}")
    if config.latents:
        raise UserError(f"--bits-per-dim is a bound for pixels; {checkpoint} is a model of latents")
    train, test = load_both(name, data_dir, model.image_size, skip_damaged)
    check_model(config, (model.in_channels, model.image_size, model.image_size), train, checkpoint)
    check_limits("bits_per_dim", count, most=len(test.labels))  # as many as there are test images
    generator = torch.Generator(device).manual_seed(seed)
    bits = []
    for index in mixed_order(test.labels)[:count].split(500):
        images, y = test.images[index], test.labels[index]
        bits.append(bits_per_dim(process, model, normalize(images.to(device)), y.to(device), generator))
    # The margin of a padded image takes bits too, but is no data: all bits are shared out among the data's own pixels.
    bits = torch.cat(bits) * model.image_size**2 / math.prod(test.size)
    if not bits.isfinite().all():
        raise UserError(f"the bound of {checkpoint} is not a finite number; its weights are damaged or have diverged")
    mean, error = bits.mean().item(), bits.std().item() / count**0.5
    print(f"at most {mean:.4f} +- {error:.4f} bits per dimension, for {count} test images of {test.name}")
    return {"images": count, "dataset": test.name, "bits_per_dim": mean, "standard_error": error}


def print_table(report: dict) -> None:
    """The figures of all seeds beside those of real images."""
    print(f"\n{report['images']} images of {shown(report['dataset'])}, {report['settings']}\n{report['compared']}\n")
    wide = max(12, *map(len, report["real"]))
    print(f"{'':{wide}}{'generated':>12}{'+-':>10}{'real':>12}")
    for name, real in report["real"].items():
        values = [figures[name] for figures in report["generated"] if name in figures]
        mean = f"{statistics.mean(values):.4f}" if values else "?"
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name:{wide}}{mean:>12}{spread:>10}{real:12.4f}")
    if "FD ratio" in report:
        print(f"{'FD ratio':12}{report['FD ratio']:12.2f}")


def write_json(report: dict, path: str | None) -> None:
    """Write the figures to a file, if one is wanted."""
    if path:
        save_json(report, path)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Measure a model's images, or an .npz of them, beside real ones.")
    basics = parser.group("basics")
    basics.add_argument("--checkpoint", metavar="FILE", help="weights (default: the repository's model.pth)")
    basics.add_argument("--npz", metavar="FILE", help="measure these images instead of drawing some")
    parser.add_number(
        "--num-samples",
        f"images to draw, and real ones beside them (default: as many as there are, at most {HELD_OUT})",
        "basics",
        least=LEAST,
    )
    parser.add_number("--seeds", "draw so many times, from so many seeds (default: 1)", "basics", most=1000)
    parser.add_number("--bits-per-dim", "instead, the variational bound for so many test images", "basics", least=2)
    basics.add_argument("--fid", action="store_true", help="instead, the figure of papers, by an Inception network")
    basics.add_argument("--inception", metavar="FILE", help="its weights (default: downloaded)")
    basics.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_fields("dataset", default="the checkpoint's, or mnist for an .npz")
    parser.add_fields("data_dir")
    parser.add_fields("skip_damaged", default="the checkpoint's")
    parser.add_fields(*SAMPLING, "seed", default="the checkpoint's", title="sampling")
    parser.add_fields("device", title="machine")
    parser.group("network").add_argument("--vae", metavar="DIR", help="folder of the autoencoder of a model of latents")
    parser.group("network").add_argument("--published", choices=PUBLISHED, help="whose weights, if a file cannot tell")
    given = vars(parser.parse_args(argv))
    json_path, data_dir = given.pop("json", None), Config(data_dir=given.pop("data_dir", None)).data_folder
    if json_path:
        check_path("--json", json_path, ".json")
    if "bits_per_dim" in given:
        write_json(report_bits(given, data_dir), json_path)
        return
    fid, inception, npz = (given.pop(name, None) for name in ("fid", "inception", "npz"))
    if inception and not fid:
        raise UserError(f"--inception {inception} would change nothing without --fid; leave it out, or add that")
    device = choose_device(given.pop("device", "auto") if fid or not npz else "cpu")
    if npz:
        name, skip_damaged = given.pop("dataset", "mnist"), given.pop("skip_damaged", False)
        refuse_others(given, "the images of --npz")
        images, labels = read_npz(npz)
        shape, num_samples = tuple(images.shape[1:]), len(images)
    else:
        num_samples, checkpoint = given.pop("num_samples", None), given.pop("checkpoint", ROOT / "model.pth")
        if num_samples and not fid:
            check_limits("num_samples", num_samples, most=HELD_OUT)  # there are no more unseen real images
        seeds, folder = given.pop("seeds", 1), given.pop("vae", None)
        model, config = load_model(checkpoint, device, given.pop("published", None))
        vae = load_vae(folder, config, device)
        config = config.replace(**given)
        name, skip_damaged, shape = config.dataset, config.skip_damaged, shape_drawn(model, vae, device)
        check_limits("seed + seeds", config.seed + seeds, most=2**32)  # as Config limits a seed

    # Image files are brought to the size of what is compared with them; arrays have one of their own.
    train, test = load_both(name, data_dir, None if name in DATASETS else max(shape[1:]), skip_damaged)
    if fid and train.images.shape[1] not in (1, 3):
        raise UserError(f"--fid is of grey images or of colour; {train.name}'s have {train.images.shape[1]} channels")
    if npz:
        check_fit(shape, labels, train)
        if train.caption_length and not fid:
            check_scenes(labels, npz)
        elif labels is None and not fid:
            warn(f"{npz} has no labels (arr_1), so that the accuracy cannot be told")
    else:
        grey = vae is not None and train.images.shape[1] == 1  # what a VAE draws has always three channels
        check_model(config, (1, *shape[1:]) if grey else shape, train, checkpoint)
    num_samples = check_number(num_samples, train, test, fid)
    if fid:
        scale, asked = scale_by_inception(train, test, num_samples, inception, device), train.labels
    elif train.labels.ndim == 2:
        scale, asked = scale_by_captions(train, test, num_samples, data_dir), test.labels
    elif most_compared(train, test) < LEAST:
        scale, asked = scale_by_pixels(train, test), test.labels
    else:
        scale, asked = scale_by_judge(train, test, num_samples, data_dir), test.labels

    report = {"images": num_samples, "dataset": train.name, "compared": scale.compared, "real": scale.real}
    if npz:
        report["settings"] = f"from {npz}"
        report["generated"] = [scale.measure(crop(images, train.size), labels)]
    else:
        turns = mixed_order(asked).repeat(math.ceil(num_samples / len(asked)))[:num_samples]
        y, speeds = asked[turns], []
        report["generated"] = []
        for seed in range(config.seed, config.seed + seeds):
            images, speed = timed_draw(model, config, y.to(device), seed, vae)
            speeds.append(speed)
            report["generated"].append(scale.measure(comparable(images, train), y))
        report |= {name: getattr(config, name) for name in SAMPLING}
        report |= {"evaluations": network_evaluations(config), "images_per_second": statistics.mean(speeds)}
        speed = f"{report['images_per_second']:.0f} images/s on {device}"
        report["settings"] = f"{describe_sampling(config)} an image, {speed}, {seeds} seed(s)"
    if "FD" in scale.real:
        # At least the FD's own rounding: real images that are the same few over and over are at no distance.
        mean = statistics.mean(figures["FD"] for figures in report["generated"])
        report["FD ratio"] = mean / max(scale.real["FD"], 1e-6)
    print_table(report)
    write_json(report, json_path)


if __name__ == "__main__":
    run_script(main)
