"""``python -m idml <command>``.

table RUN [RUN ...]                    one row per run directory
ffcv-write --dataset D --out X.beton   write a split of a data set for FFCV (--help lists the options)
verify-data --dataset D --data-dir DIR whether a retrieval data set is whole and every image decodes (--help)
"""

from __future__ import annotations

import sys

from idml.data.ffcv_write import ffcv_write
from idml.data.verify import verify_data
from idml.errors import UserError, nearest, run_main
from idml.tables import print_table

COMMANDS = {"table": print_table, "ffcv-write": ffcv_write, "verify-data": verify_data}


def main() -> None:
    """Run the command that the first argument names with the arguments behind it."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    name, arguments = sys.argv[1], sys.argv[2:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    COMMANDS[name](arguments)


if __name__ == "__main__":
    run_main(main)
