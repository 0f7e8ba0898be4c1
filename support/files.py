"""The one place where files are opened and believed, and the one where results are written.

Written atomically: under another name, flushed to the disk, then renamed, so that the old file stays or the new one is
whole. Read without trust: `weights_only=True` builds tensors and plain containers and refuses to run code, and a zip's
own checksums are compared with its contents, for a tensor with a flipped bit looks like any other.
"""

import argparse
import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import torch

from support.errors import DamagedFile, UserError, is_memory_error, one_line, optional


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write in, which becomes `path` once it is whole; a link stays one.

    Raises:
        UserError: if it cannot be written (disk full, no permission); what was there before is intact.
    """
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}.tmp"  # not that of another process, which may write the same file
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of what the file said
        if is_memory_error(error):
            raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise unwritable(path, cause) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


@contextlib.contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` once it is whole; an empty one may be there.

    Raises:
        UserError: if it cannot be written (disk full, no permission, something is there); what was there is intact.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rmdir()  # not what somebody has put there meanwhile
        temporary.rename(target)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unwritable(path: str | Path, error: OSError) -> UserError:
    """What to say of a file that could not be written."""
    return UserError(f"cannot write {path} ({error.strerror or error}); free some space or choose another folder")


def save_file(content: Any, path: str | Path) -> None:
    """torch.save, as `writing` writes."""
    with writing(path) as file:
        torch.save(content, file)


def save_json(content: Any, path: str | Path) -> None:
    """JSON, as `writing` writes."""
    with writing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a text file; UserError if it cannot be written."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def check_path(flag: str, path: str, suffix: str) -> None:
    """Refuse a file that could not be written, before the work rather than after it."""
    folder = Path(os.path.realpath(path)).parent  # a link stays one
    if Path(path).suffix != suffix:
        raise UserError(f"{flag} {path}: the file's name must end in {suffix}")
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path}: nothing can be written in its folder; choose another")


def check_new_folder(flag: str, folder: str | Path) -> None:
    """Refuse, before the work, a folder that is to be written and holds something already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise UserError(f"{flag} {folder} {what}; give a new folder, or an empty one")


@contextlib.contextmanager
def locked(folder: Path, waiting: str | None = None) -> Iterator[None]:
    """Keep every other process that asks for the same lock out of a folder; the lock dies with this process.

    What a run that was killed in the middle of a write has left there is cleared away.

    Args:
        waiting: what to say while another process has it, which is then waited for.

    Raises:
        UserError: if another process has it and is not to be waited for.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            warn(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        for scrap in folder.rglob("*.tmp"):
            if re.search(r"\.(pth|csv|png|json)(\.\d+)?\.tmp$", scrap.name):  # as `writing` names them, or did
                scrap.unlink()
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another run; wait for its end, or give another --out-dir") from error
    except OSError:  # a file system without locks: go on without
        pass
    try:
        yield
    finally:
        os.close(descriptor)


class ScalarType:
    """Stands in for numpy.dtype, which trusts what it is unpickled from: a name such as <f8."""

    def __init__(self, name: str, *_: Any):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        self.name = state[1] + self.name  # the order of its bytes


def scalar(kind: ScalarType, data: bytes) -> Any:
    """What a pickled NumPy scalar was, in Python's own types."""
    return np.frombuffer(data, kind.name)[0].item()


# What foreign files hold besides tensors: flags of their training, among which there may be paths and NumPy's numbers.
PLAIN = [
    argparse.Namespace,
    (ScalarType, "numpy.dtype"),
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # of NumPy 1 and 2
    *((PurePath, f"pathlib.{name}Path") for name in ("Posix", "Windows", "_local.Posix", "_local.Windows")),
]


def read_file(path: str | Path, missing: str = "name a file of weights") -> tuple[Any, bool]:
    """What a file of torch's or safetensors' holds, on the CPU, and whether it is as it was written.

    An .index.json of diffusers' stands for all the files that it names. The second is False where a zip's checksums do
    not fit its contents; files without checksums are taken as intact.

    Args:
        missing: what to do where there is no such file.

    Raises:
        DamagedFile: if it is not one of torch's or safetensors', or holds more than plain data.
        UserError: if it cannot be read.
        MemoryError, RuntimeError: if memory is short.
    """
    intact = True
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(kind) else 'no file'}; {missing}")
        with open(path, "rb"):
            pass
        if str(path).endswith(".index.json"):
            return read_shards(Path(path))
        if str(path).endswith(".safetensors"):
            return optional("safetensors.torch", str(path)).load_file(path), True
        intact = checksums_fit(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            warnings.simplefilter("ignore")  # of a foreign file's format: the errors below say it all
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content, intact
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {missing}") from error
    except Exception as error:  # random bytes can fail in any way inside the reader
        if intact and is_trouble(error):  # what is damaged may ask for too much memory as well
            if is_memory_error(error):
                raise
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        found = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise DamagedFile(
                f"{path} holds {found[1]}, more than weights and plain data; "
                f"where it was written, save the weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise DamagedFile(f"{path} is damaged or not a file of weights ({type(error).__name__})") from error


def read_shards(index: Path) -> tuple[dict[str, Any], bool]:
    """What read_file makes of all the files that an .index.json of diffusers' names, as one state dict."""
    names = set(json.loads(index.read_text())["weight_map"].values())
    parts = [read_file(index.with_name(Path(name).name)) for name in sorted(names)]
    return {name: tensor for part, _ in parts for name, tensor in part.items()}, all(intact for _, intact in parts)


def is_trouble(error: Exception) -> bool:
    """Whether memory, permission or the disk is at fault, not what was read: that may say to seek where nothing is."""
    return is_memory_error(error) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))


def checksums_fit(path: str | Path) -> bool:
    """Whether a zip's contents are those that its checksums were made of; True for a file that is no zip."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # how torch tells its older format, which has no checksums
            return True
        try:
            archive = zipfile.ZipFile(file)
            # What is marked as a folder (0x10) torch does not read: the tensor is what was in memory before.
            return archive.testzip() is None and not any(part.external_attr & 0x10 for part in archive.infolist())
        except Exception as error:  # damage shows in many ways
            if is_trouble(error):
                raise
            return False


def load_file(path: str | Path, missing: str = "name a file of weights") -> Any:
    """What save_file wrote; UserError as read_file's, and for a file that has changed since."""
    content, intact = read_file(path, missing)
    if not intact:
        raise DamagedFile(f"{path} is damaged: its checksums do not fit what it holds")
    return content


def warn(message: str) -> None:
    """A line on stderr: something was assumed, or is not as it should be, and the work goes on."""
    print(f"note: {one_line(message)}", file=sys.stderr)
