"""train_cls.py as it is run: every method learns, the run directory holds what it should, mistakes end with code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_cls
from idml.config_cls import METHODS
from idml.errors import TrainingError, UserError, run_main
from idml.models import IntrospectiveClassifier
from idml.run import Run
from idml.runtime import seed_everything
from idml.tables import print_table

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "loss_20_steps.json"
TWENTY_STEPS = (
    "--model",
    "resnet8_cifar",
    "--max-steps",
    "20",
    "--lr",
    "0.05",
    "--schedule",
    "cosine",
    "--log-every",
    "1",
    "--val-fraction",
    "0",
)


def read_tensorboard(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def step_losses(run: Path) -> list[float]:
    return [event.value for event in read_tensorboard(run).Scalars("step/loss")]


WITH_ISM = [method for method, (ism, _) in METHODS.items() if ism != "off"]
RELEASED = {f"{method}, released": ["--method", method, "--ism", "released"] for method in WITH_ISM}
GOLDEN_RUNS = {method: ["--method", method] for method in METHODS} | RELEASED


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 20 steps of each of the six methods, and of those with ISM by the released formula; none held out."""
    base = tmp_path_factory.mktemp("runs")
    for name, options in GOLDEN_RUNS.items():
        train_cls.main([*options, *TWENTY_STEPS, "--output-dir", str(base / name)])
    return {name: base / name for name in GOLDEN_RUNS}


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_improve(runs: dict[str, Path], method: str) -> None:
    losses = step_losses(runs[method])
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])


@pytest.mark.parametrize("method", GOLDEN_RUNS)
def test_the_loss_curve_has_not_moved(runs: dict[str, Path], method: str) -> None:
    """A refactor must not change the losses. To store new ones after an intended change: python -m tests.golden"""
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[method]
    losses = step_losses(runs[method])
    np.testing.assert_allclose(losses[:2], expected[:2], rtol=2e-4)
    # Processors add in another order, and twenty steps amplify that.
    np.testing.assert_allclose(losses, expected, rtol=1e-2)


@pytest.mark.parametrize("method", ["ism", "idml-mixup", "idml-cutmix"])
def test_the_uncertainty_head_was_trained(runs: dict[str, Path], method: str) -> None:
    seed_everything(1)
    fresh = IntrospectiveClassifier("resnet8_cifar", 10, uncertainty_dim=128).state_dict()
    trained = torch.load(runs[method] / "checkpoints/last.pt", weights_only=True)["model"]
    name = "uncertainty_head.weight"
    assert 0.2 < trained["uncertainty_head.gain"] < 5 and trained["uncertainty_head.gain"] != 1
    assert ((trained[name] - fresh[name]).abs().sum(1) > 1e-3).float().mean() > 0.4


def test_ism_moves_the_losses(runs: dict[str, Path]) -> None:
    for plain, introspective in (("baseline", "ism"), ("mixup", "idml-mixup"), ("cutmix", "idml-cutmix")):
        difference = np.abs(np.subtract(step_losses(runs[plain]), step_losses(runs[introspective])))
        assert difference.max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_run_directory(runs: dict[str, Path], method: str) -> None:
    run = runs[method]
    lines = read_lines(run)
    assert [line["epoch"] for line in lines] == [1]
    measured = lines[0]
    assert measured["step"] == 20
    assert {"top1", "top5", "loss", "nll", "ece", "train_loss", "images_per_second", "lr"} <= set(measured)
    uncertainties = {
        "uncertainty_train_clean",
        "uncertainty_train_mixed",
        "uncertainty_test",
        "active_uncertainty_units",
    }
    assert uncertainties <= set(measured) if METHODS[method][0] != "off" else not uncertainties & set(measured)
    if METHODS[method][0] == "off":
        assert measured["loss"] == pytest.approx(measured["nll"])
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["final"] == measured
    assert results["best"] == measured | {"picked_on": "test set"}
    assert {"versions", "git_commit", "command", "seed", "wall_seconds", "hardware"} <= set(results)
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.pt", "last-1.pt", "best.pt"}
    assert not list(run.rglob("*.tmp"))


def test_the_checkpoint_gives_the_reported_figure(runs: dict[str, Path], fashion: dict[str, np.ndarray]) -> None:
    """Rebuilt from the file alone, by hand."""
    run = runs["idml-cutmix"]
    checkpoint = torch.load(run / "checkpoints/last.pt", weights_only=True)
    config, preprocessing = checkpoint["config"], checkpoint["preprocessing"]
    assert checkpoint["classes"][8] == "Bag"
    model = IntrospectiveClassifier(config["model"], 10, uncertainty_dim=config["uncertainty_dim"], ism=config["ism"])
    model.load_state_dict(checkpoint["model"])
    pixels = torch.from_numpy(np.pad(fashion["test_images"], ((0, 0), (2, 2), (2, 2)))).float().div(255)
    images = (pixels[:, None].expand(-1, 3, -1, -1) - preprocessing["mean"][0]) / preprocessing["std"][0]
    with torch.no_grad():
        predicted = model.eval()(images).logits.argmax(1).numpy()
    reported = json.loads((run / "results.json").read_text(encoding="utf-8"))["final"]["top1"]
    assert (predicted == fashion["test_labels"]).mean() == pytest.approx(reported, abs=2e-3)


@pytest.mark.parametrize("method", ["baseline", "idml-mixup"])
def test_tensorboard_and_pictures(runs: dict[str, Path], method: str) -> None:
    run = runs[method]
    log = read_tensorboard(run)
    tags = log.Tags()
    assert {"top1", "nll", "ece", "train_loss", "step/loss", "step/lr"} <= set(tags["scalars"])
    assert log.Scalars("top1")[0].value == pytest.approx(
        json.loads((run / "metrics.jsonl").read_text(encoding="utf-8"))["top1"]
    )
    mixed = method != "baseline"
    assert ("mixed training images" in tags["images"]) == mixed == (run / "pictures/mixed.png").exists()
    assert "most and least uncertain test images" in tags["images"]
    assert any(tag.endswith("/wrong") for tag in tags["histograms"])
    with Image.open(run / "pictures/uncertain.png") as picture:
        assert picture.size[0] > 8 * 96
        assert np.asarray(picture).std() > 10


def test_the_saved_config_repeats_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    first = runs["idml-mixup"]
    train_cls.main(["--config", str(first / "config.yaml"), "--output-dir", str(tmp_path / "again")])
    assert step_losses(tmp_path / "again") == step_losses(first)
    saved = [yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) for run in (first, tmp_path / "again")]
    assert {key for key in saved[0] if saved[0][key] != saved[1][key]} == {"output_dir"}


def test_the_table_of_runs(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    print_table([str(runs["baseline"]), str(runs["idml-cutmix"])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| baseline") and lines[3].startswith("| idml-cutmix")
    assert len({line.count("|") for line in lines[:4]}) == 1
    top1 = json.loads((runs["idml-cutmix"] / "results.json").read_text(encoding="utf-8"))["final"]["top1"]
    assert f"{top1:.1%}" in lines[3]
    with pytest.raises(UserError, match="not a finished run"):
        print_table(["nowhere"])


DIGITS = ("--model", "resnet8_cifar", "--dataset", "digits", "--epochs", "2", "--crop-padding", "0")
SMALL = (*DIGITS, "--max-steps", "4", "--no-introspect")


@pytest.mark.parametrize(
    "options",
    [
        ("--ism", "released"),
        ("--ema-decay", "0.9"),
        ("--label-smoothing", "0.1", "--no-decay-bn-bias"),
        ("--schedule", "step", "--lr-milestones", "1", "--warmup-epochs", "0.05"),
        ("--batch-size", "33", "--mix", "mixup"),
        ("--deterministic", "--seed", "3"),
    ],
    ids=" ".join,
)
def test_options_run_on_digits(tmp_path: Path, options: tuple[str, ...]) -> None:
    results = train_cls.main([*SMALL, *options, "--output-dir", str(tmp_path / "run")])
    assert np.isfinite(results["final"]["nll"])
    assert results["final"]["step"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(image_folder: Path, tmp_path: Path, precision: str) -> None:
    """On few and small images: processors without the instructions emulate these types very slowly."""
    results = train_cls.main(
        [
            "--dataset",
            "folder",
            "--no-introspect",
            "--data-dir",
            str(image_folder),
            "--image-size",
            "16",
            "--model",
            "resnet8_cifar",
            "--batch-size",
            "12",
            "--max-steps",
            "2",
            "--precision",
            precision,
            "--output-dir",
            str(tmp_path / "run"),
        ]
    )
    assert np.isfinite(results["final"]["nll"])


HELD_OUT = (*DIGITS, "--max-steps", "36", "--method", "ism", "--val-fraction", "0.2")


@pytest.fixture(scope="module")
def introspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a fifth of its images held out, so it ends with an introspection."""
    run = tmp_path_factory.mktemp("introspected") / "run"
    train_cls.main([*HELD_OUT, "--output-dir", str(run)])
    return run


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_validation_split_picks_the_best_epoch(introspected: Path) -> None:
    results = json.loads((introspected / "results.json").read_text(encoding="utf-8"))
    lines = read_lines(introspected)
    best = max(lines, key=lambda line: line["val_top1"])
    assert len(lines) == 2
    assert results["best"] == best | {"picked_on": "validation split"}
    assert results["final"] == lines[-1]


def test_an_introspection_follows_the_last_epoch(introspected: Path) -> None:
    results = json.loads((introspected / "results.json").read_text(encoding="utf-8"))
    first, final = read_lines(introspected)
    measured = {"error_auroc", "error_ece", "e_aurc", "coverage_at_5_risk"}
    assert measured <= set(final) and not measured & set(first), "of the last epoch alone"
    assert final["error_auroc"] > final["error_auroc_max_softmax"] + 0.02 and final["error_ece"] < 0.15
    about = results["introspection"]
    assert (about["train_images_read"], about["held_out_images_read"]) == (1154, 288), "all of them"
    assert about["error_auroc"] > about["error_auroc_free"]
    log = read_tensorboard(introspected)
    assert [event.value for event in log.Scalars("error_auroc")] == pytest.approx([final["error_auroc"]])
    assert "reliability of P(wrong) on the test images" in log.Tags()["images"]
    assert (introspected / "pictures/reliability.png").exists()


def test_the_introspection_leaves_the_network_as_it_was(introspected: Path, tmp_path: Path) -> None:
    train_cls.main([*HELD_OUT, "--no-introspect", "--output-dir", str(tmp_path / "run")])
    stored = [torch.load(run / "checkpoints/last.pt", weights_only=True) for run in (introspected, tmp_path / "run")]
    assert "introspection" in stored[0] and "introspection" not in stored[1]
    for name, value in stored[1]["model"].items():
        assert torch.equal(value, stored[0]["model"][name]), name
    finals = [read_lines(run)[-1] for run in (introspected, tmp_path / "run")]
    same = {name: value for name, value in finals[1].items() if "second" not in name}
    assert {"top1", "nll", "val_top1", "uncertainty_test"} <= set(same) and "error_auroc" not in same
    assert same == {name: finals[0][name] for name in same}


def test_a_stored_introspection_gives_the_reported_figures(introspected: Path, tmp_path: Path) -> None:
    checkpoint = str(introspected / "checkpoints/last.pt")
    metrics = train_cls.main(["--eval-only", "--checkpoint", checkpoint, "--output-dir", str(tmp_path / "out")])
    final = read_lines(introspected)[-1]
    assert "error_auroc" in metrics
    assert metrics == pytest.approx({name: final[name] for name in metrics})


def test_an_introspection_without_held_out_images_is_not_calibrated(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", "folder", "--data-dir", str(image_folder), "--image-size", "32", "--model", "resnet8_cifar"]
    options += ["--batch-size", "12", "--max-steps", "1", "--val-fraction", "0", "--output-dir", str(tmp_path / "run")]
    results = train_cls.main([*options, "--introspect"])
    said = capsys.readouterr().out
    assert "warning: no images were held out (--val-fraction), so P(wrong) will not be calibrated" in said
    assert "not calibrated: no images were held out" in said
    assert results["introspection"]["held_out_images_read"] == 0 and "error_auroc" in results["final"]


def test_nothing_is_introspected_where_nothing_is_held_out(runs: dict[str, Path]) -> None:
    assert json.loads((runs["ism"] / "results.json").read_text(encoding="utf-8"))["introspection"] is None
    assert "introspection" not in torch.load(runs["ism"] / "checkpoints/last.pt", weights_only=True)
    assert "error_auroc" not in read_lines(runs["ism"])[-1] and "error_auroc_max_softmax" in read_lines(runs["ism"])[-1]


def test_a_folder_of_images_trains_with_workers(image_folder: Path, tmp_path: Path) -> None:
    results = train_cls.main(
        [
            "--dataset",
            "folder",
            "--no-introspect",
            "--data-dir",
            str(image_folder),
            "--image-size",
            "32",
            "--model",
            "resnet8_cifar",
            "--batch-size",
            "9",
            "--epochs",
            "2",
            "--workers",
            "1",
            "--output-dir",
            str(tmp_path / "run"),
        ]
    )
    assert results["final"]["step"] == 8
    assert "top5" not in results["final"], "there are three classes"


def test_a_model_of_fixed_input_size_gets_the_right_one(image_folder: Path, tmp_path: Path) -> None:
    results = train_cls.main(
        [
            "--dataset",
            "folder",
            "--no-introspect",
            "--data-dir",
            str(image_folder),
            "--image-size",
            "48",
            "--model",
            "vit_tiny_patch16_224",
            "--max-steps",
            "1",
            "--batch-size",
            "4",
            "--output-dir",
            str(tmp_path / "run"),
        ]
    )
    assert results["final"]["step"] == 1


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()  # what was printed before does not count
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: train_cls.main(arguments))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "epoch" not in captured.out
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "resnet20_cifr"), "did you mean resnet20_cifar"),
        (("--method", "idml-cutmx"), "did you mean idml-cutmix"),
        (("--mix-prob", "1.5"), "between 0 and 1, got 1.5"),
        (("--batch-size", "4501"), "--batch-size 4501 is larger than the 4500 training images"),
        (("--dataset", "folder", "--data-dir", "nowhere", "--val-fraction", "0.1"), "no folder nowhere"),
        (("--learning-rate", "1"), "unknown option --learning-rate"),
    ],
)
def test_a_mistake_ends_with_one_line_and_nothing_written(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in error_line(capsys, *arguments)
    assert not list(in_tmp.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_asked_for_and_absent(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda" in error_line(capsys, "--device", "cuda")
    assert not list(in_tmp.iterdir())


def test_a_finished_run_is_not_overwritten(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["baseline"]
    before = (run / "metrics.jsonl").read_bytes()
    assert "already holds a run" in error_line(capsys, "--output-dir", str(run))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_diverging_run_stops_with_step_rate_and_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"non-finite loss .* at step \d+, learning rate 1e\+20.*last\.pt"):
        train_cls.main([*SMALL, "--max-steps", "40", "--lr", "1e20", "--schedule", "step", "--output-dir", str(run)])
    state = torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert not (run / "results.json").exists()


def test_print_config_trains_nothing(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cls.main(["--print-config", "--method", "mixup", "--lr", "0.3"]) is None
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["method"], printed["lr"], printed["ism"]) == ("mixup", 0.3, "off")
    assert not list(in_tmp.iterdir())


def test_the_script_as_a_program(in_tmp: Path) -> None:
    """From a shell: a bad flag gives one line and code 2; output that is no terminal has no progress bar."""
    command = [sys.executable, str(ROOT / "train_cls.py")]
    bad = subprocess.run([*command, "--epoch", "3"], capture_output=True, text=True, timeout=120)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: unknown option --epoch; did you mean epochs")
    assert bad.stderr.count("\n") == 1
    good = subprocess.run([*command, *SMALL, "--max-steps", "2"], capture_output=True, text=True, timeout=300)
    assert good.returncode == 0, good.stderr
    assert "it/s" not in good.stderr
    assert "Traceback" not in good.stderr
    directories = list((in_tmp / "runs").iterdir())
    assert len(directories) == 1
    assert str(Path("runs") / directories[0].name) in good.stdout


def test_an_unwritable_output_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    from idml.config_cls import ClsConfig

    with pytest.raises(UserError, match="cannot write to the run directory"):
        Run(tmp_path / "file" / "run", ClsConfig())
