"""Checks of compiled kernels that need no GPU: registers, spills, instructions. They run in a checkout."""
