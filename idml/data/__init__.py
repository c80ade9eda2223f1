"""Data sets as lists of images and labels, and the loaders that turn them into batches."""
