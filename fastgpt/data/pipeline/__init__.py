"""The build of a data set: from a recipe to shards, a manifest and a report; `stages` has the order of the work."""
