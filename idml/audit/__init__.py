"""A page that shows what a model is unsure of, and which labels look wrong: ``python -m idml audit``."""
