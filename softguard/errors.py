"""The exceptions a user is meant to read."""


class SoftguardError(Exception):
    """Bad input or a failed collaborator, told in one line that names the file, field or value and the mend.

    The command line prints the line and exits with code 2; library callers catch it like any other exception.
    """


class DivergedError(SoftguardError):
    """Training came to numbers that are not finite, or that no adapter can hold: its learning rate is too large."""
