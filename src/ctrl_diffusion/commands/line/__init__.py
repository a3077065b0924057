"""Read a command's options and write to the terminal."""
