"""The reward γ log p̂(y | x): classifiers, their fit and calibration, and the region they know."""
