"""``python -m idml info``: what is printed of each kind of model, and of what is none."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

import idml
from idml.commands.export import export
from idml.commands.info import info
from idml.errors import UserError
from tests.calibrated_models import write_calibrating_photos
from tests.tiny_models import train_tiny, write_searched

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/live, runs/retrieval (plain), and exports of the first: safetensors/, timm/."""
    root = tmp_path_factory.mktemp("info")
    train_tiny("live", write_calibrating_photos(root / "photos"), root / "runs" / "live")
    train_tiny("retrieval off", write_searched(root / "searched"), root / "runs" / "retrieval")
    for kind in ("safetensors", "timm"):
        export(["--checkpoint", str(root / "runs" / "live"), "--format", kind, "--out", str(root / kind)])
    return root


def described(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    info([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "runs" / "live"
    about = described(capsys, str(run))
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    checkpoint = torch.load(run / "checkpoints/last.pt", weights_only=True)
    model = idml.load(run)
    assert about["kind"] == "checkpoint to go on from" and about["task"] == "classification"
    assert about["bytes"] == (run / "checkpoints/last.pt").stat().st_size
    assert about["fingerprint"] == model.fingerprint
    assert about["classes"] == checkpoint["classes"] and about["dataset"] == "folder"
    assert about["parameters"]["all"] == sum(parameter.numel() for parameter in model.network.parameters())
    assert about["parameters"]["classifier"] == 3 * 64 + 3
    assert about["preprocessing"] == checkpoint["preprocessing"] | {
        "mean": list(checkpoint["preprocessing"]["mean"]),
        "std": list(checkpoint["preprocessing"]["std"]),
    }
    assert about["score"] == {"name": "P(wrong)", "calibrated_on": 108}
    found, introspection = about["introspection"], model.introspection
    assert introspection is not None
    assert (found["held_out"], found["fitted_on"], found["heads"], found["calibrated"]) == (108, 360, 5, True)
    assert [layer["channels"] for layer in found["layers"]] == [16, 32, 64] and found["features"] == 64
    assert found["vector"] == 5 * (16 + 32 + 64) + 64 == introspection.heads.mean.shape[0]
    wrong = introspection.held_wrong.numpy()
    assert found["error_rate"] == pytest.approx(wrong.mean())
    assert found["error_auroc"] == pytest.approx(roc_auc_score(wrong, introspection.held_p_wrong.numpy()))
    promise = introspection.promise(0.05, 0.95)
    assert found["promise"] == (None if promise is None else dataclasses.asdict(promise))
    assert about["run"]["figures"] == results["final"]
    assert (about["run"]["epochs"], about["run"]["steps"]) == (1, 2) and about["run"]["versions"] == results["versions"]


def test_the_same_by_any_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "runs" / "live"
    about = described(capsys, "--checkpoint", str(run))
    assert about == described(capsys, str(run / "checkpoints" / "last.pt"))
    capsys.readouterr()
    info(["--json", str(run)])
    assert json.loads(capsys.readouterr().out) == about


def test_exported_models(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = described(capsys, str(root / "runs" / "live"))
    for name, kind in (("safetensors", "exported"), ("timm", "exported, timm's layout")):
        about = described(capsys, str(root / name))
        assert about["kind"] == kind and about["bytes"] > 100_000 and "run" not in about
        differing = {key for key in about if about[key] != run.get(key)}
        assert differing == {"kind", "source", "bytes", "versions"}


def test_what_is_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info([str(root / "runs" / "live")])
    text = capsys.readouterr().out
    assert "ism (ISM live)" in text and "resnet8_cifar" in text
    assert "3 trained on: class 0, class 1, class 2\n" in text
    assert "P(wrong), calibrated on 108 images" in text
    assert "5 heads, fitted on 360 images, calibrated on 108 held-out images, error AUROC 0." in text
    assert "backbone.blocks.0 (16), backbone.blocks.1 (32), backbone.blocks.2 (64), the 64 features" in text
    assert "risk of 0.05 cannot be promised" in text or "at most 0.05 of the answers with P(wrong) up to" in text
    info([str(root / "runs" / "retrieval")])
    text = capsys.readouterr().out
    assert "none: a plain retrieval model has no uncertainty" in text and "16 semantic, no uncertainty" in text
    assert "none: see python -m idml introspect" in text
    assert "R@1" in text


def test_a_checkpoint_that_was_taken_out_of_its_run(root: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint = torch.load(root / "runs/live/checkpoints/last.pt", weights_only=True)
    bare = {key: checkpoint[key] for key in ("model", "config", "classes", "preprocessing")}
    torch.save(bare, tmp_path / "model.pt")
    about = described(capsys, str(tmp_path / "model.pt"))
    assert about["kind"] == "checkpoint" and about["run"]["versions"] is None and about["run"]["figures"] == {}
    info([str(tmp_path / "model.pt")])
    assert "none is finished" in capsys.readouterr().out


def test_what_is_no_checkpoint(root: Path, tmp_path: Path) -> None:
    state = torch.load(root / "runs/live/checkpoints/last.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "state.pt")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "state.safetensors")
    (tmp_path / "text.pt").write_text("no checkpoint", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("state.pt", "is not a checkpoint of train_cls.py or train_dml.py: it has no model, config"),
        ("state.safetensors", "is not a checkpoint"),
        ("text.pt", "is damaged, or holds more than"),
        ("empty", "expected a run directory with checkpoints/last.pt"),
        ("nothing", "no model at"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            info([str(tmp_path / name)])
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--checkpoint", "b"], ["--checkpoint=a", "b"]])
def test_not_one_checkpoint(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"expected (a|one) checkpoint"):
        info(arguments)


def test_as_a_command(root: Path) -> None:
    command = [sys.executable, "-m", "idml", "info"]
    done = subprocess.run([*command, str(root / "none")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: no model at") and done.stderr.count("\n") == 1


def test_help_and_tables_need_no_torch() -> None:
    """They must be there at once: torch and timm take seconds to import."""
    code = (
        "import sys, idml.__main__, idml.tables; idml.__main__.sys.argv = ['idml', '--help']; idml.__main__.main();"
        "loaded = {'torch', 'timm', 'numpy'} & set(sys.modules); assert not loaded, loaded;"
        "assert callable(idml.load) and 'torch' in sys.modules and idml.load.__module__ == 'idml.trained'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(dir(idml)) >= set(idml.__all__)
    with pytest.raises(AttributeError, match="no attribute 'embeddings'"):
        idml.embeddings  # noqa: B018
