"""Disk -> Batch: sources, chat templates, samples of tokens and pictures, packed rows, exact resume."""
