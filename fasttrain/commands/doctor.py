"""`fasttrain doctor`: what this machine has, and what training here will use."""

import argparse

from fasttrain.doctor import print_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(args: argparse.Namespace) -> None:
    print_report()
