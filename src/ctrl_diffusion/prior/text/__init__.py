"""Condition on text: prompts read from files, encoded at once or when they are first needed, and numbered."""
