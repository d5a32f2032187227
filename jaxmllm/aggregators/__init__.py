"""Aggregators: the feature maps of all encoders -> visual tokens for the language model (fusion across encoders)."""
