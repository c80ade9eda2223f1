"""Run a training script, anybody's, and note when its optimizer steps: `bench_train.py` starts this.

    python timed_script.py RECORD.json STARTED [--images FILE.npz] [--register MODEL] [--old] -- SCRIPT ARGUMENTS...

RECORD gets the seconds from STARTED (of time.time()) to the end of each step. The script's own file is run as it is.
``--images`` puts arrays in the place of torchvision's CIFAR10, whose files are checksummed, so that scripts which read
that data set train on the images of the benchmark. ``--register`` makes one of our networks known to timm and
torchvision. ``--old`` is for CutMix-PyTorch, which would fail otherwise: without a GPU ``.cuda()`` leaves tensors where
they are, ``numpy.int`` is there again, and ``view`` copies where it must.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

SMALL = "pooled_linear"
"""A network that costs next to nothing, as one on a fast GPU does: what is left is loading and the loop."""


class PooledLinear(nn.Module):
    """The mean colours of 4 x 4 fields, and a linear layer; a model as timm and torchvision have them."""

    num_features = head_hidden_size = 48

    def __init__(self, num_classes: int = 10, **_options: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, num_classes)."""
        return self.fc(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))


def register(name: str) -> None:
    """Make a network of this project known to timm and to torchvision by its name."""
    import timm
    from torchvision.models import _api

    import idml.cifar_resnet  # noqa: F401  (registers with timm)

    def pooled_linear(pretrained: bool = False, **options: Any) -> nn.Module:
        return PooledLinear(options.get("num_classes", 10))

    if name == SMALL:
        pooled_linear.__module__ = "timm.models.pooled_linear"
        sys.modules[pooled_linear.__module__] = type(sys)(pooled_linear.__module__)
        timm.models.register_model(pooled_linear)

    def make(weights: None = None, num_classes: int = 10, **_options: Any) -> nn.Module:
        return timm.create_model(name, num_classes=num_classes)

    if name not in _api.list_models():
        make.__name__ = name
        _api.register_model(name)(make)


def as_before() -> None:
    """Let a script that was written for a GPU, and for torch and numpy of 2019, run with today's and without one."""
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_args, **_options: self  # type: ignore[method-assign]
        nn.Module.cuda = lambda self, *_args, **_options: self  # type: ignore[method-assign]
    if not hasattr(np, "int"):
        vars(np)["int"] = int
    view = torch.Tensor.view

    def view_or_reshape(self: Tensor, *shape: Any) -> Tensor:
        try:
            return view(self, *shape)
        except RuntimeError:  # of old, a transposed matrix compared with another came out contiguous
            return self.reshape(*shape)

    torch.Tensor.view = view_or_reshape  # type: ignore[assignment,method-assign]


def put_images(file: str) -> None:
    """Arrays in the place of CIFAR10's; the class does with them what torchvision's does."""
    import torchvision
    from PIL import Image
    from torch.utils.data import Dataset

    class Images(Dataset):
        def __init__(self, root: str = "", train: bool = True, transform: Any = None, **_options: Any) -> None:
            with np.load(file) as arrays:
                part = "train" if train else "test"
                self.data, self.targets = arrays[f"{part}_images"], arrays[f"{part}_labels"].tolist()
            self.transform = transform
            self.classes = [str(label) for label in range(10)]

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image: Any = Image.fromarray(self.data[index])
            return self.transform(image) if self.transform else image, self.targets[index]

    torchvision.datasets.CIFAR10 = Images


def main() -> None:
    record, started = sys.argv[1], float(sys.argv[2])
    split = sys.argv.index("--")
    options, script, arguments = sys.argv[3:split], sys.argv[split + 1], sys.argv[split + 2 :]
    steps: list[float] = []
    process = os.getpid()

    def write() -> None:
        if os.getpid() == process:
            Path(record).write_text(json.dumps({"steps": steps}), encoding="utf-8")

    atexit.register(write)
    register_optimizer_step_post_hook(lambda *_arguments: steps.append(time.time() - started))
    if "--old" in options:
        as_before()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    if "--images" in options:
        put_images(options[options.index("--images") + 1])
    if "--register" in options:
        name = options[options.index("--register") + 1]
        register(name)
        if name == SMALL and (Path(script).parent / "pyramidnet.py").exists():  # CutMix-PyTorch has models of its own
            import resnet

            resnet.ResNet = lambda *_arguments: PooledLinear()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
