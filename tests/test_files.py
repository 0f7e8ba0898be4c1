import errno
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders.glyphs import load_glyphs
from support import files
from support.classifier import Classifier, load_classifier
from support.command_line import run_script
from support.errors import DamagedFile, UserError
from support.files import append_line, check_path, load_file, locked, read_file, save_file, writing, writing_folder
from support.pictures import save_gif, save_loss_plot, save_png, save_strip

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
CONTENT = {
    "model": {"a.weight": torch.arange(1.0, 13.0).view(3, 4), "a.bias": torch.ones(3), "half": torch.ones(5).half()},
    "config": {"depth": 3, "name": "x", "loss": 0.5},
}
IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def write_npz(path):
    with writing(path) as file:
        np.savez(file, IMAGES.numpy(), np.arange(4))


WRITERS = {  # everything that is written as a whole, more than 20,000 bytes each
    "a.pth": lambda path: save_file({"a": torch.zeros(100), "b": torch.zeros(100_000)}, path),
    "a.npz": write_npz,
    "a.png": lambda path: save_png(IMAGES, path, columns=2),
    "a.gif": lambda path: save_gif([IMAGES] * 3, path),
    "strip.png": lambda path: save_strip({0: IMAGES, 1: IMAGES}, [0, 1, 2, 3], path),
    "loss.png": lambda path: save_loss_plot(path, [f"{i},{1 / i},0.1,9.0" for i in range(1, 50)]),
}


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


# ---- written whole or not at all


@contextmanager
def full_disk(folder):
    """A disk of 16 kB at the folder where this may be mounted, else a limit to the size of files."""
    resource = pytest.importorskip("resource", reason="limits are of Unix")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield "No space left on device"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_no_scraps(name, tmp_path):
    with full_disk(tmp_path) as reason:
        path = tmp_path / name
        path.write_bytes(b"old")
        with pytest.raises(UserError) as error:
            WRITERS[name](path)
        assert str(error.value) == f"cannot write {path} ({reason}); free some space or choose another folder"
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_limit_to_the_size_of_files_is_told_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name in ("a.pth", "a.npz"):
        (tmp_path / name).mkdir()
        test_a_full_disk_leaves_the_old_file_and_no_scraps(name, tmp_path / name)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_the_old_file_and_no_scraps(name, function, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / name
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(UserError) as error:
        WRITERS[name](path)
    assert str(path) in str(error.value) and "Input/output error" in str(error.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_whole(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(WRITERS)
    assert torch.equal(load_file(tmp_path / "a.pth")["b"], torch.zeros(100_000))
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], IMAGES.numpy())


def test_an_error_of_the_writers_own_passes_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path / "a.json"):
        raise KeyError("a mistake in the code")
    with pytest.raises(RuntimeError, match="^no disk's$"), writing(tmp_path / "a.json"):
        raise RuntimeError("no disk's")
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "a.json"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "model.pth"
    link.symlink_to(tmp_path / "elsewhere" / "model.pth")
    for content in (1, 2):  # the first has no file yet to point to
        save_file(content, link)
        assert link.is_symlink() and load_file(tmp_path / "elsewhere" / "model.pth") == content
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_folder_that_is_not_there_or_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path / "no" / "a.pth", "No such file"), (tmp_path / "file" / "a.pth", "Not a directory")):
        with pytest.raises(UserError, match=reason) as error:
            save_file(1, path)
        assert str(path) in str(error.value)


def write_again_and_again(path, letter):
    for _ in range(100):
        with writing(path) as file:
            for _ in range(20):
                file.write(letter * 1000)
                file.flush()
        assert path.read_bytes() in (b"A" * 20_000, b"B" * 20_000)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_two_that_write_the_same_file_leave_a_whole_one(tmp_path):
    writers = [FORK.Process(target=write_again_and_again, args=(tmp_path / "a", letter)) for letter in (b"A", b"B")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_line_is_added_or_the_file_named(tmp_path):
    path = tmp_path / "loss.csv"
    append_line(path, "a")
    append_line(path, "b")
    assert path.read_text() == "a\nb\n"
    with pytest.raises(UserError, match="loss.csv .Not a directory.; free some space"):
        append_line(path / "loss.csv", "a")


def test_a_file_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    check_path("--gif", str(tmp_path / "a.gif"), ".gif")
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "link.gif").symlink_to(tmp_path / "nowhere" / "a.gif")
    for path, message in (
        (tmp_path / "a.png", "must end in .gif"),
        (tmp_path / "no" / "a.gif", "its folder does not exist"),
        (tmp_path / "folder.gif", "is a folder"),
        (tmp_path / "link.gif", "its folder does not exist"),
    ):
        with pytest.raises(UserError, match=message) as error:
            check_path("--gif", str(path), ".gif")
        assert str(error.value).startswith(f"--gif {path}")


# ---- one run at a time


def hold_lock(folder, pipe):
    with locked(folder):
        pipe.send("locked")
        pipe.recv()


def hold(folder):
    """Another process that has the folder's lock, and what it waits for to end."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold_lock, args=(folder, there), daemon=True)
    process.start()
    assert here.recv() == "locked"
    return process, here


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    pytest.importorskip("fcntl", reason="locks are of Unix")
    with locked(tmp_path), pytest.raises(UserError, match="is in use by another run"), locked(tmp_path):
        pass
    for killed in (True, False):
        process, pipe = hold(tmp_path)
        with pytest.raises(UserError) as error, locked(tmp_path):
            pass
        assert str(error.value) == f"{tmp_path} is in use by another run; wait for its end, or give another --out-dir"
        process.kill() if killed else pipe.send("end")
        process.join()
        with locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_half_written_is_cleared_away_by_the_next(tmp_path):
    pytest.importorskip("fcntl", reason="locks are of Unix")
    keep = [tmp_path / name for name in ("checkpoint.pth", "model.pth", "notes.tmp", "a.pth")]
    scraps = [tmp_path / name for name in ("checkpoint.pth.17.tmp", "model.pth.4711.tmp", "checkpoint.pth.tmp")]
    for path in (*keep, *scraps):
        path.write_text("")
    process, pipe = hold(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(keep)
    scraps[0].write_text("of the run that holds the lock")
    with pytest.raises(UserError), locked(tmp_path):
        pass
    assert scraps[0].exists()
    pipe.send("end")
    process.join()


def test_where_there_are_no_locks_the_work_goes_on(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="locks are of Unix")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path):
        save_file(1, tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with locked(tmp_path):
        assert load_file(tmp_path / "a.pth") == 1


# ---- believed, and blamed, rightly


def test_a_flipped_bit_anywhere_is_seen_or_changes_nothing(tmp_path):
    path = tmp_path / "a.pth"
    save_file(CONTENT, path)
    good = path.read_bytes()
    rng = random.Random(0)
    seen = 0
    for position in rng.sample(range(len(good)), 400):
        flip(path, position, rng.randrange(8))
        try:
            assert same(load_file(path), CONTENT), position
        except DamagedFile as error:
            assert str(path) in str(error) and "\n" not in str(error)
            seen += 1
        path.write_bytes(good)
    assert seen > 150


def test_a_flipped_bit_in_each_tensor_is_seen(tmp_path):
    path = tmp_path / "a.pth"
    save_file(CONTENT, path)
    good = path.read_bytes()
    for tensor in CONTENT["model"].values():
        start = good.index(tensor.numpy().tobytes())
        for position in range(start, start + tensor.nbytes):
            flip(path, position, position % 8)
            assert not same(torch.load(path, weights_only=True), CONTENT)  # torch alone sees nothing
            with pytest.raises(DamagedFile, match="its checksums do not fit what it holds"):
                load_file(path)
            path.write_bytes(good)


def test_contents_marked_as_a_folder_are_seen(tmp_path):
    """The zip's checksums fit, but torch does not read such a tensor: it is what was in memory before."""
    path = tmp_path / "a.pth"
    save_file({"a": torch.ones(1000)}, path)
    content = path.read_bytes()
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"data/0"))  # of the zip's directory
    flip(path, entry + 38, 4)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    torch.load(path, weights_only=True)
    with pytest.raises(DamagedFile):
        load_file(path)


def test_a_foreign_file_with_other_checksums_is_read_and_told(tmp_path):
    path = tmp_path / "a.pth"
    save_file(CONTENT, path)
    assert same(read_file(path)[0], CONTENT) and read_file(path)[1]
    content = re.sub(rb"(PK\x01\x02.{12}).{4}", lambda entry: entry[1] + bytes(4), path.read_bytes(), flags=re.DOTALL)
    path.write_bytes(content)  # its directory says that each sum is 0
    content, intact = read_file(path)
    assert same(content, CONTENT) and not intact
    with pytest.raises(DamagedFile, match="checksums"):
        load_file(path)


def test_the_older_format_without_checksums_is_read(tmp_path):
    torch.save(CONTENT, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content, intact = read_file(tmp_path / "a.pth")
    assert same(content, CONTENT) and intact


def test_what_is_no_file_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    cases = [("no.pth", "does not exist; do that"), (".", "is a folder; do that")]
    cases += [("file/a.pth", "cannot be read (Not a directory)"), ("loop", "cannot be read (Too many levels of")]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
        cases.append(("pipe", "is no file; do that"))
    for name, message in cases:
        with pytest.raises(UserError) as error:
            read_file(tmp_path / name, "do that")
        assert str(error.value).startswith(f"{tmp_path / name} {message}"), error.value
        assert not isinstance(error.value, DamagedFile)


def raises(error):
    def function(*_, **__):
        raise error

    return function


@contextmanager
def no_permission(path):
    """The file as another user sees it who may not read it; root, whom nobody forbids, is another one meanwhile."""
    path.chmod(0)
    for folder in path.parents:
        if folder == Path(folder.anchor) or folder.stat().st_uid != os.getuid() or folder == Path("/tmp"):
            break
        folder.chmod(folder.stat().st_mode | 0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        path.chmod(0o600)


@pytest.fixture
def caches(tmp_path):
    """A small cache of glyphs and a classifier: what reads each, and what it is told to do about damage."""
    (tmp_path / "glyphs").mkdir()
    images = torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file([images, torch.arange(50) % 10], tmp_path / "glyphs" / "train.pth")
    torch.manual_seed(0)
    save_file(Classifier(1, 10).state_dict(), tmp_path / "classifier.pth")
    save_file(CONTENT, tmp_path / "a.pth")
    return {
        tmp_path / "a.pth": load_file,
        tmp_path / "glyphs" / "train.pth": lambda _: load_glyphs(str(tmp_path), train=True),
        tmp_path / "classifier.pth": load_classifier,
    }


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions are of Unix")
def test_a_file_that_may_not_be_read_is_not_called_damaged(caches):
    for path, load in caches.items():
        load(path)
        with no_permission(path), pytest.raises(UserError) as error:
            load(path)
        assert str(error.value) == f"{path} cannot be read (Permission denied)"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_too_little_memory_is_told_as_that(error, caches, monkeypatch, capsys):
    monkeypatch.setattr(torch, "load", raises(error))
    for path, load in caches.items():
        with pytest.raises(type(error)):
            load(path)
        with pytest.raises(SystemExit):
            run_script(partial(load, path))
        assert capsys.readouterr().err.startswith("error: not enough memory")


def test_a_flipped_size_that_asks_for_too_much_is_damage(tmp_path, monkeypatch):
    save_file(CONTENT, tmp_path / "a.pth")
    flip(tmp_path / "a.pth", tmp_path.joinpath("a.pth").read_bytes().index(CONTENT["model"]["a.weight"].numpy()), 0)
    monkeypatch.setattr(torch, "load", raises(RuntimeError("can't allocate memory")))
    with pytest.raises(DamagedFile):
        load_file(tmp_path / "a.pth")


def test_a_damaged_cache_is_named_and_that_it_may_be_deleted(caches):
    for path, load in list(caches.items())[1:]:
        advice = "; delete it" if "glyphs" in path.parts else ""
        good = path.read_bytes()
        flip(path, len(good) // 2, 3)
        with pytest.raises(UserError, match="is damaged: its checksums do not fit.*" + advice) as error:
            load(path)
        assert str(path) in str(error.value)
        path.write_bytes(good[:-100])
        with pytest.raises(UserError, match="is damaged" + ".*" + advice):
            load(path)
        for content in (3, [1, 2], {"head.bias": torch.ones(1)}, [torch.zeros(50, 3), torch.zeros(50)]):
            save_file(content, path)
            with pytest.raises(UserError, match="holds no .*; delete it") as error:
                load(path)
            assert str(path) in str(error.value)


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.os, "replace", raises(OSError(errno.ENOSPC, "No space left on device")))
    drawn = [torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.arange(5)]
    monkeypatch.setattr("loaders.glyphs.draw_glyphs", lambda count, seed: drawn)
    assert load_glyphs(str(tmp_path), train=True) == tuple(drawn)
    assert "drawn anew each time: cannot write" in capsys.readouterr().err
    assert not list((tmp_path / "glyphs").iterdir())


def test_a_folder_is_whole_or_not_there_and_never_takes_the_place_of_another(tmp_path):
    with writing_folder(tmp_path / "new" / "a") as folder:
        (folder / "file").write_text("1")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    assert (tmp_path / "new" / "a" / "file").read_text() == "1"
    (tmp_path / "late").mkdir()
    with pytest.raises(UserError, match="cannot write .*late"), writing_folder(tmp_path / "late") as folder:
        (folder / "file").write_text("2")
        (tmp_path / "late" / "mine").write_text("3")  # somebody else's, meanwhile
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["mine"]
    assert {path.name for path in tmp_path.iterdir()} == {"new", "late"}
