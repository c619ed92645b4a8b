"""Parts of a training run. The loop that uses them is fastgpt/train.py."""
