"""Make the letters: fonts become glyphs, glyphs a prior, and the prior is measured."""
