"""Weighted bilinear samples of feature maps: the choice of a form, the plain form, the TPU kernels."""
