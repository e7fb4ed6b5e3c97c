"""The sub-commands of `fasttrain analyse`: a module each, listed in `cli.ANALYSES`."""
