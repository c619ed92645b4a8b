"""Roll-outs: a deployment folder says which version of a model is served; a gate decides, one command goes back."""
