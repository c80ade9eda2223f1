"""Store the 20-step loss curves anew, after a change that is meant to move them: python -m tests.golden"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

import train_cls
import train_dml
from tests.test_train_cls import GOLDEN, GOLDEN_RUNS, TWENTY_STEPS, step_losses
from tests.test_train_dml import GOLDEN_DML, golden_options

torch.set_num_threads(1)
curves = {}
with tempfile.TemporaryDirectory() as folder:
    for name, options in GOLDEN_RUNS.items():
        run = Path(folder) / name
        train_cls.main([*options, *TWENTY_STEPS, "--output-dir", str(run)])
        curves[name] = [round(loss, 5) for loss in step_losses(run)]
    for name in GOLDEN_DML:
        run = Path(folder) / name
        train_dml.main([*golden_options(name), "--output-dir", str(run)])
        curves[name] = [round(loss, 5) for loss in step_losses(run)]
GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
