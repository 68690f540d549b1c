"""Judges: classifiers that score samples, trained on real training data alone, from a fixed seed."""
