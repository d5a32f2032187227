"""Disk -> Batch: sources of records, chat templates, samples of tokens and pictures, packed rows, exact resume."""
