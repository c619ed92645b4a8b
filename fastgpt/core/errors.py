"""UserError, raised for mistakes the user can fix, and parts of its sentences."""


class UserError(Exception):
    """Bad input or settings: one sentence with what, where and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


def cause_of(error: Exception) -> str:
    """Return the text of an error for a message: of an OSError without its number and path, which the message has."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def counted(n: int, one: str, more: str = "") -> str:
    """Return a number with its noun: "1 file", "2 files"; `more` is the plural, unless it is `one` and an s."""
    return f"{n:,} {one if n == 1 else more or one + 's'}"
