"""Faults put into real runs on purpose; ``make test-faults`` runs them in full, ``make test`` a few of each."""

from __future__ import annotations

import os

FULL = os.environ.get("FAULTS") == "full"
"""Whether every case is run."""
