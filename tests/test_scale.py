import subprocess
import sys

import pytest
from conftest import ROOT

from docs.scale import bytes_sent

TINY = "--dataset glyphs --hidden-size 64 --depth 2 --batch-size 4 --train-steps 12 --sample-steps 1 --compile off"
TINY += " --device cpu"


def test_the_table_of_scale_md_is_what_the_formula_says():
    P = 675_129_632
    text = (ROOT / "docs" / "scale.md").read_text()
    for n in (8, 64):
        plain, sharded = (f"{bytes_sent(P, n, shard) / 1e9:.2f} GB" for shard in (False, True))
        assert f"| together, n = {n} | {plain} | {sharded} |" in text
    assert bytes_sent(P, 1, False) == 0 and bytes_sent(P, 8, True, 4) == 4 * bytes_sent(P, 8, True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone counts the bytes")
@pytest.mark.parametrize("flags", [[], ["--shard", "--optimizer", "adamw"]], ids=["plain", "sharded"])
def test_two_processes_send_what_the_formula_says(flags, glyphs_dir, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "docs.scale"]
    command += [*TINY.split(), "--data-dir", str(glyphs_dir), "--out-dir", str(tmp_path / "run"), *flags]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    formula, measured = map(float, result.stdout.splitlines()[-1].split("|")[3:5])
    assert formula > 0 and 0.98 < measured / formula < 1.5  # others may use the device too
