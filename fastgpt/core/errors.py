"""UserError, raised for mistakes the user can fix."""


class UserError(Exception):
    """Bad input or settings: one sentence with what, where and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """
