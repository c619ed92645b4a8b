"""Questions to a model, in this process or behind an endpoint, and the files that remember the replies."""
