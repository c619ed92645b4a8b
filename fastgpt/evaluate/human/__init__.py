"""Ratings by people: answers of two models, a local page on which people compare them, and a report."""
