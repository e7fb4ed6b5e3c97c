"""`fasttrain supervise -- COMMAND ...`: starts a launcher's command again for as long as that helps."""

import argparse
import shlex

from fasttrain.supervisor import Limits, Supervisor, split_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    limits = Limits()
    parser.add_argument(
        "--restarts", type=_count, default=limits.restarts, metavar="N", help="give up after N within the window (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=_seconds, default=limits.window, metavar="SECONDS", help="in which restarts are counted (default: %(default)g)"
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=limits.grace,
        metavar="SECONDS",
        help="for processes that a start left behind to save and end, before they are killed (default: %(default)g)",
    )
    parser.add_argument(
        "--stop",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help="what asks the training to stop on SIGTERM, in place of a signal to the command: srun, for one, would kill its tasks",
    )
    parser.add_argument(
        "command_line", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="the launcher's command, such as deepspeed ..."
    )


def run(args: argparse.Namespace) -> int:
    limits = Limits(args.restarts, args.window, args.grace)
    return Supervisor(split_command(args.command_line), limits, args.stop).run()


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1e9:
        raise argparse.ArgumentTypeError("must be a number of seconds, 0 or more")
    return number
