"""Several processes of one training run: which one this is, sums over all of them, and models spread over them."""
