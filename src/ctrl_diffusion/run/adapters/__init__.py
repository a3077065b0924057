"""LoRA files of any origin, read onto a prior and measured."""
