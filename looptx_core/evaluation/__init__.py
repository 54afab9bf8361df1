"""Tasks: how good a model is at each depth, and what that costs."""
