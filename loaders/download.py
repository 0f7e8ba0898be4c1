"""Downloading into the data folder, all or nothing, without waiting long for a network that is not there; MD5."""

import contextlib
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path

from support.errors import NotAvailable, UserError


@contextlib.contextmanager
def downloading(name: str, folder: Path, addresses: Iterable[str], timeout: float = 10.0) -> Iterator[Path]:
    """An empty folder inside `folder` to download into; it goes with all that is not moved out of it at the end.

    Args:
        name: what is downloaded, for the messages.
        addresses: of which one must answer, within `timeout` seconds together; a file of each server's.

    Raises:
        NotAvailable: if no server answers, or the download fails.
    """
    addresses, reached = list(addresses), threading.Event()

    def try_servers() -> None:
        for address in addresses:
            try:
                urllib.request.urlopen(address, timeout=timeout / len(addresses)).close()
                return reached.set()
            except Exception:  # no answer, or one that is not of this server
                continue

    # A thread, because a name server that does not answer heeds no timeout.
    prober = threading.Thread(target=try_servers, daemon=True)
    prober.start()
    prober.join(timeout)
    if not reached.is_set():
        servers = "servers" if len(addresses) > 1 else "server"
        raise NotAvailable(
            f"{name} is not in {folder} and its {servers} cannot be reached; "
            "connect to the internet, name its folder with --data-dir, or train on --dataset glyphs"
        )
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            yield Path(temporary)
    except (RuntimeError, OSError, HTTPException) as error:  # the first is torchvision's
        raise NotAvailable(
            f"{name} cannot be downloaded ({reason(error)}); try again, or train on --dataset glyphs"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def reason(error: Exception) -> str:
    """What went wrong, in a line: torchvision's messages have several."""
    return " ".join(str(error).split()) or type(error).__name__


def check_md5(path: Path, md5: str, name: str) -> None:
    """UserError if a file is not the original of the data set called `name`."""
    from torchvision.datasets.utils import calculate_md5

    if calculate_md5(path) != md5:
        raise UserError(f"{path} is damaged, or not {name} (its MD5 is not {md5}); move it away")
