"""The command line: flags made from Config's fields, mistakes as one line, output that may go unheard."""

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import ROOT, Config
from support.errors import MEMORY, UserError, check_limits, is_memory_error


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line; a flag not given leaves nothing in the result."""

    def __init__(self, description: str):
        super().__init__(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
        self.groups: dict[str, Any] = {}
        self.limits: dict[str, dict[str, int]] = {}

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists every flag)\n")

    def group(self, title: str) -> Any:
        """The group of flags under this title in --help."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title]

    def add_fields(self, *names: str, default: str | None = None, title: str | None = None) -> None:
        """Add a flag for each of Config's fields named, in its group or under `title`.

        Args:
            default: what a flag not given means, if not the field's own default.
        """
        heading = ""
        for field in dataclasses.fields(Config):
            meta = field.metadata
            heading = meta["group"] or heading
            if field.name not in names:
                continue
            shown = default or field.default
            help = meta["help"] + ("" if shown is None else f" (default: {shown})")
            flag, group = "--" + field.name.replace("_", "-"), self.group(title or heading)
            if meta["type"] is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
                continue
            metavar = None if meta["choices"] else meta["type"].__name__.upper().replace("STR", "NAME")
            group.add_argument(flag, type=meta["type"], choices=meta["choices"] or None, metavar=metavar, help=help)

    def add_number(self, flag: str, help: str, title: str, least: int = 1, most: int = 10**9) -> None:
        """Add a flag for a whole number from least to most."""
        self.group(title).add_argument(flag, type=int, metavar="INT", help=help)
        self.limits[flag[2:].replace("-", "_")] = {"least": least, "most": most}

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        given = super().parse_args(*args, **kwargs)
        for name, limits in self.limits.items():
            if hasattr(given, name):
                check_limits(name, getattr(given, name), **limits)
        return given


def parse_labels(text: str, num_classes: int) -> list[int]:
    """[207, 360] from "207,360"; without a comma each character is a label where there are at most 10 classes."""
    separate = "," in text or num_classes > 10
    try:
        labels = [int(label) for label in (text.removesuffix(",").split(",") if separate else text)]
    except ValueError:
        labels = []
    if not labels:
        raise UserError(f"labels {text!r}: give digits, such as 0123, or numbers with commas, such as 207,360")
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"label {label} is not one of the model's {num_classes} classes, 0 to {num_classes - 1}")
    return labels


def one_line(message: str) -> str:
    """The message with its line breaks made visible: a path may hold some."""
    return message.replace("\n", "\\n").replace("\r", "\\r")


def shown(path: str | Path) -> str:
    """A path as one would type it from here: relative where it is below this folder."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def command(script: str, *arguments: str | Path) -> str:
    """A command of this repository's to be copied into a shell from here, quoted as that needs."""
    return shlex.join(["python", shown(ROOT / script), *map(str, arguments)])


class Unheard:
    """A stream that goes on unheard when its reader has gone or it is closed: no reason to lose a run."""

    def __init__(self, stream: Any):
        self.stream = stream or open(os.devnull, "w")  # None where it was closed from the start
        with contextlib.suppress(AttributeError):
            self.stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason either

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError):
            self.silence()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self) -> None:
        """Point the stream to nowhere, for what it still holds would fail again at the end."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def start_quietly() -> None:
    """Called before a script's slow imports: Ctrl-C among them ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main(); a mistake of the user's is one line on stderr and exit status 1."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.redirect_stdout(Unheard(sys.stdout)), contextlib.redirect_stderr(Unheard(sys.stderr)):
        try:
            main()
        except UserError as error:
            message = str(error)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message = f"{where}{error.strerror or error}; check that the path exists, is yours and has room left"
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            message = MEMORY
        except KeyboardInterrupt:
            sys.exit(130)
        else:
            return
    sys.exit(f"error: {one_line(message)}")
