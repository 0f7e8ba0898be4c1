import dataclasses
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import benchmark
import evaluate
import inference
import train
from config import Config
from support.command_line import (
    Parser,
    Progress,
    Unheard,
    command,
    counted,
    leave_out_unusable_cache,
    one_line,
    parse_labels,
    quoted,
    run_script,
    shown,
)
from support.errors import UserError

FLAGS = [field.name for field in dataclasses.fields(Config) if field.name not in train.OF_THE_DATA]
SCRIPTS = {"train.py": train, "inference.py": inference, "evaluate.py": evaluate, "benchmark.py": benchmark}


def parser() -> Parser:
    parser = Parser("test")
    parser.add_fields(*FLAGS)
    return parser


def test_flags_are_the_fields_and_only_those_given_come_back():
    flags = ["--hidden-size", "64", "--learning-rate", "2e-3", "--prediction", "x0", "--learn-sigma", "--no-clip-x0"]
    given = {"hidden_size": 64, "learning_rate": 2e-3, "prediction": "x0", "learn_sigma": True, "clip_x0": False}
    assert vars(parser().parse_args(flags)) == given


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        if field.name not in FLAGS:
            continue
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text
        assert all(str(choice) in text.replace("- ", "-") for choice in field.metadata["choices"])
    assert "(default: 0.003)" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_each_flag_once_and_first_the_dozen_that_people_use(script, capsys):
    with pytest.raises(SystemExit) as exit:
        SCRIPTS[script].main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 5
    assert text.count("[--") == 1  # the usage does not list them all again
    headings = re.findall(r"^([a-z]+):$", text, re.MULTILINE)
    assert headings[0] == "basics" and "options" not in headings
    basics = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text.split("\n\n")[2], re.MULTILINE)
    assert 5 < len(basics) <= 13  # with --help


@pytest.mark.parametrize("flags", [["--depth", "four"], ["--precision", "fp8"], ["--no-such-flag\n"], ["--dep", "4"]])
def test_a_mistake_on_the_command_line_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(flags)
    assert exit.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "script, flag",
    [("train.py", f"--{name}=") for name in ("out-dir", "data-dir", "dataset", "sampler")]
    + [("train.py", "--learning-rate=--"), ("train.py", "--out-dir=--"), ("inference.py", "--cfg-scale=--")]
    + [("inference.py", f"--{name}=") for name in ("labels", "checkpoint", "output", "gif", "npz", "vae")]
    + [("inference.py", "--labels=--"), ("evaluate.py", "--npz="), ("evaluate.py", "--json=")]
    + [("benchmark.py", "--models="), ("benchmark.py", "--json=")],
)
def test_a_flag_without_a_value_is_refused_by_name(script, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, work in ((train, "train"), (inference, "load_model"), (evaluate, "load_model"), (benchmark, "version")):
        monkeypatch.delattr(module, work)  # so that a flag that passes fails at once
    name = flag.split("=")[0]
    with pytest.raises((UserError, SystemExit)) as refused:
        SCRIPTS[script].main([flag])
    if isinstance(refused.value, UserError):
        assert str(refused.value).startswith(f"{name} is given without a value")
    else:  # newer versions of argparse take -- for a value, which is no number
        assert "rate" in name or "scale" in name
        assert f"argument {name}: invalid float value: '--'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, flag, least, most",
    [
        ("inference.py", "num_samples", 1, 10**8),
        ("evaluate.py", "num_samples", 50, 10**9),
        ("evaluate.py", "seeds", 1, 1000),
        ("evaluate.py", "bits_per_dim", 2, 10**9),
        ("benchmark.py", "batch_size", 1, 2**20),
        ("benchmark.py", "repeats", 1, 10**6),
    ],
)
def test_numbers_out_of_reach_are_refused_at_once(script, flag, least, most):
    for value, bound in ((least - 1, least), (-(10**30), least), (most + 1, most), (10**400, most)):
        with pytest.raises(UserError, match=f"^{flag} is {value}; it must be at .* {bound}$"):
            SCRIPTS[script].main([f"--{flag.replace('_', '-')}={value}"])


def test_run_script_turns_mistakes_into_one_line_and_lets_bugs_through(capsys):
    def fail(error):
        raise error

    for error, words in (
        (UserError("no"), "error: no"),
        (UserError("no \n file"), r"error: no \n file"),
        (PermissionError(13, "Permission denied", "a/b"), "error: a/b: Permission denied; check"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "error: not enough memory; try a smaller"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_script(lambda error=error: fail(error))
        assert exit.value.code == 1
        assert capsys.readouterr().err.startswith(words)
    for bug in (KeyError, RuntimeError):
        with pytest.raises(bug):
            run_script(lambda bug=bug: fail(bug("a bug")))


def test_ctrl_c_ends_a_script_without_a_word(capsys):
    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here, as in the background
    try:
        with pytest.raises(SystemExit) as exit:
            run_script(interrupted)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit.value.code == 130 and capsys.readouterr().err == ""


def test_a_table_that_cannot_be_written_is_no_success():
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is of Linux")
    code = "from support.command_line import run_script; run_script(lambda: print('table'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: what was printed is lost (No space left on device)")


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_among_the_imports_ends_a_script_without_a_word(script, ignored, tmp_path):
    """A torch that never comes, in the place of the true one; a background job, which ignores Ctrl-C, goes on."""
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(300)\n")
    process = subprocess.Popen(
        [sys.executable, ROOT / script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    assert process.stdout.readline() == "importing\n", process.stderr.read()
    process.send_signal(signal.SIGINT)
    if ignored:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-(signal.SIGTERM if ignored else signal.SIGINT), "", "")


def test_a_message_is_one_line_of_what_can_be_shown(capsys):
    assert one_line("a\nb\r\x1b[1m\u2028\udcff ü") == r"a\nb\r\x1b[1m\u2028\udcff ü"
    assert len(one_line("9" * 5000)) < 2000
    for value in ("a\nb", "9" * 5000):
        with pytest.raises(SystemExit):
            inference.main(["--sample-steps", value])
        (line,) = capsys.readouterr().err.splitlines()
        assert "invalid int value" in line and len(line) < 2100


ANIMALS = ["cat", "hot dog", "dog", "Dog", "tench, Tinca tinca", "bird"]


@pytest.mark.parametrize(
    "text, labels",
    [
        ("cat", [0]),
        ("cat,dog", [0, 2]),
        ("cat, Dog,", [0, 3]),
        ("CAT,Hot Dog", [0, 1]),
        ("hot dog", [1]),
        ("tench, Tinca tinca", [4]),
        ("bird,tench, tinca Tinca,cat", [5, 4, 0]),
        ("bird,tench, Tinca tinca,cat", [5, 4, 0]),
        ("0123", [0, 1, 2, 3]),
        ("2,cat,5", [2, 0, 5]),
        ("3", [3]),
    ],
)
def test_labels_are_names_or_numbers(text, labels):
    assert parse_labels(text, len(ANIMALS), ANIMALS) == parse_labels(text, len(ANIMALS), tuple(ANIMALS)) == labels


@pytest.mark.parametrize(
    "text, message",
    [
        ("cta", r"label 'cta' is no class of this model, which are: cat, .*bird"),
        ("cat,dgo", r"label 'dgo' is no class of this model, which are: [Dd]og, "),
        ("bird,tench, Tinca", r"label 'tench' is no class of this model, which are: tench, Tinca tinca, "),
        ("DOG", r"label 'DOG' is no class of this model, which are: dog, Dog, "),  # two are alike
        ("cat,,dog", r"label '' is no class"),
        (" ", r"label '' is no class"),
        ("cat dog", r"label 'cat dog' is no class"),
        ("017", "label 7 is not one of the model's 6 classes, 0 to 5"),
        ("cat,-1", "label -1 is not one of the model's 6 classes, 0 to 5"),
        ("9" * 5000 + ",", "label '999"),
    ],
)
def test_an_unknown_name_is_told_with_the_known_ones_the_likeliest_first(text, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parse_labels(text, len(ANIMALS), ANIMALS)


def test_of_many_names_twenty_are_told():
    names = [f"class {i}" for i in range(1000)]
    assert parse_labels("class 7,7,CLASS 999", 1000, names) == [7, 7, 999]
    with pytest.raises(UserError, match="^label 'class 1000' is no class .*: class 100, .* and 980 more$") as error:
        parse_labels("class 1000", 1000, names)
    assert str(error.value).count("class ") == 22
    with pytest.raises(UserError, match="label 1000 is not one of the model's 1000 classes"):
        parse_labels("1000", 1000, names)


def test_what_is_a_name_is_never_a_number():
    assert parse_labels("3", 3, ["3", "1", "2"]) == [0] and parse_labels("123", 3, ["3", "1", "2"]) == [1, 2, 0]
    assert parse_labels("0123", 2, ["1", "0123"]) == [1] and parse_labels("0,1", 2, ["1", "0123"]) == [0, 0]
    names = [str(i) for i in reversed(range(20))]
    assert parse_labels("19", 20, names) == [0] and parse_labels("1,2", 20, names) == [18, 17]


NAMES = ("run", "my run", "it's", 'a "b"', "a\nb", "$HOME;`ls`", "ü", "\udcff\udc80b", "-\\'\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_commands_can_be_pasted_into_a_shell(encoding, monkeypatch):
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("there is no bash here")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for name in NAMES:
        text = quoted(name)
        assert text.isprintable() and text.encode(encoding)  # so it prints as it is
        shell = subprocess.run([bash, "-c", f"printf %s {text}"], capture_output=True, env={"LC_ALL": "C"})
        assert shell.stdout == os.fsencode(name)


def test_paths_are_seen_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "a" / "b\n") == r"a/b\n"
    assert shown(ROOT / "model.pth") == str(ROOT / "model.pth") and shown("c") == "c"
    line = command("train.py", "--resume", "--out-dir", tmp_path / "my run")
    assert shlex.split(line) == ["python", str(ROOT / "train.py"), "--resume", "--out-dir", "my run"]
    monkeypatch.chdir(ROOT)
    assert command("train.py", "--out-dir", ROOT / "runs" / "a") == "python train.py --out-dir runs/a"


def test_a_run_from_elsewhere_in_an_odd_folder_prints_a_command_that_works(tmp_path, glyphs_dir):
    """With a terminal of ASCII alone, and a compiler's cache that cannot be: none of this is a reason to stop."""
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("there is no bash here")
    flags = ["--dataset", "glyphs", "--data-dir", glyphs_dir, "--out-dir", "it's\nmein ü", "--train-steps", "2"]
    flags += ["--hidden-size", "32", "--depth", "1", "--compile", "off"]
    (tmp_path / "file").write_text("")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file")}
    asked = dict(cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    result = subprocess.run([sys.executable, ROOT / "train.py", *flags], **asked)
    assert result.returncode == 0, result.stderr
    assert f"TORCHINDUCTOR_CACHE_DIR={tmp_path}/file is left out (File exists)" in result.stderr
    assert (tmp_path / "it's\nmein ü" / "model.pth").exists()
    line = result.stdout.strip().splitlines()[-1]
    assert line.startswith("done; to see images: python ")
    words = line.split("python ", 1)[1]
    script = f"{shlex.quote(sys.executable)} {words} --output digits.png"
    result = subprocess.run([bash, "-c", script], **asked)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "digits.png").exists() and "written: digits.png" in result.stdout


def test_closed_streams_and_readers_that_go_are_no_reason_to_stop(tmp_path, glyphs_dir):
    flags = f"--dataset glyphs --data-dir {shlex.quote(str(glyphs_dir))} --train-steps 60 --hidden-size 32 --depth 1"
    start = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'train.py'))} {flags} --compile off --out-dir"
    asked = dict(cwd=tmp_path, capture_output=True, text=True, timeout=300)
    result = subprocess.run(["sh", "-c", f"{start} closed <&- >&- 2>&-"], **asked)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "closed" / "loss.png").exists()
    result = subprocess.run(["sh", "-c", f"({start} head; echo status $? >&2) | head -n 1"], **asked)
    assert result.stderr == "status 0\n" and result.stdout.startswith("device")
    assert (tmp_path / "head" / "loss.png").exists()


def test_a_script_whose_first_line_comes_last_says_nothing_of_a_reader_that_has_gone():
    reader, writer = os.pipe()
    os.close(reader)
    script = "from support.command_line import run_script\nrun_script(lambda: print('x'))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    asked = dict(cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    result = subprocess.run([sys.executable, "-c", script], **asked)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_unheard_stream_lets_all_else_through():
    inner = io.StringIO()
    stream = Unheard(inner)
    assert stream.write("abc") == 3 and inner.getvalue() == "abc"
    assert not stream.isatty()
    inner.close()
    assert stream.write("abc") == 3
    stream.flush()
    assert Unheard(None).write("abc") == 3


@pytest.mark.parametrize("cache, stays", [("file", False), ("file/below", False), ("new", True), (None, True)])
def test_a_cache_that_cannot_be_is_left_out(cache, stays, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if cache:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / cache))
    leave_out_unusable_cache()
    assert ("TORCHINDUCTOR_CACHE_DIR" in os.environ) == (stays and cache is not None)
    assert ("left out" in capsys.readouterr().err) == (not stays)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_in_a_terminal_and_elsewhere_a_line_now_and_then(monkeypatch):
    def told(every: float, stream: io.StringIO) -> str:
        monkeypatch.setattr(Progress, "every", every)
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(1200, done=1197) as bar:
            for loss in (3, 2, 1):
                bar.note = f"loss {loss}"
                bar.update()
        assert list(counted(range(2), 2, "sampling")) == [0, 1]
        return stream.getvalue()

    of_training = [f"step {step} of 1,200: loss {loss}" for step, loss in (("1,198", 3), ("1,199", 2), ("1,200", 1))]
    of_sampling = ["sampling: step 1 of 2", "sampling: step 2 of 2"]
    assert told(0.0, io.StringIO()).splitlines() == of_training + of_sampling
    assert told(1e9, io.StringIO()) == ""  # what is over within a minute
    assert "100%" not in told(0.0, io.StringIO()) and "%|" in told(1e9, Terminal())


def test_the_last_line_is_told_of_what_took_longer_than_a_minute(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = Progress(5)
    for step in range(5):
        monkeypatch.setattr(Progress, "every", 0.0 if step == 1 else 1e9)
        bar.update()
    assert stream.getvalue().splitlines() == ["step 2 of 5", "step 5 of 5"]


def test_default_paths_are_the_repositorys_and_given_ones_are_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    assert Config().run_dir == ROOT / "runs" / "digits" and Config().data_folder == ROOT / "data"
    assert Config(out_dir="a").run_dir == Path("a") and Config(data_dir="b").data_folder == Path("b")
    monkeypatch.setenv("DATA_DIR", "elsewhere")
    assert Config().data_folder == Path("elsewhere") and Config(data_dir="b").data_folder == Path("b")
