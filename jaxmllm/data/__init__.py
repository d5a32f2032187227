"""From disk to Batch: sources, chat templates, samples of tokens and pictures, packed rows, exact resume."""
