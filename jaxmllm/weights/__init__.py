"""Weights of other frameworks: which key is which parameter (key_maps), conversion both ways (convert), and files."""
