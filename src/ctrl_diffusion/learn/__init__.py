"""The learners, one file each, and the only training loop."""
