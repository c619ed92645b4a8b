"""Find settings by training: a range test of the learning rate, and sweeps of runs over any settings."""
