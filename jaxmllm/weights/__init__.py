"""Weights of other frameworks: tables of names (tables), both directions (convert), files (safetensors)."""
