"""The main job: two images in, a transform and a report out."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Give what README's example of before took from here; see :func:`MorphSeekLib.moved`."""
    from .. import moved

    return moved("registration", name)
