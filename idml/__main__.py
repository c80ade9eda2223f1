"""``python -m idml <command>``, or ``idml <command>``; each has --help.

table RUN [RUN ...]                    one row per run directory
info CHECKPOINT                        what a checkpoint is
introspect --checkpoint C --out E ...  a trained model learns to say when it is wrong, and what is new to it
predict --checkpoint C IMG [IMG ...]   classes of images, P(wrong), novelty, and whether to answer at all
embed --checkpoint C --data-dir DIR    embeddings and uncertainty of images, as a Parquet file
search --index E.parquet --query IMG   the images most like one
audit --checkpoint C --data-dir DIR    a page that shows what a model is unsure of, and which labels look wrong
evaluate --checkpoint C                the figures of a model on its test images
export --checkpoint C --format F       as onnx, torchscript, safetensors or timm
ffcv-write --dataset D --out X.beton   write a split of a data set for FFCV
verify-data --dataset D --data-dir DIR whether a retrieval data set is whole and every image decodes
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings

from idml.errors import UserError, nearest, run_main

COMMANDS = {
    "table": "idml.tables:print_table",
    "info": "idml.commands.info:info",
    "introspect": "idml.commands.introspect:introspect",
    "predict": "idml.commands.predict:predict",
    "embed": "idml.commands.embed:embed",
    "search": "idml.commands.search:search",
    "audit": "idml.commands.audit:audit",
    "evaluate": "idml.commands.evaluate:evaluate",
    "export": "idml.commands.export:export",
    "ffcv-write": "idml.data.ffcv_write:ffcv_write",
    "verify-data": "idml.data.verify:verify_data",
}
"""Module and function of each; imported only when it is asked for."""


def main() -> None:
    """Run the command that the first argument names with the arguments behind it."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    name, arguments = sys.argv[1], sys.argv[2:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once; see idml.runtime.keep_freed_memory
    module, function = COMMANDS[name].split(":")
    getattr(importlib.import_module(module), function)(arguments)


def command() -> None:
    """What ``idml`` runs."""
    run_main(main)


if __name__ == "__main__":
    command()
