"""Store the 20-step loss curves anew, after a change that is meant to move them: python -m tests.golden"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

import train_cls
from idml.config_cls import METHODS
from tests.test_train_cls import GOLDEN, TWENTY_STEPS, step_losses

torch.set_num_threads(1)
curves = {}
with tempfile.TemporaryDirectory() as folder:
    for method in METHODS:
        run = Path(folder) / method
        train_cls.main(["--method", method, *TWENTY_STEPS, "--output-dir", str(run)])
        curves[method] = [round(loss, 5) for loss in step_losses(run)]
GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
