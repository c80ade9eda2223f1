"""Run notebook.ipynb in a new folder and store it with what comes out.

python docs/run_notebook.py                      stores it in place
python docs/run_notebook.py --short --out FILE   the training stops after 140 steps; this is what the tests run
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent / "notebook.ipynb"


def run(notebook: Any, folder: str) -> None:
    """Run every cell with a folder as the current one; CellExecutionError for the first that fails."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()


def tidied(notebook: Any) -> Any:
    """Without what differs from machine to machine: times of execution, names of the environment, progress bars."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Pieces of one stream as one; without the warning that there is no widget to draw progress bars with."""
    found: list[Any] = []
    for output in outputs:
        if "TqdmWarning" in output.get("text", ""):
            continue
        before = found[-1] if found else None
        if output.output_type == "stream" and before is not None and before.get("name") == output.name:
            before.text += output.text
        else:
            found.append(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=NOTEBOOK, help="where it is stored")
    parser.add_argument("--short", action="store_true", help="stop the training after 140 steps")
    arguments = parser.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if arguments.short:
        for cell in notebook.cells:
            cell.source = re.sub(r"-m train_cls\b", "-m train_cls --max-steps 140", cell.source)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, folder)
    nbformat.write(tidied(notebook), arguments.out)


if __name__ == "__main__":
    main()
