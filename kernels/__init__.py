"""Triton kernels: torch tensors in, tensors out; no other module of the package is imported here."""
