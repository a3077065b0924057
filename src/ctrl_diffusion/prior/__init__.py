"""Turn pipelines of diffusers into priors; the embedded model is one."""
