"""Objectives: hidden states -> unreduced losses."""
