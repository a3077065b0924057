"""The demos, one file a prior: their labelled pictures and their settings."""
