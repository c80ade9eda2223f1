"""Real images inside the package; each file has its licence and the script that made it beside it."""
