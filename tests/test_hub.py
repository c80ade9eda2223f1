"""torch.hub on a clone of this repository that is not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import train_tiny, write_photos

ROOT = Path(__file__).parents[1]

CODE = """
import sys, numpy as np, torch
clone, run = sys.argv[1:]
torch.hub.set_dir(clone + "/cache")
model = torch.hub.load(clone, "introspective", checkpoint=run, source="local", device="cpu")
import idml
assert idml.__file__.startswith(clone), idml.__file__
print(model.fingerprint, *model.predict(np.zeros((32, 32), np.uint8)).classes)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone has and an import needs."""
    root = tmp_path_factory.mktemp("hub") / "clone"
    for name in ("idml", "augment"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", root)
    return root


def test_a_trained_model_from_a_clone(clone: Path, tmp_path: Path) -> None:
    """In another process and another folder, where the clone comes before anything installed."""
    run = train_tiny("live", write_photos(tmp_path / "photos"), tmp_path / "run")
    command = [sys.executable, "-c", CODE, str(clone), str(run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fingerprint, name = done.stdout.split(maxsplit=1)
    assert len(fingerprint) == 16 and name.startswith("class ")


def test_fresh_models_take_a_step() -> None:
    torch.manual_seed(0)
    classifier = torch.hub.load(str(ROOT), "introspective_classifier", "resnet8_cifar", num_classes=3, source="local")
    output = classifier(torch.rand(4, 3, 32, 32))
    torch.nn.functional.cross_entropy(output.introspective_logits, torch.tensor([0, 1, 2, 0])).backward()
    assert classifier.uncertainty_head.weight.grad.abs().sum() > 0 and output.logits.shape == (4, 3)
    embedder = torch.hub.load(
        str(ROOT), "introspective_embedder", "resnet8_cifar", embedding_dim=16, ism="off", source="local"
    )
    assert embedder(torch.rand(4, 3, 32, 32)).semantic.shape == (4, 16)
