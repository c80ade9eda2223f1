"""Options of train_cls.py beyond the methods: evaluation alone, accumulation, weights from files, wandb."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import train_cls
from idml.config_cls import parse_cls_config
from idml.errors import UserError
from idml.evaluation import average
from idml.models import IntrospectiveClassifier
from tests.test_train_cls import SMALL, error_line, step_losses


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs on the digits, the moving average of its weights evaluated."""
    directory = tmp_path_factory.mktemp("options") / "run"
    options = ["--dataset", "digits", "--model", "resnet8_cifar", "--epochs", "3", "--ema-decay", "0.9", "--lr", "0.05"]
    train_cls.main([*options, "--batch-size", "128", "--output-dir", str(directory)])
    return directory


def final(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["final"]


def test_eval_only_reprints_the_figures_of_the_run_exactly(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train_cls.main(["--eval-only", "--checkpoint", str(run / "checkpoints/last.pt")])
    assert metrics is not None
    assert {name: final(run)[name] for name in metrics} == metrics
    assert f"top1 {metrics['top1']:.4f}" in capsys.readouterr().out
    with (run / "evaluation/confusion.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows[1:]])
    assert rows[0][1:] == [row[0] for row in rows[1:]] == [str(digit) for digit in range(10)]
    assert matrix.sum() == 355
    assert matrix.trace() / matrix.sum() == pytest.approx(metrics["top1"])
    with Image.open(run / "evaluation/confusion.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_flip_averaging_changes_the_figures_but_little(run: Path, tmp_path: Path) -> None:
    checkpoint = ["--eval-only", "--checkpoint", str(run / "checkpoints/last.pt")]
    flipped = train_cls.main([*checkpoint, "--tta", "flip", "--output-dir", str(tmp_path)])
    assert flipped is not None
    assert flipped["nll"] != final(run)["nll"]
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["tta"] == "flip"


def test_averaged_outputs_have_the_mean_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    model = IntrospectiveClassifier("resnet8_cifar", 4, uncertainty_dim=3).eval()
    with torch.no_grad():
        outputs = [model(torch.randn(2, 3, 32, 32, generator=generator)) for _ in range(2)]
    mean = average(*outputs)
    expected = (outputs[0].logits.softmax(1) + outputs[1].logits.softmax(1)) / 2
    torch.testing.assert_close(mean.logits.exp(), expected)
    torch.testing.assert_close(mean.uncertainty, (outputs[0].uncertainty + outputs[1].uncertainty) / 2)


def test_eval_only_with_other_data_or_no_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(run / "checkpoints/last.pt")
    with pytest.raises(UserError, match=r"knows 10 classes \(0, 1, 2, \.\.\.\), the data has 10 \(T-shirt"):
        train_cls.main(["--eval-only", "--checkpoint", checkpoint, "--dataset", "fashion-mnist-mini"])
    with pytest.raises(UserError, match="does not fit the model"):
        train_cls.main(["--eval-only", "--checkpoint", checkpoint, "--model", "resnet14_cifar"])
    assert "--eval-only needs --checkpoint" in error_line(capsys, "--eval-only")
    assert "no such file" in error_line(capsys, "--eval-only", "--checkpoint", str(tmp_path / "none.pt"))


@pytest.mark.parametrize("method", ["ism", "idml-cutmix"])
def test_accumulated_parts_give_the_same_curve(tmp_path: Path, method: str) -> None:
    common = ["--dataset", "digits", "--model", "resnet8_cifar", "--method", method, "--bn-freeze", "--max-steps", "5"]
    common += ["--batch-size", "60", "--lr", "0.02", "--log-every", "1", "--no-introspect"]
    for parts in ("1", "4"):
        train_cls.main([*common, "--grad-accum", parts, "--output-dir", str(tmp_path / parts)])
    np.testing.assert_allclose(step_losses(tmp_path / "4"), step_losses(tmp_path / "1"), rtol=1e-4)


def test_batch_size_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config, _ = parse_cls_config(["--batch-size-per-gpu", "8", "--grad-accum", "2"], description="")
    assert config.batch_size == 48
    with pytest.raises(UserError, match="not both"):
        parse_cls_config(["--batch-size-per-gpu", "8", "--batch-size", "24"], description="")
    with pytest.raises(UserError, match=r"--batch-size 64 .* does not divide by 3 processes .* multiple of 3"):
        parse_cls_config([], description="")


def test_frozen_batch_norm_does_not_move(tmp_path: Path) -> None:
    train_cls.main([*SMALL, "--bn-freeze", "--output-dir", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["model"]
    assert torch.equal(state["backbone.bn1.weight"], torch.ones(16))
    assert torch.equal(state["backbone.bn1.running_mean"], torch.zeros(16))
    assert not torch.equal(state["backbone.conv1.weight"], timm.create_model("resnet8_cifar").conv1.weight)


def test_training_starts_from_the_weights_of_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(run / "checkpoints/last.pt")
    results = train_cls.main([*SMALL, "--pretrained", weights, "--lr", "1e-9", "--output-dir", str(tmp_path / "run")])
    assert results is not None
    before = torch.load(weights, weights_only=True)["model"]["backbone.conv1.weight"]
    after = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["model"]["backbone.conv1.weight"]
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    line = error_line(capsys, *SMALL, "--model", "resnet14_cifar", "--pretrained", weights)
    assert "does not fit the model" in line and "--pretrained-allow-missing" in line


def test_model_kwargs_reach_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kwargs = ["--model", "resnet_cifar", "--model-kwargs", "depth=14", "bottleneck=false"]
    train_cls.main([*SMALL, *kwargs, "--output-dir", str(tmp_path / "run")])
    names = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["model"]
    assert sum(name.endswith("conv2.weight") for name in names) == 6
    assert "cannot be made" in error_line(capsys, *SMALL, "--model-kwargs", "width=3")
    assert "expected name=value, got 'depth'" in error_line(capsys, *SMALL, "--model-kwargs", "depth")


def test_sync_bn_without_gpus_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sync-bn" in error_line(capsys, *SMALL, "--device", "cpu", "--sync-bn")


def test_wandb_without_its_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as caught:
        train_cls.run_main(lambda: train_cls.main([*SMALL, "--wandb", "--output-dir", str(tmp_path / "run")]))
    assert caught.value.code == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra `wandb` is not installed")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_cls.main([*SMALL, "--wandb", "--output-dir", str(tmp_path / "run")])
    offline = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(offline) == 1 and offline[0].stat().st_size > 1000


def test_the_run_directory_may_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = parse_cls_config(["--expname", "mine"], description="")
    assert config.output_dir == str(Path("runs/mine"))
    Path("saved.yaml").write_text(yaml.safe_dump({"expname": "mine", "output_dir": "runs/mine"}))
    assert parse_cls_config(["--config", "saved.yaml", "--output-dir", "x"], description="")[0].output_dir == "x"
    with pytest.raises(UserError, match="not both"):
        parse_cls_config(["--expname", "a", "--output-dir", "b"], description="")
