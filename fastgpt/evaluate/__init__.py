"""Evaluate a model: harness tasks, perplexity, text metrics, suites of one's own, safety, and people's ratings."""
