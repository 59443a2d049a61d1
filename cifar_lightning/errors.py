"""The two exceptions that are told in a few lines: what a user can mend before, and what went wrong in a run."""


class UserError(ValueError):
    """Raised for everything a user can mend; the command line prints it without a traceback and exits with 2.

    The message has one or two lines: the flag or path, the value got, the values allowed, what to do next.
    """


class RunError(RuntimeError):
    """Raised where a run that had begun cannot go on: a diverged loss, a full disk, too little memory.

    The command line prints it without a traceback and exits with 1. The message is as short as a `UserError`'s and says
    what is kept and how to go on.
    """
