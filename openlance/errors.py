"""The one exception for a mistake that the user can mend."""


class InputError(ValueError):
    """What the user gave cannot be used: the message names the input, what was wrong and what to do.

    The command line prints the message without a traceback and exits with 2.
    """
