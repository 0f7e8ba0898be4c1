"""The command line: flags made from Config's fields, mistakes as one line, output that may go unheard."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import ROOT, Config
from support.errors import MEMORY, UserError, check_limits, flag_of, is_memory_error, one_line


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line; a flag not given leaves nothing in the result."""

    def __init__(self, description: str):
        usage = "python %(prog)s [--flag value ...]"  # each flag is listed once, with its meaning
        absent = {"argument_default": argparse.SUPPRESS, "allow_abbrev": False, "add_help": False}
        super().__init__(description=description, usage=usage, **absent)
        self.groups: dict[str, Any] = {}
        self.limits: dict[str, dict[str, int]] = {}
        self.group("basics").add_argument("-h", "--help", action="help", help="show this and exit")

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
            kind, choices, few = meta["type"], meta["choices"], len(meta["choices"]) < 6
            usual = default or field.default
            help = meta["help"] + ("" if few else ": " + ", ".join(choices))
            help += "" if usual is None else f" (default: {usual})"
            flag, group = flag_of(field.name), self.group(title or heading)
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
                continue
            metavar = "DIR" if field.name.endswith("_dir") else {int: "INT", float: "FLOAT", str: "NAME"}[kind]
            if choices and few:
                metavar = None  # they are shown in its place
            group.add_argument(flag, type=kind, choices=choices or None, metavar=metavar, help=help)

    def add_number(self, flag: str, help: str, title: str, least: int = 1, most: int = 10**9) -> None:
        """Add a flag for a whole number from least to most."""
        self.group(title).add_argument(flag, type=int, metavar="INT", help=help)
        self.limits[flag[2:].replace("-", "_")] = {"least": least, "most": most}

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The flags given; UserError for one without a value or beyond its limits."""
        given = super().parse_args(argv)
        for name, value in vars(given).items():
            # [] and "--" are what argparse's versions make of --flag=--; of a flag given several times there is a list.
            if value in ("", [], "--") or (isinstance(value, list) and [] in value):
                raise UserError(f"{flag_of(name)} is given without a value; give it one, or leave it out")
            check_limits(name, value, **self.limits.get(name, {}))
        return given


def parse_labels(text: str, num_classes: int, class_names: Sequence[str] | None = None) -> list[int]:
    """[207, 360] from "207,360"; without a comma each digit is a label where there are at most 10 classes.

    With class_names also [0, 1] from "cat,dog", in capital or small letters. What is a name is never taken as a number:
    where "3" is the first of the classes, it is label 0. A name may have spaces and commas in it.

    Raises:
        UserError: for what is neither a class's name nor its number, with the names that are most like it.
    """
    names = class_names or ()
    parts = text.removesuffix(",").split(",")
    if parts == [text] and text.isdecimal() and num_classes <= 10 and find_name(text, names) is None:
        parts = list(text)
    labels, most = [], 1 + max((name.count(",") for name in names), default=0)
    while parts:
        for count in range(min(most, len(parts)), 0, -1):  # of a name with commas as much as there is
            label = find_name(",".join(parts[:count]).strip(), names)
            if label is not None:
                break
        if label is None:
            label = number_of(parts[0].strip(), num_classes, names, text)
        labels.append(label)
        parts = parts[count:]
    return labels


def find_name(text: str, names: Sequence[str]) -> int | None:
    """Where a name stands among the names; one that differs in capitals alone will do, if there are not several."""
    if text in names:
        return names.index(text)
    alike = [i for i, name in enumerate(names) if name.casefold() == text.casefold()]
    return alike[0] if len(alike) == 1 else None


def number_of(text: str, num_classes: int, names: Sequence[str], whole: str) -> int:
    """The label that a number is, which is no name; UserError for what is none."""
    try:
        label = int(text)
    except ValueError:
        if not names:
            raise UserError(
                f"labels {whole!r}: give digits, such as 0123, or numbers with commas, such as 207,360"
            ) from None
        known = ", ".join(closest(text, names))
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise UserError(f"label {text!r} is no class of this model, which are: {known}{more}") from None
    if not 0 <= label < num_classes:
        raise UserError(f"label {label} is not one of the model's {num_classes} classes, 0 to {num_classes - 1}")
    return label


def closest(text: str, names: Sequence[str], most: int = 20) -> list[str]:
    """The names that are most like a text, the best first."""
    likeness = difflib.SequenceMatcher(b=text[:100].casefold())  # it is slow with long ones

    def unlike(name: str) -> float:
        likeness.set_seq1(name[:100].casefold())
        return -likeness.ratio()

    return sorted(names, key=unlike)[:most]


def from_here(path: str | Path) -> str:
    """A path as one would give it from here: relative where it is below this folder."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def shown(path: str | Path) -> str:
    """A path from here, to be read."""
    return one_line(from_here(path))


def quoted(argument: str) -> str:
    """An argument as a shell reads it; what cannot be printed goes as the bytes that it stands for."""
    with contextlib.suppress(UnicodeEncodeError):
        argument.encode(sys.stdout.encoding or "ascii")
        if argument.isprintable():
            return shlex.quote(argument)
    letters = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(argument)
    )
    return "$'" + "".join(letters) + "'"


def command(script: str, *arguments: str | Path) -> str:
    """A command of this repository's, to be copied into a shell from here; its paths are seen from here too."""
    words = (from_here(word) if isinstance(word, Path) else word for word in (ROOT / script, *arguments))
    return " ".join(["python", *map(quoted, words)])


class Progress:
    """A bar where stderr is a terminal; elsewhere, as in a file, a line a minute, and the last of what took longer."""

    every = 60.0  # seconds

    def __init__(self, total: int, what: str = "", done: int = 0, leave: bool = False):
        self.bar = tqdm(total=total, initial=done, desc=what, unit="step", leave=leave, disable=None)
        self.what, self.total, self.done, self.note = f"{what}: " if what else "", total, done, ""
        self.start = self.last = time.monotonic()

    def update(self) -> None:
        """One more step is done; `note` says how it went."""
        self.done += 1
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and (now - self.last >= self.every or self.done == self.total and self.last > self.start):
            self.last = now
            line = f"{self.what}step {self.done:,} of {self.total:,}" + (f": {self.note}" if self.note else "")
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def counted(steps: Iterable, total: int, what: str) -> Iterator:
    """The steps, told of as they are done."""
    with Progress(total, what) as bar:
        for step in steps:
            yield step
            bar.update()


class Unheard:
    """A stream that goes on unheard when its reader has gone or it is closed: no reason to lose a run."""

    def __init__(self, stream: Any):
        self.stream = stream or open(os.devnull, "w")  # None where it was closed from the start
        self.lost: OSError | None = None  # what else went wrong, such as a full disk
        with contextlib.suppress(AttributeError):
            self.stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason either

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                self.lost = error
            # To nowhere, for what the stream still holds would fail again at the end.
            with contextlib.suppress(OSError, ValueError):
                number = self.stream.fileno()
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def leave_out_unusable_cache() -> None:
    """Forget $TORCHINDUCTOR_CACHE_DIR where it cannot be a folder: much of torch loads its compiler unasked."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", os.curdir)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        print(one_line(f"note: TORCHINDUCTOR_CACHE_DIR={folder} is left out ({reason})"), file=sys.stderr)
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main(); a mistake of the user's is one line on stderr and exit status 1."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    out, err = Unheard(sys.stdout), Unheard(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            leave_out_unusable_cache()
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
            out.flush()
            if not out.lost:
                if "TORCHELASTIC_RUN_ID" in os.environ:  # at once: a thread of torch's that outlives Python aborts it,
                    os._exit(0)  # and torchrun takes that for a failure
                return
            message = f"what was printed is lost ({out.lost.strerror}); free some space, and run it again"
        finally:
            signal.signal(signal.SIGINT, interrupt)  # as before, so that Ctrl-C while it ends is quiet too
            out.flush()
        print(f"error: {one_line(message)}", file=sys.stderr)
        sys.exit(1)
