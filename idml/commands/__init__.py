"""The commands of ``python -m idml``, each a module with one function that takes the arguments behind its name."""
