"""Loss prediction in the training scripts: options, calibration, what TensorBoard shows, what a checkpoint keeps."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_cls
import train_dml
from idml import IntrospectiveClassifier, UserError, uncertainty_score
from idml.checkpoint import read_checkpoint
from idml.config import dump_config
from idml.config_cls import parse_cls_config
from idml.config_dml import parse_dml_config
from idml.data.datasets import read_splits
from idml.data.image_dataset import ImageDataset
from idml.data.retrieval_data import hold_out_classes
from idml.data.retrieval_datasets import read_retrieval_data
from idml.metrics import selective_metrics
from idml.plots import reliability_plot, risk_coverage_plot
from tests.test_train_cls import step_losses

CLS = [
    "--dataset",
    "digits",
    "--model",
    "resnet8_cifar",
    "--image-size",
    "16",
    "--batch-size",
    "64",
    "--log-every",
    "1",
]
CLS += [
    "--method",
    "idml-mixup",
    "--max-steps",
    "60",
    "--epochs",
    "3",
    "--lr",
    "0.05",
    "--threads",
    "1",
    "--no-verbose",
]
DML = ["--model", "resnet8_cifar", "--image-size", "16", "--embedding-size", "32", "--batch-size", "48", "--warm", "0"]
DML += ["--bn-freeze", "0", "--no-nmi", "--max-steps", "12", "--ism", "live", "--lr", "2e-3", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "cls"
    train_cls.main([*CLS, "--val-fraction", "0.3", "--output-dir", str(path)])
    return path


def test_the_score_is_a_probability_calibrated_on_what_was_held_out(run: Path) -> None:
    checkpoint = read_checkpoint(run / "checkpoints/last.pt")
    config, _ = parse_cls_config(["--config", str(run / "config.yaml"), "--output-dir", "x"], description="")
    data = read_splits(config)
    assert data.val is not None
    assert checkpoint["model"]["calibration.fitted_on"] == len(data.val)
    model = IntrospectiveClassifier("resnet8_cifar", 10, uncertainty_dim=128, uncertainty_loss="loss-prediction").eval()
    model.load_state_dict(checkpoint["model"])

    def score(part: ImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
        assert part.images is not None
        pixels = torch.from_numpy(part.images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float().div(255)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.preprocessing.mean, data.preprocessing.std))
        with torch.no_grad():
            output = model((pixels - mean) / std)
        return uncertainty_score(output), output.logits.argmax(1) == torch.from_numpy(part.labels)

    held_out, right = score(data.val)
    assert ((held_out >= 0) & (held_out <= 1)).all()
    # A logistic regression with a constant says as many errors as there are, on what it was fitted to.
    assert held_out.mean().item() == pytest.approx(1 - right.double().mean().item(), abs=2e-3)
    scores, right = score(data.test)
    reported = json.loads((run / "results.json").read_text(encoding="utf-8"))["final"]
    expected = selective_metrics(scores, right)
    assert reported["error_auroc"] == pytest.approx(expected["error_auroc"], abs=1e-6)
    assert reported["e_aurc"] == pytest.approx(expected["e_aurc"], abs=1e-6)
    assert reported["uncertainty_test"] == pytest.approx(scores.mean().item(), abs=1e-6)
    # After sixty steps on digits it ranks errors far better than chance, and sees that mixed images are mixed.
    assert reported["error_auroc"] > 0.65
    assert reported["uncertainty_train_mixed"] > reported["uncertainty_train_clean"] + 0.05


def test_what_tensorboard_shows(run: Path) -> None:
    log = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    log.Reload()
    groups = {"all", "right", "wrong", "mixed training images"}
    assert {f"P(wrong) of test images/{group}" for group in groups} <= set(log.Tags()["histograms"])
    for name in ("risk and coverage on the test images", "reliability of P(wrong) on the test images"):
        assert len(log.Images(name)) == 3, name
    assert (run / "pictures/risk_coverage.png").exists() and (run / "pictures/reliability.png").exists()
    assert {"error_auroc", "e_aurc", "error_ece", "error_auroc_max_softmax"} <= set(log.Tags()["scalars"])


def test_evaluation_alone_gives_the_same_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train_cls.main(["--eval-only", "--checkpoint", str(run / "checkpoints/last.pt")])
    reported = json.loads((run / "results.json").read_text(encoding="utf-8"))["final"]
    assert found is not None
    for name in ("top1", "error_auroc", "e_aurc", "error_ece"):
        assert found[name] == pytest.approx(reported[name], abs=1e-6)
    flipped = train_cls.main(["--eval-only", "--checkpoint", str(run / "checkpoints/last.pt"), "--tta", "flip"])
    assert flipped is not None and 0 <= flipped["uncertainty_test"] <= 1


def test_a_checkpoint_from_before_there_was_loss_prediction(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_cls.main([*CLS, "--max-steps", "2", "--uncertainty-loss", "none", "--output-dir", str(path)])
    file = path / "checkpoints/last.pt"
    content = torch.load(file, weights_only=True)
    for name in ("uncertainty_loss", "uncertainty_share", "uncertainty_shifts"):
        del content["config"][name]
    torch.save(content, file)
    config, _ = parse_cls_config(["--eval-only", "--checkpoint", str(file)], description="")
    assert config.uncertainty_loss == "none"
    train_cls.main(["--eval-only", "--checkpoint", str(file)])
    config, _ = parse_cls_config(["--resume", str(path)], description="")
    assert config.uncertainty_loss == "none"


def test_the_images_for_the_head_alone_change_nothing_else(tmp_path: Path) -> None:
    """The first step's loss is of weights and images that they cannot have touched; without them training runs too."""
    losses = []
    for share in ("0", "0.5", "1"):
        path = tmp_path / share
        train_cls.main([*CLS, "--max-steps", "2", "--uncertainty-share", share, "--output-dir", str(path)])
        losses.append(step_losses(path)[0])
    assert losses[0] == losses[1] == losses[2]


def test_parts_of_a_batch_and_progressive_sizes(tmp_path: Path) -> None:
    train_cls.main([*CLS, "--max-steps", "2", "--grad-accum", "4", "--output-dir", str(tmp_path / "run")])


@pytest.mark.parametrize("ism", ["released", "off"])
@pytest.mark.parametrize("parse", [parse_cls_config, parse_dml_config])
def test_loss_prediction_needs_live(parse, ism: str) -> None:
    config, _ = parse(["--ism", ism, *(["--mix", "none"] if ism == "off" else [])], description="")
    assert config.uncertainty_loss == "none"
    with pytest.raises(UserError, match=f"trains the head of --ism live, and --ism is {ism}"):
        parse(["--ism", ism, "--mix", "none", "--uncertainty-loss", "loss-prediction"], description="")


@pytest.mark.parametrize("parse", [parse_cls_config, parse_dml_config])
def test_options(parse) -> None:
    config, _ = parse([], description="")
    assert config.uncertainty_loss == "loss-prediction"
    assert config.uncertainty_shifts == ["mixup", "cutmix", "blur", "noise", "crop"]
    with pytest.raises(UserError, match="got 'blurr'; did you mean blur"):
        parse(["--uncertainty-shifts", "blurr"], description="")
    with pytest.raises(UserError, match="--uncertainty-share: expected a value between 0 and 1, got 2"):
        parse(["--uncertainty-share", "2"], description="")
    with pytest.warns(UserWarning, match="--uncertainty-share 0.2 has no effect: no loss is predicted"):
        parse(["--uncertainty-loss", "none", "--uncertainty-share", "0.2"], description="")
    with pytest.warns(UserWarning, match=r"--uncertainty-shifts .* has no effect: no image is shown to the head alone"):
        parse(["--uncertainty-share", "0", "--uncertainty-shifts", "blur"], description="")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(["--uncertainty-shifts", "blur", "noise"], description="")


@pytest.mark.parametrize("parse", [parse_cls_config, parse_dml_config])
def test_another_variant_has_the_uncertainty_loss_of_its_own(tmp_path: Path, parse) -> None:
    file = tmp_path / "saved.yaml"
    file.write_text(dump_config(parse([], description="")[0]), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ism, expected in (("released", "none"), ("live", "loss-prediction")):
            config, _ = parse(["--config", str(file), "--ism", ism], description="")
            assert config.uncertainty_loss == expected
        config, _ = parse(["--config", str(file), "--ism", "live", "--uncertainty-loss", "none"], description="")
    assert config.uncertainty_loss == "none"


# --- retrieval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["Proxy_Anchor", "MS"])
def test_retrieval_calibrates_on_classes_held_out(tmp_path: Path, loss: str) -> None:
    path = tmp_path / "run"
    pairs = ["--IPC", "4"] if loss == "MS" else []
    train_dml.main([*DML, *pairs, "--loss", loss, "--val-fraction", "0.2", "--output-dir", str(path), "--no-verbose"])
    checkpoint = read_checkpoint(path / "checkpoints/last.pt")
    config, _ = parse_dml_config(["--config", str(path / "config.yaml"), "--output-dir", "x"], description="")
    data = read_retrieval_data(config)
    assert data.val is not None and len(data.val.classes) == 56 and len(data.train.classes) == 224
    for name in ("calibration", "search_calibration"):
        assert checkpoint["model"][f"{name}.fitted_on"] == len(data.val)
    assert checkpoint["model"]["directions"].shape == (224, 128)
    figures = json.loads((path / "results.json").read_text(encoding="utf-8"))["final"]
    assert figures["R-AUROC search"] > 0.55 and 0 < figures["uncertainty_test"] < 1
    again = train_dml.main(["--eval-only", "--checkpoint", str(path / "checkpoints/last.pt")])
    assert again is not None
    assert again["R-AUROC search"] == pytest.approx(figures["R-AUROC search"], abs=1e-6)
    if loss == "MS":
        assert checkpoint["loss"]["centres"].norm(dim=1).max() > 0.5


def dataset(labels: list[int]) -> ImageDataset:
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    classes = tuple(f"c{label}" for label in range(max(labels) + 1))
    return ImageDataset(labels=np.array(labels), classes=classes, images=images)


def test_held_out_classes_are_whole_and_apart() -> None:
    whole = dataset([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4])
    rest, val = hold_out_classes(whole, 0.4, seed=3)
    assert len(val.classes) == 2 and not set(rest.classes) & set(val.classes)
    assert set(rest.classes) | set(val.classes) == set(whole.classes)
    for part in (rest, val):
        assert part.images is not None and whole.images is not None
        for image, label in zip(part.images[:, 0, 0, 0], part.labels, strict=True):
            assert whole.classes[whole.labels[image]] == part.classes[label]
    assert len(rest) + len(val) == len(whole)
    assert hold_out_classes(whole, 0.4, seed=3)[1].classes == val.classes
    with pytest.raises(UserError, match="takes 4 training classes, got 3"):
        hold_out_classes(dataset([0, 1, 2]), 0.5, seed=0)
    with pytest.raises(UserError, match="none of the 2 held-out classes has two images"):
        hold_out_classes(dataset([0, 1, 2, 3]), 0.5, seed=0)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_plots_are_pictures_of_their_figures() -> None:
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(500, generator=generator)
    wrong = torch.rand(500, generator=generator) < chances
    for picture in (
        reliability_plot(chances, wrong, name="P(wrong)"),
        risk_coverage_plot({"P(wrong)": chances, "1 - max softmax": 1 - chances}, ~wrong),
    ):
        pixels = np.asarray(picture)
        assert pixels.shape[2] == 3 and pixels.min() < 50 and pixels.max() == 255
    other = np.asarray(reliability_plot(chances, ~wrong, name="P(wrong)"))
    assert (other != np.asarray(reliability_plot(chances, wrong, name="P(wrong)"))).any()
