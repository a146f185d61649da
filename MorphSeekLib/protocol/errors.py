"""The ways a job ends early: a sentence for the person, or the person's own wish."""


class MorphSeekError(Exception):
    """Something a person can mend; its text is one sentence that says what is wrong and what to do.

    The command line prints it and exits with code 2; the worker hands it to Slicer as it is.
    """


class InUseError(MorphSeekError):
    """Another process works where this one wants to."""


class Cancelled(Exception):
    """The person pressed Cancel."""
