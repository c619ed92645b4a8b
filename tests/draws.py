"""Random values of the numeric tests: other values under another `--seed` of pytest."""

import torch

seed = 0  # conftest.py sets it


def generator(number: int) -> torch.Generator:
    """Return the generator of a test's draw `number`, below 1000."""
    return torch.Generator().manual_seed(1000 * seed + number)
