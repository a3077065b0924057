"""The baselines, one file a kind: other ways to sample the conditional from the same prior."""
