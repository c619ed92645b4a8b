"""Checks of compiled kernels without a GPU: registers, spills, instructions. They need a checkout."""
