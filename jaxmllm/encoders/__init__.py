"""Encoders: a picture -> taps, the feature maps of chosen layers."""
