"""Run the tutorial: every block of shell and of Python in tutorial.md, in order, as it is printed.

python docs/tutorial.py                 in a new folder of the system's for temporary files; about ten minutes
python docs/tutorial.py --folder DIR    in DIR, which is made
python docs/tutorial.py --short         the trainings stop after 140 and 30 steps; this is what the tests run
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SHORT = {"train_cls.py": "--max-steps 140", "train_dml.py": "--max-steps 30"}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of shell or Python."""
    return re.findall(r"^```(sh|python)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def shortened(command: str) -> str:
    """The same with what is in ``SHORT`` behind the name of each training script."""
    for script, option in SHORT.items():
        command = command.replace(script, f"{script} {option}")
    return command


def run(folder: Path, *, short: bool) -> None:
    """Run all blocks in a folder; CalledProcessError for the first that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for script in SHORT:
        (folder / script).symlink_to(DOCS.parent / script)
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    for language, text in blocks((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        text = shortened(text) if short and language == "sh" else text
        print("\n".join(("$ " if language == "sh" else ">>> ") + line for line in text.splitlines()), flush=True)
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        subprocess.run(command, cwd=folder, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to run it; must not exist")
    parser.add_argument("--short", action="store_true", help="stop the trainings after 140 and 30 steps")
    arguments = parser.parse_args()
    if arguments.folder is not None and arguments.folder.exists():
        sys.exit(f"error: {arguments.folder} exists; give the name of a new folder")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="idml-tutorial-"))
    try:
        run(folder, short=arguments.short)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: the block above ended with {error.returncode}")
    print(f"done; what it made is in {folder}")


if __name__ == "__main__":
    main()
