"""A data set of Hugging Face's `datasets`: by its name on their hub, or a folder of one's own images or parquet files.

Its column of images is found by its type, its labels as well: a ClassLabel, or else whole numbers in a column "label".
Images are taken as the files that they are, so that a damaged one is dealt with where all are.
"""

import hashlib
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from loaders.image_folder import TEST_NAMES, hold_out, open_image
from loaders.packing import Source
from support.errors import NotAvailable, UserError, is_memory_error, optional, reason_of
from support.files import warn


def open_hub(where: str, data_dir: str | Path, train: bool) -> Source:
    """A part of the data set that `hf:NAME` names; what is downloaded goes where Hugging Face's library keeps it.

    Its part "train", or its only one, trains; "test" or "validation", or else a fixed tenth, is held out.

    Raises:
        UserError: if the library is missing, there is no such data set, or it lacks images, or labels are not 0, 1, ...
        NotAvailable: without a network, if the data set is not on disk.
    """
    library = optional("datasets", f"--dataset {where}")
    parts = load_parts(library, where)
    training = "train" if "train" in parts else next(iter(parts))
    if training != "train" and len(parts) > 1:
        raise UserError(f"{where} has the parts {', '.join(parts)}, and none called train; make one of them that")
    images = column_of_images(library, where, parts[training])
    tests = [name for name in TEST_NAMES if name in parts and name != training]
    labels = {name: labels_of(library, where, parts[name]) for name in (training, *tests)}
    there = check_labels(where, labels[training])
    # The test labels of a contest are kept secret: all are -1.
    test = next((name for name in tests if set(labels[name]) <= set(there)), None)
    mine = training if train or not test else test
    rows = list(range(len(labels[mine])))
    if not test:
        groups: dict[Any, list[str]] = {label: [] for label in there}
        for row, label in enumerate(labels[mine]):
            groups[label].append(str(row))
        held_out = hold_out(groups)
        rows = [row for row in rows if (str(row) in held_out) != train]
    if not rows:
        raise UserError(f"{where} has no images in its {'training' if train else 'test'} part; it needs more")
    number = {label: i for i, label in enumerate(there)}
    files = parts[mine].select_columns(images).cast_column(images, library.Image(decode=False))
    key = hashlib.sha256(" ".join(f"{name} {part._fingerprint}" for name, part in parts.items()).encode())

    def open_row(i: int) -> Image.Image:
        file = files[rows[i]][images]
        if file is None:
            raise UserError("there is no image in this row")
        return open_image(io.BytesIO(file["bytes"] or Path(file["path"]).read_bytes()))

    class_names = names_of(library, parts[training], there)
    numbers = [number[labels[mine][row]] for row in rows]
    return Source(where, class_names, numbers, [f"{mine}, row {row}" for row in rows], key.hexdigest(), open_row)


def load_parts(library: ModuleType, where: str) -> dict[str, Any]:
    """The parts of a data set by name, its errors told in a line."""
    library.logging.set_verbosity_error()  # it tells of each attempt to reach the hub
    optional("huggingface_hub", where).utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        library.disable_progress_bars()
    name = where.removeprefix("hf:")
    try:
        return library.load_dataset(name)
    except ConnectionError as error:
        raise NotAvailable(
            f"{where}: there is no folder {name}, and Hugging Face's hub cannot be reached; "
            "connect to the internet, or give hf: with a folder of images or parquet files"
        ) from error
    except Exception as error:  # files of any kind can fail in any way inside the library
        if is_memory_error(error):
            raise
        reason = reason_of(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UserError(
            f"{where} cannot be loaded ({reason}); give a name on Hugging Face's hub, "
            "or a folder of images or parquet files"
        ) from error


def column_of_images(library: ModuleType, where: str, part: Any) -> str:
    """The name of the column of images; the first where there are several, which is told."""
    found = [name for name, kind in part.features.items() if isinstance(kind, library.Image)]
    if not found:
        raise UserError(f"{where} has no column of images, only {', '.join(part.features)}; choose another data set")
    if len(found) > 1:
        warn(f"{where} has several columns of images, {', '.join(found)}; the first is taken")
    return found[0]


def column_of_labels(library: ModuleType, part: Any) -> str | None:
    """The name of the column of labels; None where there is none."""
    found = [name for name, kind in part.features.items() if isinstance(kind, library.ClassLabel)]
    return found[0] if found else "label" if "label" in part.features else None


def labels_of(library: ModuleType, where: str, part: Any) -> list[int]:
    """The label of each row; all are 0 where there are none."""
    column = column_of_labels(library, part)
    if column is None:
        return [0] * len(part)
    kind = getattr(part.features[column], "dtype", "list")
    if not kind.startswith(("int", "uint")):
        raise UserError(f"{where}: its column {column} is of {kind}; labels must be whole numbers, 0, 1, 2, ...")
    return part.select_columns(column)[:][column]


def check_labels(where: str, labels: list[int]) -> list[int]:
    """The different labels, in order; UserError if one is missing or negative."""
    there = set(labels)
    wrong = [label for label in there if label is None or label < 0]
    if wrong:
        row, label = labels.index(wrong[0]), "missing" if wrong[0] is None else wrong[0]
        raise UserError(f"{where}: the label of row {row} is {label}; labels must be whole numbers, 0, 1, 2, ...")
    return sorted(there)


def names_of(library: ModuleType, part: Any, there: list[int]) -> list[str]:
    """The names of the classes that have images; numbers are names where there are no others."""
    column = column_of_labels(library, part)
    if column is None:
        return []
    kind = part.features[column]
    return [kind.names[i] for i in there] if isinstance(kind, library.ClassLabel) else [str(i) for i in there]
