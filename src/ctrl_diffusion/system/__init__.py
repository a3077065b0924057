"""Handle what the machine gives: whole files, locked folders, checkpoints, progress, ranks and trackers."""
