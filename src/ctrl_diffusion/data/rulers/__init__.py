"""Name the built-in rulers, which measure the true y of pictures."""
