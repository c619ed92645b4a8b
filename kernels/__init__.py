"""Triton kernels and their launchers, one file per op; installed as fastgpt.kernels.

Nothing is imported here. The file of an op is loaded at its first call, which needs Triton.
"""
