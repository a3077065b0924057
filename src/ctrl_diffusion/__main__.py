"""Run the command line as `python -m ctrl_diffusion`."""

from .commands.app import main

main()
