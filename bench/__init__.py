"""Benchmarks, one file per op and one for throughput; installed as fastgpt.bench."""

OPS = (  # every op of the registry, in a model's order (a constant: bench.gpu must know it before anything is built)
    "embedding",
    "layer_norm",
    "rms_norm",
    "rope",
    "attention",
    "bias_gelu",
    "swiglu",
    "cross_entropy",
    "linear_cross_entropy",
    "adamw",
)
