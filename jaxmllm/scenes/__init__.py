"""Composed scenes with exact answers: a data set made from sprites, with nothing to download."""
