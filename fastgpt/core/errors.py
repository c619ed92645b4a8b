"""The one exception that means 'the user can mend this'."""


class UserError(Exception):
    """Bad input or settings: one sentence with what, where and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """
