"""The files that other programs load, and the chains that they run."""
