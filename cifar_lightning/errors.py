"""The one exception that means "you can mend this"."""


class UserError(ValueError):
    """Raised for everything a user can mend; the command line prints it without a traceback and exits with 2.

    The message has one or two lines: the flag or path, the value got, the values allowed, what to do next.
    """
