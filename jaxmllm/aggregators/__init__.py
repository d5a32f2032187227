"""Aggregators: feature maps of all encoders -> visual tokens of the language model (across encoders)."""
