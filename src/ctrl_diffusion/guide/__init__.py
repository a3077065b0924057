"""Sample the conditional from the same prior by the baselines, one file a kind."""
