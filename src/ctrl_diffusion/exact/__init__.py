"""Measure every learner and baseline on tasks whose answer is known: mixtures and lattices."""
