"""Reference figures that a refactor must not move."""
