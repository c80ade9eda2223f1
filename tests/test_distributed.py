"""Two gloo processes under torchrun, really started: the same curve as one, each image once, errors that end all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_cls
from idml.errors import UserError
from tests.test_train_cls import ROOT, read_tensorboard, step_losses

# Nothing random but the weights and the order, which do not depend on the number of processes.
PLAIN = ["--dataset", "digits", "--model", "resnet8_cifar", "--method", "ism", "--bn-freeze", "--crop-padding", "0"]
PLAIN += [
    "--val-fraction",
    "0.1",
    "--batch-size",
    "300",
    "--epochs",
    "3",
    "--lr",
    "0.02",
    "--log-every",
    "1",
    "--threads",
    "1",
    "--no-verbose",
]


def launch(processes: int, script: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [*torchrun, str(script)] if processes > 1 else [sys.executable, str(script)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training in one process, in two, both introspected, and in two with every batch in two parts."""
    base = tmp_path_factory.mktemp("distributed")
    kinds = (("one", 1, []), ("two", 2, []), ("parts", 2, ["--grad-accum", "2", "--no-introspect"]))
    for name, processes, options in kinds:
        done = launch(processes, ROOT / "train_cls.py", *PLAIN, *options, "--output-dir", str(base / name))
        assert done.returncode == 0, done.stderr
    return {name: base / name for name, *_ in kinds}


@pytest.mark.parametrize("name", ["two", "parts"])
def test_two_processes_follow_the_curve_of_one(runs: dict[str, Path], name: str) -> None:
    """The 1,299 training images leave a last batch of 99, which falls unevenly to two processes and to their parts."""
    one, two = step_losses(runs["one"]), step_losses(runs[name])
    assert len(one) == 15
    assert one[-1] < 0.97 * one[0]
    np.testing.assert_allclose(two, one, rtol=1e-5)
    weights = [torch.load(runs[key] / "checkpoints/last.pt", weights_only=True)["model"] for key in ("one", name)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-3)


def test_figures_count_every_image_once(runs: dict[str, Path]) -> None:
    final = {key: json.loads((runs[key] / "results.json").read_text(encoding="utf-8")) for key in ("one", "two")}
    assert final["two"]["processes"] == 2
    for name in ("top1", "top5", "nll", "ece", "uncertainty_test", "uncertainty_train_mixed", "train_loss"):
        assert final["two"]["final"][name] == pytest.approx(final["one"]["final"][name], rel=5e-3), name


def test_two_processes_introspect_as_one(runs: dict[str, Path]) -> None:
    """Each reads its share of the images; what is fitted is fitted to all of them, and read by both ranks."""
    results = {key: json.loads((runs[key] / "results.json").read_text(encoding="utf-8")) for key in ("one", "two")}
    about = {key: result["introspection"] for key, result in results.items()}
    for name in ("train_images_read", "held_out_images_read", "images", "steps"):
        assert about["one"][name] == about["two"][name], name
    assert about["two"]["held_out_images_read"] == 143
    final = {key: result["final"] for key, result in results.items()}
    for name in ("error_auroc", "coverage_at_5_risk"):
        assert final["two"][name] == pytest.approx(final["one"][name], abs=0.02), name
    stored = [
        torch.load(runs[key] / "checkpoints/last.pt", weights_only=True)["introspection"]
        for key in runs
        if key != "parts"
    ]
    assert stored[0]["spec"] == stored[1]["spec"] and stored[0]["spec"]["calibrated"]
    for name in ("heads.mean", "heads.variance", "novelty.centre"):
        torch.testing.assert_close(stored[1]["state"][name], stored[0]["state"][name], rtol=1e-2, atol=1e-3, msg=name)


def test_only_rank_0_writes(runs: dict[str, Path]) -> None:
    assert len(list((runs["two"] / "tensorboard").iterdir())) == 1
    assert len((runs["two"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert len(read_tensorboard(runs["two"]).Scalars("top1")) == 3


PROBE = """
import os, sys
import train_cls
from idml.errors import TrainingError, run_main
original = train_cls.step
def step(state, guard, batch, config, global_size):
    with open(f"lam-{os.environ['RANK']}", "a") as file:
        file.write(f"{float(batch.lam)}\\n")
    if os.environ.get("BREAK") == os.environ["RANK"] and state.step == 2:
        raise TrainingError("this rank broke")
    return original(state, guard, batch, config, global_size)
train_cls.step = step
run_main(train_cls.main)
"""


def test_mixing_differs_by_rank_and_a_failing_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    monkeypatch.setenv("BREAK", "1")
    options = ["--dataset", "digits", "--model", "resnet8_cifar", "--method", "idml-mixup", "--threads", "1"]
    done = launch(2, script, *options, "--output-dir", "run", cwd=tmp_path)
    assert done.returncode != 0
    assert "error (rank 1): this rank broke" in done.stderr
    assert not (tmp_path / "run/results.json").exists()
    lam = [[float(x) for x in (tmp_path / f"lam-{rank}").read_text().split()][:3] for rank in (0, 1)]
    assert len(lam[0]) == len(lam[1]) == 3
    assert not set(lam[0]) & set(lam[1])


def test_a_batch_that_does_not_divide_is_an_error(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | place).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--batch-size 33 \(over all processes\) does not divide by 2 processes"):
        train_cls.main(["--batch-size", "33"])
    assert not list(in_tmp.iterdir())
