"""train_dml.py as it is run: the run directory holds what it should, mistakes end with code 2."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dml
from idml.backbones import create_backbone
from idml.config_dml import parse_dml_config
from idml.data.retrieval_datasets import read_retrieval_data
from idml.embedder import IntrospectiveEmbedder
from idml.errors import TrainingError, UserError, run_main
from idml.losses import LOSSES
from idml.runtime import seed_everything
from idml.tables import print_table
from tests.test_cars import write_one_file
from tests.test_retrieval_readers import write_cub, write_photo
from tests.test_train_cls import GOLDEN, step_losses

ROOT = Path(__file__).parents[1]
TINY = ["--model", "resnet8_cifar", "--image-size", "32", "--embedding-size", "64", "--bn-freeze", "0", "--warm", "0"]
TINY += ["--batch-size", "48", "--no-nmi", "--log-every", "1", "--no-verbose"]
ALL = ["--val-fraction", "0"]
PAIRS = ["--IPC", "4"]
LEARNING_RATES = {"Proxy_Anchor": "2e-3", "Proxy_NCA": "2e-3"}

TWENTY_STEPS = ["--model", "resnet8_cifar", "--image-size", "32", "--embedding-size", "128", "--bn-freeze", "0"]
TWENTY_STEPS += ["--warm", "0", "--epochs", "12", "--batch-size", "32", "--lr", "1e-3", "--loss-lr-factor", "10"]
TWENTY_STEPS += ["--lr-decay-step", "6", "--max-steps", "20", "--log-every", "1", "--val-fraction", "0", "--no-nmi"]
GOLDEN_DML = {
    "Proxy_Anchor, plain": ["--ism", "off"],
    "MS, plain": ["--ism", "off", "--loss", "MS", "--IPC", "4"],
    "Proxy_Anchor": ["--ism", "live"],
    "Proxy_Anchor, released": ["--ism", "released", "--mix", "mixup"],
}


def golden_options(name: str) -> list[str]:
    """Of a run whose losses are stored."""
    return [*TWENTY_STEPS, *GOLDEN_DML[name]]


@pytest.mark.parametrize("name", GOLDEN_DML)
def test_the_loss_curve_has_not_moved(tmp_path: Path, name: str) -> None:
    """Plain and released are as they have always been. To store new ones: python -m tests.golden"""
    train_dml.main([*golden_options(name), "--output-dir", str(tmp_path / "run")])
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    losses = step_losses(tmp_path / "run")
    np.testing.assert_allclose(losses[:2], expected[:2], rtol=2e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-2)


def read_tensorboard(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def options(loss: str, ism: str) -> list[str]:
    sampling = PAIRS if LOSSES[loss].needs_pairs else []
    return [*TINY, *ALL, *sampling, "--loss", loss, "--ism", ism, "--lr", LEARNING_RATES.get(loss, "2e-3")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve steps of ProxyAnchor, plain and introspective, on all training classes."""
    base = tmp_path_factory.mktemp("runs")
    for ism in ("off", "live", "released"):
        arguments = [*options("Proxy_Anchor", ism), "--nmi", "--max-steps", "12", "--output-dir", str(base / ism)]
        train_dml.main(arguments)
    return {ism: base / ism for ism in ("off", "live", "released")}


@pytest.mark.parametrize("ism", ["off", "live", "released"])
def test_run_directory(runs: dict[str, Path], ism: str) -> None:
    run = runs[ism]
    measured = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    figures = {
        "R@1",
        "R@2",
        "R@4",
        "R@8",
        "RP",
        "MAP@R",
        "NMI",
        "F1",
        "R-AUROC norm",
        "R-AUROC similarity",
        "train_loss",
    }
    figures |= {"other_families/R@1", "other_families/MAP@R"}
    assert figures <= set(measured)
    introspective = {"uncertainty_test", "ism_weight", "R-AUROC uncertainty"}
    assert introspective <= set(measured) if ism != "off" else not introspective & set(measured)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["final"] == measured
    assert {"versions", "git_commit", "command", "seed", "wall_seconds", "hardware", "processes"} <= set(results)
    assert results["best"]["picked_on"] == "test set"
    assert results["mix"] == "none" and results["introspection"] is None
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.pt", "last-1.pt", "best.pt"}
    assert not list(run.rglob("*.tmp"))


def test_the_variants_differ_and_live_trains_its_head(runs: dict[str, Path]) -> None:
    final = {ism: json.loads((run / "results.json").read_text(encoding="utf-8"))["final"] for ism, run in runs.items()}
    assert len({figures["train_loss"] for figures in final.values()}) == 3
    assert 0.5 < final["live"]["ism_weight"] < 1
    assert final["released"]["uncertainty_test"] == pytest.approx(1, abs=1e-5), "of unit length: inert"
    config, _ = parse_dml_config(options("Proxy_Anchor", "live"), description="")
    seed_everything(config.seed)
    fresh = train_dml.build_model(config).state_dict()
    trained = torch.load(runs["live"] / "checkpoints/last.pt", weights_only=True)["model"]
    for name in ("uncertainty_head.weight", "uncertainty_head.bias"):
        assert not torch.equal(fresh[name], trained[name]), f"{name} has learnt"


def test_the_checkpoint_gives_the_reported_figure(runs: dict[str, Path]) -> None:
    """Rebuilt from the file alone."""
    checkpoint = torch.load(runs["live"] / "checkpoints/last.pt", weights_only=True)
    config = checkpoint["config"]
    model = IntrospectiveEmbedder(
        config["model"],
        config["embedding_size"],
        config["uncertainty_dim"],
        ism="live",
    )
    model.load_state_dict(checkpoint["model"])
    data = read_retrieval_data(parse_dml_config(options("Proxy_Anchor", "live"), description="")[0])
    images = torch.from_numpy(data.test.images).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(checkpoint["preprocessing"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        semantic = model.eval()((images - mean) / std).semantic
    similarity = (semantic @ semantic.T).fill_diagonal_(-1)
    labels = torch.from_numpy(data.test.labels)
    recall = (labels[similarity.argmax(1)] == labels).float().mean().item()
    reported = json.loads((runs["live"] / "results.json").read_text(encoding="utf-8"))["final"]["R@1"]
    assert recall == pytest.approx(reported, abs=2e-3)
    assert checkpoint["loss"]["loss.proxies"].shape == (len(data.train.classes), 64)


def test_tensorboard_pictures_and_projector(runs: dict[str, Path]) -> None:
    run = runs["live"]
    log = read_tensorboard(run)
    assert len(log.Scalars("step/loss")) == 12
    assert log.Scalars("R@1")[0].value == pytest.approx(
        json.loads((run / "metrics.jsonl").read_text(encoding="utf-8"))["R@1"]
    )
    assert {"test queries and their nearest", "test embeddings"} <= set(log.Tags()["images"])
    with Image.open(run / "pictures/neighbours.png") as picture:
        pixels = np.asarray(picture)
    frames = [(pixels == colour).all(2).sum() for colour in ((0x1A, 0x8F, 0x3C), (0xD0, 0x1F, 0x1F))]
    assert min(frames) > 100, "after twelve steps some neighbours are right and some wrong"
    assert (run / "pictures/projection.png").stat().st_size > 10_000
    projector = run / "tensorboard"
    settings = (projector / "projector_config.pbtxt").read_text()
    assert "sprite" in settings
    rows = next(projector.rglob("tensors.tsv")).read_text().splitlines()
    assert len(rows) == 1000
    assert len(rows[0].split("\t")) == 64
    assert len(next(projector.rglob("metadata.tsv")).read_text().splitlines()) == 1000
    with Image.open(next(projector.rglob("sprite.png"))) as sprite:
        assert sprite.width == 32 * 32


def test_eval_only(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train_dml.main(
        [
            "--eval-only",
            "--checkpoint",
            str(runs["live"] / "checkpoints/last.pt"),
            "--output-dir",
            str(tmp_path / "out"),
        ]
    )
    reported = json.loads((runs["live"] / "results.json").read_text(encoding="utf-8"))["final"]
    for name in ("R@1", "MAP@R", "R-AUROC uncertainty", "other_families/R@1"):
        assert metrics[name] == pytest.approx(reported[name], abs=2e-3), name
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    assert (tmp_path / "out/neighbours.png").exists()


@pytest.fixture(scope="module")
def introspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain run once more, but with a fifth of its classes held out, so it ends with an introspection."""
    run = tmp_path_factory.mktemp("introspected") / "run"
    train_dml.main([*HELD_OUT, "--output-dir", str(run)])
    return run


HELD_OUT = [*options("Proxy_Anchor", "off"), "--max-steps", "12", "--val-fraction", "0.2"]


def test_an_introspection_follows_the_last_epoch(introspected: Path) -> None:
    results = json.loads((introspected / "results.json").read_text(encoding="utf-8"))
    final = json.loads((introspected / "metrics.jsonl").read_text(encoding="utf-8"))
    assert results["final"] == final
    assert results["best"] == final | {"picked_on": "held-out training classes"}
    assert {"val_R@1", "val_MAP@R"} <= set(final)
    # Of a plain model too: the nearest neighbour's error from both images, and from the query alone.
    assert final["R-AUROC search"] > final["R-AUROC similarity"] + 0.05
    assert 0.5 < final["R-AUROC uncertainty"] < 1
    about = results["introspection"]
    assert (about["train_images_read"], about["held_out_images_read"]) == (1344, 336)
    log = read_tensorboard(introspected)
    assert [event.value for event in log.Scalars("R-AUROC search")] == pytest.approx([final["R-AUROC search"]])


def test_the_introspection_leaves_the_network_as_it_was(introspected: Path, tmp_path: Path) -> None:
    train_dml.main([*HELD_OUT, "--no-introspect", "--output-dir", str(tmp_path / "run")])
    stored = [torch.load(run / "checkpoints/last.pt", weights_only=True) for run in (introspected, tmp_path / "run")]
    assert "introspection" in stored[0] and "introspection" not in stored[1]
    for part in ("model", "loss"):
        for name, value in stored[1][part].items():
            assert torch.equal(value, stored[0][part][name]), name
    finals = [json.loads((run / "metrics.jsonl").read_text()) for run in (introspected, tmp_path / "run")]
    same = {name: value for name, value in finals[1].items() if "second" not in name}
    assert {"R@1", "val_R@1", "R-AUROC similarity"} <= set(same) and "R-AUROC search" not in same
    assert same == {name: finals[0][name] for name in same}


def test_a_stored_introspection_gives_the_reported_figures(introspected: Path, tmp_path: Path) -> None:
    checkpoint = str(introspected / "checkpoints/last.pt")
    metrics = train_dml.main(["--eval-only", "--checkpoint", checkpoint, "--output-dir", str(tmp_path / "out")])
    final = json.loads((introspected / "metrics.jsonl").read_text(encoding="utf-8"))
    assert "R-AUROC search" in metrics
    assert metrics == pytest.approx({name: final[name] for name in metrics}, abs=1e-6)


def test_an_introspection_without_held_out_classes_is_not_calibrated(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_six_classes(image_folder, tmp_path / "classes")
    arguments = ["--dataset", "folder", "--data-dir", str(folder), "--image-size", "32", "--model", "resnet8_cifar"]
    arguments += [*ALL, "--introspect", "--batch-size", "6", "--max-steps", "1", "--ks", "1", "--no-nmi"]
    results = train_dml.main([*arguments, "--output-dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "warning: no classes were held out (--val-fraction), so P(wrong) will not be calibrated" in said
    assert "not calibrated: no classes were held out" in said
    assert results["introspection"]["held_out_images_read"] == 0


def test_too_few_classes_to_hold_any_out(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for, it is an error; by default all are trained on, which is said."""
    folder = as_six_classes(image_folder, tmp_path / "classes")
    given = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "6", "--ks", "1"]
    error = error_line(capsys, *given, "--val-fraction", "0.2")
    assert "takes 4 training classes, got 3" in error and "--val-fraction 0 holds none out" in error
    with pytest.warns(UserWarning, match="all classes are trained on: .* takes 4 training classes, got 3"):
        data = read_retrieval_data(parse_dml_config(given, description="")[0])
    assert data.val is None and len(data.train.classes) == 3


def test_the_saved_config_repeats_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    train_dml.main(["--config", str(runs["live"] / "config.yaml"), "--output-dir", str(tmp_path / "again")])
    losses = [
        [e.value for e in read_tensorboard(run).Scalars("step/loss")] for run in (runs["live"], tmp_path / "again")
    ]
    assert losses[0] == losses[1]


def test_the_table_of_runs(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    print_table([str(runs["off"]), str(runs["live"])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| Proxy_Anchor ") and lines[3].startswith("| Proxy_Anchor + ISM live")
    assert len({line.count("|") for line in lines[:4]}) == 1
    recall = json.loads((runs["live"] / "results.json").read_text(encoding="utf-8"))["final"]["R@1"]
    assert f"{recall:.1%}" in lines[3]


@pytest.mark.parametrize(
    "extra",
    [
        ("--mix", "cutmix"),
        ("--mix", "none", "--l2-norm", "0"),
        ("--optimizer", "sgd", "--clip-value", "0"),
        ("--optimizer", "adam", "--pool", "avg"),
        ("--optimizer", "rmsprop", "--pool", "max", "--lr", "1e-4"),
        ("--bn-freeze", "1", "--warm", "1", "--epochs", "2", "--max-steps", "30"),
        ("--lone-queries", "exclude", "--ks", "1", "3", "100"),
        ("--deterministic", "--seed", "3"),
        ("--precision", "bf16", "--image-size", "16", "--max-steps", "1"),
    ],
    ids=" ".join,
)
def test_options_run(tmp_path: Path, extra: tuple[str, ...]) -> None:
    arguments = [*options("Proxy_Anchor", "live"), "--max-steps", "2", *extra, "--output-dir", str(tmp_path / "run")]
    results = train_dml.main(arguments)
    assert np.isfinite(results["final"]["train_loss"])
    if "--ks" in extra:
        assert "R@100" in results["final"]


def test_a_pair_loss_with_random_batches_of_many_classes_warns() -> None:
    for extra, warned in ((["--loss", "MS"], True), (["--loss", "MS", "--IPC", "4"], False), ([], False)):
        config, _ = parse_dml_config([*TINY, *ALL, *extra], description="")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_retrieval_data(config)
        assert any("others of its class on average: --IPC 4" in str(w.message) for w in caught) == warned, extra


def test_every_epoch_is_logged_and_some_are_evaluated(tmp_path: Path) -> None:
    arguments = [*options("Proxy_Anchor", "off"), "--batch-size", "840", "--epochs", "3", "--eval-every", "2"]
    arguments += ["--image-size", "16"]
    results = train_dml.main([*arguments, "--output-dir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert ["R@1" in line for line in lines] == [False, True, True]
    assert results["best"]["R@1"] == max(line["R@1"] for line in lines[1:])


def test_warm_up_trains_the_heads_only(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*options("Proxy_Anchor", "live"), "--warm", "1", "--max-steps", "3", "--output-dir", str(run)]
    train_dml.main(arguments)
    config, _ = parse_dml_config(options("Proxy_Anchor", "live"), description="")
    seed_everything(config.seed)
    fresh = train_dml.build_model(config).state_dict()
    trained = torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]
    moved = {name for name in fresh if not name.endswith(("mean", "var", "num_batches_tracked", "gain"))}
    moved = {name.split(".")[0] for name in moved if not torch.equal(fresh[name], trained[name])}
    assert moved == {"semantic_head", "uncertainty_head"}


def test_frozen_batch_norm_takes_one_forward_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passes: list[int] = []
    forward = IntrospectiveEmbedder.forward

    def counting(self: IntrospectiveEmbedder, images: torch.Tensor) -> object:
        if torch.is_grad_enabled():
            passes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(IntrospectiveEmbedder, "forward", counting)
    shared = [*options("Proxy_Anchor", "live"), "--max-steps", "1", "--mix", "mixup"]
    train_dml.main([*shared, "--bn-freeze", "1", "--output-dir", str(tmp_path / "frozen")])
    assert passes == [96]
    passes.clear()
    train_dml.main([*shared, "--bn-freeze", "0", "--output-dir", str(tmp_path / "live")])
    assert passes == [48, 48]


def test_both_ways_give_the_same_loss_where_batch_norm_is_frozen(tmp_path: Path) -> None:
    seed_everything(1)
    model = IntrospectiveEmbedder("resnet8_cifar", 16).eval()
    images = torch.rand(2, 6, 3, 32, 32)
    together = train_dml.Parts(model, model)(images[0], images[1])
    for part, output in zip(images, together, strict=True):
        for name, column in output._asdict().items():
            torch.testing.assert_close(column, getattr(model(part), name), rtol=1e-5, atol=1e-6)


def as_six_classes(image_folder: Path, folder: Path) -> Path:
    """The classes of both splits as classes of their own below ``folder``."""
    folder.mkdir()
    for split in ("train", "val"):
        for source in (image_folder / split).iterdir():
            source.rename(folder / f"{source.name}-{split}")
    return folder


def test_a_folder_of_photos_trains_with_weights_from_a_file(image_folder: Path, tmp_path: Path) -> None:
    folder = as_six_classes(image_folder, tmp_path / "classes")
    torch.manual_seed(7)
    backbone = create_backbone("resnet8_cifar")
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    arguments = [
        "--dataset",
        "folder",
        "--data-dir",
        str(folder),
        "--image-size",
        "32",
        "--model",
        "resnet8_cifar",
        *ALL,
    ]
    arguments += ["--pretrained", str(tmp_path / "weights.safetensors"), "--batch-size", "6", "--epochs", "1"]
    arguments += ["--warm", "1", "--workers", "1", "--ks", "1", "--loss", "MS", "--IPC", "3"]
    results = train_dml.main([*arguments, "--output-dir", str(tmp_path / "run")])
    assert 0 <= results["final"]["R@1"] <= 1
    trained = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["model"]
    assert torch.equal(trained["backbone.conv1.weight"], backbone.state_dict()["conv1.weight"]), "--warm 1 of 1 epoch"


def write_published(root: Path, name: str) -> None:
    """Some 126 training and 12 test images of a published data set, in its layout below ``root``."""
    if name == "cub":
        write_cub(root / "CUB_200_2011", numbers=(*range(1, 43), *range(101, 105)))
    elif name == "cars":
        write_one_file(root / "cars196", classes=[*range(1, 64), *range(1, 64), *(list(range(99, 105)) * 2)])
    else:
        for file, count, first in (("Ebay_train.txt", 126, 0), ("Ebay_test.txt", 12, 126)):
            lines = ["image_id class_id super_class_id path"]
            for number in range(first + 1, first + 1 + count):
                label = (number + 1) // 2
                lines.append(f"{number} {label} 1 bicycle_final/{label}_{number}.JPG")
                write_photo(root / "Standford_Online_Products" / f"bicycle_final/{label}_{number}.JPG", label)
            (root / "Standford_Online_Products" / file).write_text("\n".join(lines) + "\n")


SHARED = "--gpu -1 --loss Proxy_Anchor --model resnet50 --embedding-size 512 --batch-size 120 --warm 5 --bn-freeze 1"
PUBLISHED = {
    "cub": "--lr 6e-4 --dataset cub --lr-decay-step 5",
    "cars": "--lr 2.5e-4 --dataset cars --lr-decay-step 10",
    "sop": "--lr 6e-4 --dataset SOP --lr-decay-step 10 --lr-decay-gamma 0.25",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_commands_run(in_tmp: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Six epochs of one step, five of them warm-up, on few small images: the flags are the authors' own."""
    write_published(in_tmp / "data", name)
    less = ["--epochs", "6", "--image-size", "32", "--workers", "1", "--cache-dir", "cache", "--no-verbose"]
    results = train_dml.main([*f"{SHARED} {PUBLISHED[name]}".split(), *less])
    captured = capsys.readouterr()
    assert "--gpu -1: there is no GPU here; training on the CPU" in captured.out
    assert "starts from random weights" in captured.err
    assert "is not the full" in captured.err
    assert results["final"]["epoch"] == 6
    assert {"R@1", "RP", "MAP@R", "NMI"} <= set(results["final"])
    assert ("R@10" in results["final"]) == (name == "sop")
    assert (results["dataset"], results["loss"], results["ism"]) == (name, "Proxy_Anchor", "live")


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()  # what was printed before does not count
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: train_dml.main(arguments))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert "epoch" not in captured.out
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--loss", "ProxyAnchor"), "did you mean Proxy_Anchor"),
        (("--model", "resnet50x"), "did you mean resnet50"),
        (("--batch-size", "99999"), "is larger than the"),
        (("--batch-size", "120", "--IPC", "7"), "not a multiple of --IPC 7"),
        (("--ks", "100000"), "each query has only"),
        (("--dataset", "cub", "--data-dir", "nowhere"), "nowhere"),
        (("--dataset", "csv"), "needs --csv FILE"),
        (("--dataset", "emoji"), "--data-dir"),
        (("--bn-freeze", "2"), "between 0 and 1, got 2"),
        (("--gpu", "5"), "--gpu 5"),
        (("--eval-only",), "--eval-only needs --checkpoint"),
        (("--warmup", "5"), "unknown option --warmup"),
    ],
)
def test_a_mistake_ends_with_one_line_and_nothing_written(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in error_line(capsys, "--model", "resnet8_cifar", *arguments)
    assert not list(in_tmp.iterdir())


def test_a_diverging_run_stops(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*options("Proxy_Anchor", "live"), "--optimizer", "sgd", "--lr", "1e20", "--clip-value", "0"]
    with pytest.raises(TrainingError, match=r"non-finite .* at step \d+, learning rate 1e\+20.*last\.pt"):
        train_dml.main([*arguments, "--max-steps", "20", "--output-dir", str(run)])
    state = torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert not (run / "results.json").exists()


def test_all_gpus_are_taken_through_torchrun(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    """Where torch reports several GPUs, the command replaces itself by torchrun with a process for each."""
    started: list[list[str]] = []

    class Replaced(Exception):
        pass

    def execv(program: str, command: list[str]) -> None:
        started.append(command)
        raise Replaced

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("os.execv", execv)
    command = ["--gpu", "-1", "--loss", "Proxy_Anchor", "--batch-size", "120"]
    with pytest.raises(Replaced):
        train_dml.main(command)
    assert "--nproc-per-node=4" in started[0]
    assert started[0][-len(command) - 1 :] == [str(ROOT / "train_dml.py"), *command]
    with pytest.raises(UserError, match="does not divide by 4 GPUs"):
        train_dml.main(["--gpu", "-1", "--batch-size", "121"])


def test_print_config_trains_nothing(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_dml.main(["--print-config", "--ism", "off", "--lr", "0.3"]) is None
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["ism"], printed["mix"], printed["lr"]) == ("off", "none", 0.3)
    assert not list(in_tmp.iterdir())


def test_the_script_as_a_program(in_tmp: Path) -> None:
    command = [sys.executable, str(ROOT / "train_dml.py")]
    bad = subprocess.run([*command, "--epoch", "3"], capture_output=True, text=True, timeout=120)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: unknown option --epoch; did you mean epochs")
    assert bad.stderr.count("\n") == 1
    good = subprocess.run(
        [*command, *options("MS", "live"), "--max-steps", "2"], capture_output=True, text=True, timeout=300
    )
    assert good.returncode == 0, good.stderr
    assert "Traceback" not in good.stderr and "it/s" not in good.stderr
    assert len(list((in_tmp / "runs").iterdir())) == 1
