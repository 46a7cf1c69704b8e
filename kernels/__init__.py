"""Triton kernels of the four maps; installed as `metattn.kernels`."""
