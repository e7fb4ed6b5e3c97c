"""The exceptions that mean: the user can mend this; and the statuses a process ends with, which say whether to start it again."""

import enum


class Status(enum.IntEnum):
    """What a command ends with. Schedulers that know "retryable" codes take those from 128 on for it (Kubeflow's `ExitCode` policy).

    A training that SIGINT or SIGTERM stopped, saved, ends with 128 + the signal's number: 130 or 143.
    """

    DONE = 0
    USER_ERROR = 2  # a mistake in a config, a file or a command line: starting again changes nothing
    DIVERGED = 3  # the numbers went wrong, and would again: a run is a function of its config
    RESTART = 138  # a process, node or link was lost: start the same command again


class UserError(Exception):
    """A mistake in a config, a file or a command line, told in one message that names it and the remedy.

    The command line prints the message without a traceback (unless `--debug`) and exits with `status`.
    """

    status = Status.USER_ERROR


class DivergedError(UserError):
    """Training cannot go on from these numbers: told in one message with the report's file; restarting repeats it."""

    status = Status.DIVERGED


class CorruptedError(UserError):
    """Ranks that must hold the same hold something else: starting again from the checkpoint before mends it."""

    status = Status.RESTART
