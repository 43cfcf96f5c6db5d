"""benchmarks/gpu.py, which waits for a GPU, runs: here on the CPU, with tiny models."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "gpu.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # its matrices are too small to share
PPO = ["gptj-6b", "neox-1b", "neox-1b-adapters"]


def run(path, *arguments):
    done = subprocess.run([sys.executable, SCRIPT, "--shape", "tiny", "--json", path, *arguments],
                          check=True, capture_output=True, text=True,
                          env=ENVIRONMENT)
    return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_every_part_runs_and_says_what_it_should(tmp_path):
    # bfloat16: there a gap would show, and does, in another batch
    found, printed = run(tmp_path / "a.json", "--dtype", "bfloat16")
    assert {"device", "shape", "dtype", "torch", "transformers", "parts"} == set(found)
    parts = found["parts"]
    assert list(parts) == ["tiny", *PPO, "gradients"]
    assert not any("error" in part for part in parts.values()), printed
    assert {"sft", "reward", "ppo", "total"} <= set(parts["tiny"]["seconds"])
    for part in (parts[name] for name in PPO):
        assert {"sample", "measure", "policy step", "critic step"} == set(part["tflops_executed"])
        assert {"sample", "measure", "policy step", "critic step", "rest"} == set(part["seconds"])
        assert {"planned", "allocated", "reserved"} == set(part["gib"])
        assert min(part["seconds"].values()) > 0 and min(part["tflops_executed"].values()) > 0
        # rows end where real ones do, an eighth as long: by EOS, not at the limit of 6
        assert part["ended"] == 1 and 3 <= part["mean_length"] <= 6
        assert part["gap"] <= 1e-3
    # in which of these models rounding shows is chance: so tiny ones are often sure of a token
    assert max(parts[name]["gap_in_another_batch"] for name in PPO) > 1e-3
    for case, differences in parts["gradients"].items():
        bound = 1e-5 if "float32" in case.split(", ") else 0.05
        for x in (differences.values() if case != "total_seconds" else ()):
            assert math.isfinite(x) and x < bound


@pytest.mark.slow
def test_flop_are_those_of_the_formula(tmp_path):
    found, _ = run(tmp_path / "a.json", "--part", "neox-1b")
    part = found["parts"]["neox-1b"]
    flop = part["tflops_executed"]["critic step"] * part["seconds"]["critic step"] * 1e12
    # 6 FLOP a weight and token, 4 passes over 16 rows of 24 + 3 to 62 + 5 tokens; and attention
    weights = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 128)  # two layers: attention, MLP
    assert 4 * 6 * weights * 16 * 27 < flop < 4 * 6 * weights * 16 * 67 * 1.5


@pytest.mark.slow
def test_a_part_that_fails_says_so_in_a_line_and_the_others_go_on(tmp_path):
    for name in ("gpu.py", "common.py"):
        (tmp_path / name).write_text((SCRIPT.parent / name).read_text())
    (tmp_path / "lengths.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, tmp_path / "gpu.py", "--json", tmp_path / "a.json", "--shape", "tiny",
         "--part", "neox-1b", "tiny"], capture_output=True, text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(SCRIPT.parent.parent)})
    parts = json.loads((tmp_path / "a.json").read_text())["parts"]
    assert done.returncode == 0 and "error: KeyError: 'prompts'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert parts["neox-1b"]["last_words"][0].startswith("Traceback")
    assert "seconds" in parts["tiny"]
