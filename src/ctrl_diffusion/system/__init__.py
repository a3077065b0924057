"""Whole files, locked folders, checkpoints, progress, processes and trackers: what the machine gives."""
