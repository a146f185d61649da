"""The ways in which a job ends early: an error that the user can fix, or the user's own wish."""


class MorphSeekError(Exception):
    """Something that the user can fix; its text is one sentence that says what is wrong and what to do.

    The command line prints it and exits with code 2; the worker passes it on to Slicer.
    """


class InUseError(MorphSeekError):
    """Another process works where this one wants to."""


class Cancelled(Exception):
    """The user canceled the job."""
