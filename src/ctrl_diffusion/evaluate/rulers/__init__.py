"""Name the built-in rulers, which measure the y of pictures."""
