"""A model of kernels without a GPU: lower bounds in time from machine code, launch arithmetic and published rates.

`launch.Launch` describes one launch, `bound.bound(launch, chip)` returns a `launch.Bound`. `compiled` compiles kernels
and reads their machine code, `chips` has the rates. Every figure is modelled, not measured.
"""
