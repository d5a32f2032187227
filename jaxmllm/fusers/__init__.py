"""Fusers: taps of one encoder -> one feature map (across depth)."""
