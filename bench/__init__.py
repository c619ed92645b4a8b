"""Benchmarks, one file per op and one for throughput; installed as fastgpt.bench."""
