"""Fusers: the taps of one encoder -> one feature map (fusion across depth)."""
