"""Train the control by a learner, one file each, in the only training loop."""
