"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in a config, a file or a command line, told in one message that names it and the remedy.

    The command line prints the message without a traceback (unless `--debug`) and exits with status 2.
    """
