"""Triton kernels and their launchers, one file per op; installed as fastgpt.kernels. Nothing is imported here: an op's
file is loaded at its first call, and needs Triton then."""
