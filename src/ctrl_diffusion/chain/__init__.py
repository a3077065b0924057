"""Sample the prior as a chain of Gaussian steps: schedule, denoiser, transition, rollout, batches of paths."""
