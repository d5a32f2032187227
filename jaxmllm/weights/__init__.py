"""Weights of other frameworks in and out: tables (tables.py), their two directions (convert), files (safetensors)."""
