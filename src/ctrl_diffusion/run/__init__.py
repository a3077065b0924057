"""A run: a prior with trained controls, its settings, its stages, its measurements and its folder."""
