"""Retrieval under torchrun: two gloo processes, really started, train what one trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dml
from idml.errors import UserError
from idml.losses import LOSSES
from tests.test_distributed import launch
from tests.test_train_cls import read_tensorboard

# Every loss in one program, so that starting processes and importing is paid for once.
TRAIN_ALL = """
import os, sys
import train_dml
from idml import distributed
from idml.errors import run_main
distributed.shutdown, leave = lambda: None, distributed.shutdown
def main():
    for loss in sys.argv[1].split(","):
        for ism in ("off", "live") if loss in ("Proxy_Anchor", "Margin") else ("live",):
            pairs = ["--IPC", "4"] if loss not in ("Proxy_Anchor", "Proxy_NCA") else []
            # A scale of 32 amplifies rounding from step to step, and so do proxies that are small, as released.
            calm = {"Proxy_NCA": ["--lr", "2e-5"], "Proxy_Anchor": ["--proxy-norm", "3.2"]}.get(loss, [])
            train_dml.main([*sys.argv[3:], *pairs, *calm, "--loss", loss, "--ism", ism,
                            "--output-dir", f"{sys.argv[2]}/{loss}-{ism}"])
    leave()
run_main(main)
"""
# Batch norm is frozen since torch synchronises it on GPUs only; images are mixed within each process's share only. SGD,
# because AdamW would hide a gradient of the wrong scale; a rate at which rounding is not amplified from step to step.
OPTIONS = ["--model", "resnet8_cifar", "--image-size", "16", "--embedding-size", "32", "--batch-size", "40"]
OPTIONS += [
    "--mix",
    "none",
    "--warm",
    "0",
    "--optimizer",
    "sgd",
    "--lr",
    "1e-4",
    "--no-nmi",
    "--max-steps",
    "20",
    "--log-every",
    "1",
]
OPTIONS += ["--threads", "1", "--no-verbose", "--bn-freeze", "1"]
ALL = ["--val-fraction", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("distributed")
    script = base / "train_all.py"
    script.write_text(TRAIN_ALL)
    for processes, name in ((1, "one"), (2, "two")):
        done = launch(processes, script, ",".join(LOSSES), str(base / name), *OPTIONS, *ALL)
        assert done.returncode == 0, done.stderr[-3000:]
    return {name: base / name for name in ("one", "two")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "ism"), [*((loss, "live") for loss in LOSSES), ("Proxy_Anchor", "off"), ("Margin", "off")]
)
def test_two_processes_train_what_one_trains(runs: dict[str, Path], loss: str, ism: str) -> None:
    states = {}
    for name, base in runs.items():
        states[name] = torch.load(base / f"{loss}-{ism}" / "checkpoints/last.pt", weights_only=True)
    for part in ("loss", "model"):
        for key, value in states["one"][part].items():
            torch.testing.assert_close(states["two"][part][key], value, rtol=1e-5, atol=1e-5, msg=f"{part} {key}")
    curves = [[e.value for e in read_tensorboard(b / f"{loss}-{ism}").Scalars("step/loss")] for b in runs.values()]
    assert len(curves[0]) == 20
    # By rounding alone, a triplet at the edge may be semi-hard for one and not for the other.
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-3 if loss == "Triplet" else 1e-4)
    final = [json.loads((b / f"{loss}-{ism}/results.json").read_text(encoding="utf-8")) for b in runs.values()]
    assert [results["processes"] for results in final] == [1, 2]
    for key in ("R@1", "MAP@R", "R-AUROC similarity"):
        assert final[1]["final"][key] == pytest.approx(final[0]["final"][key], abs=5e-3), key


PROXIES = """
import os, sys
import torch, train_dml
from idml.errors import run_main
original = train_dml.step
def step(state, guard, images, batch, config, global_size):
    original(state, guard, images, batch, config, global_size)
    loss = state.epoch_losses[-1]
    proxies = state.loss.proxies.detach()
    torch.save({"proxies": proxies.clone(), "lam": batch.lam, "loss": loss, "images": images[:1].clone(),
                "uncertainty": torch.cat([p.detach().flatten() for p in state.model.uncertainty_head.parameters()]),
                "head": state.model.semantic_head.weight.detach().clone()},
               f"step-{state.step}-rank-{os.environ['RANK']}.pt")
train_dml.step = step
run_main(train_dml.main)
"""


def test_with_mixup_and_a_warm_up_all_ranks_hold_the_same(tmp_path: Path) -> None:
    """Batch norm live and images mixed: lam, loss, proxies and network are the same on both ranks, the images not.

    In the end both read their shares of the images for the introspection.
    """
    script = tmp_path / "probe.py"
    script.write_text(PROXIES)
    extra = ["--mix", "mixup", "--bn-freeze", "0", "--warm", "1", "--epochs", "2", "--batch-size", "400"]
    done = launch(2, script, *OPTIONS, *extra, "--output-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = sorted({int(path.name.split("-")[1]) for path in tmp_path.glob("step-*")})
    assert len(steps) >= 4
    for number in steps:
        both = [torch.load(tmp_path / f"step-{number}-rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("proxies", "lam", "loss", "head", "uncertainty"):
            assert torch.equal(both[0][name], both[1][name]), (number, name)
        assert not torch.equal(both[0]["images"], both[1]["images"])
    assert len((tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    about = results["introspection"]
    assert (about["train_images_read"], about["held_out_images_read"]) == (1512, 168)
    assert results["final"]["R-AUROC search"] > results["final"]["R-AUROC similarity"]


def test_a_batch_that_does_not_divide_is_an_error(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | place).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--batch-size 33 \(over all processes\) does not divide by 2 processes"):
        train_dml.main(["--batch-size", "33"])
    assert not list(in_tmp.iterdir())
