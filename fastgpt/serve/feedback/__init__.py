"""Feedback: thumbs and comparisons of a server's users, kept in a store, and exported for `fastgpt finetune`."""
