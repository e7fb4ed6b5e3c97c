"""The sub-commands of `fasttrain` that work on runs."""
