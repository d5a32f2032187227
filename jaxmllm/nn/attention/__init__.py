"""Attention: the layers, the plain form, the choice of a kernel, and the kernels of TPUs and GPUs."""
