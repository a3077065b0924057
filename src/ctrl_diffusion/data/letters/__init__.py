"""Read the letters that ship with the package, and measure weight, slant and width of a letter's picture."""
