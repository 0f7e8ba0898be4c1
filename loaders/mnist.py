"""MNIST (LeCun et al., 1998) through torchvision: read, checked, and downloaded where it is not on disk."""

import socket
import tempfile
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

from torch import Tensor

from support.errors import NotAvailable, UserError

MNIST_FILES = {  # MD5 of the uncompressed originals
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_mnist(data_dir: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """The 60,000 training or 10,000 test digits of MNIST (LeCun et al., 1998), downloaded where they are not.

    Raises:
        UserError: if a file is damaged, naming it.
        NotAvailable: if MNIST is neither in data_dir nor to be downloaded.
    """
    from torchvision.datasets import MNIST  # here, for it takes seconds that sampling need not wait
    from torchvision.datasets.utils import calculate_md5

    folder = Path(data_dir) / "MNIST" / "raw"
    for name, md5 in MNIST_FILES.items():
        if (folder / name).exists() and calculate_md5(folder / name) != md5:
            raise UserError(f"{folder / name} is damaged, or not MNIST (its MD5 is not {md5}); move it away")
    if not all((folder / name).exists() for name in MNIST_FILES):
        download_mnist(folder)
    data = MNIST(data_dir, train=train)
    return data.data.unsqueeze(1), data.targets


def download_mnist(folder: Path, timeout: float = 10.0) -> None:
    """Download MNIST's four files into folder, all or none; NotAvailable within `timeout` s without a network."""
    from torchvision.datasets import MNIST

    reached = threading.Event()

    def try_mirrors() -> None:
        for mirror in MNIST.mirrors:
            try:
                urllib.request.urlopen(mirror + MNIST.resources[1][0], timeout=timeout / 2).close()
                return reached.set()
            except Exception:  # no answer, or one that is not of MNIST's server
                continue

    # A thread, because a name server that does not answer heeds no timeout.
    prober = threading.Thread(target=try_mirrors, daemon=True)
    prober.start()
    prober.join(timeout)
    if not reached.is_set():
        raise NotAvailable(
            f"MNIST is not in {folder} and its servers cannot be reached; "
            "connect to the internet, name its folder with --data-dir, or train on --dataset glyphs"
        )
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            MNIST(temporary, download=True)
            for name in MNIST_FILES:
                (Path(temporary) / "MNIST" / "raw" / name).replace(folder / name)
    except (
        RuntimeError,
        OSError,
        HTTPException,
    ) as error:  # the first is torchvision's
        raise NotAvailable(f"MNIST cannot be downloaded ({error}); try again, or train on --dataset glyphs") from error
    finally:
        socket.setdefaulttimeout(patience)
