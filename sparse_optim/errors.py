"""The base of the errors that a user can fix. It imports nothing, so that any layer may use it."""


class SparseOptimError(ValueError):
    """Wrong input: one line that says what is wrong and what to do.

    The command line prints it without a traceback.
    """
