"""The border to diffusers: a pipeline folder as a prior, and the embedded model."""
