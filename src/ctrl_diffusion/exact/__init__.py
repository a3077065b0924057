"""Tasks whose answer is known: mixtures, lattices, and every learner and baseline held against them."""
