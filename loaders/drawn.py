"""Data that are drawn rather than read: kept in a file, with a key of all that they follow from."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from support.errors import DamagedFile, UserError, believing
from support.files import load_file, save_file, warn


def kept(
    path: Path, what: str, key: Callable[[], str], shape: tuple[int, ...], draw: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) and labels (N, *shape) from a file, or as `draw` gives them, which are then kept there.

    Args:
        what: what they are called, in the plural.
        key: tells a key; for another one than the file's they are drawn anew.

    Raises:
        UserError: if the file is damaged, or cannot be read.
    """
    if path.exists():
        try:
            content = load_file(path)
        except DamagedFile as error:
            raise UserError(f"{error}; delete it to have the {what} drawn anew") from error
        with believing(f"{path} holds no {what}; delete it to have them drawn anew"):
            images, labels, *origin = content
            images, labels = images.view(-1, 1, 28, 28), labels.view(len(images), *shape)
        if origin in ([], [key()]):  # earlier versions, which drew the same glyphs, did not keep it
            return images, labels
        warn(f"the {what} of {path} were drawn by another version, so they are drawn anew")
    images, labels = draw()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file([images, labels, key()], path)
    except (OSError, UserError) as error:
        warn(f"the {what} are drawn anew each time: {error}")
    return images, labels
