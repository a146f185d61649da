"""The base class of all registration networks, and how they are found by name.

A new backbone is one file in this folder, with a dataclass of its settings and a class

    @register("mine", MySettings)
    class Mine(Backbone):
        def __init__(self, settings: MySettings) -> None:
            super().__init__(settings)
            ...

and a line in ``__init__.py`` that imports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..protocol.errors import MorphSeekError
from ..protocol.settings import from_dict


class Backbone(nn.Module, ABC):
    """A network from a pair of images to a field, in two parts with the policy between them.

    Images are (batch, 1, i, j, k), every size divisible by ``multiple_of``.

    Attributes:
        settings: from which it was built; they rebuild it.
        top_channels: of the coarsest feature.
        multiple_of: what every image size must be divisible by.
        moves: whether it gives a field; one that does not is there for what it learns of each image.
        learned_features: the number of class-like features that :meth:`learned` gives; 0 where it gives none.
        settings_type: dataclass of the settings; set by :func:`register`.
    """

    settings_type: ClassVar[type]
    top_channels: int
    multiple_of: int
    learned_features: int = 0
    moves: ClassVar[bool] = True

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features of a pair: the skips, and the top feature, which the policy replaces.

        The skips, whose first axis is the batch, are for :meth:`decode` alone to understand. The top feature is
        (batch, top_channels, ...), the coarsest.
        """

    @abstractmethod
    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the field, (batch, 3, i, j, k), float32 or better, in voxels, channel c along axis c.

        Nothing in it is drawn at random, and a batch of top features may come with skips expanded to it.
        """

    def image_features(self, image: Tensor) -> list[Tensor] | None:
        """Return what the network finds in one image alone; None where it reads both images together.

        A network that has them also has :meth:`encode_with`, so that T steps read the fixed image once.
        """
        return None

    def encode_with(self, moving: Tensor, fixed_features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return what :meth:`encode` does, from the :meth:`image_features` of the fixed image."""
        raise NotImplementedError(f"{type(self).__name__} reads both images together")

    def learned(self, skips: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return class-like features of the moving and the fixed image; None where the network learns none.

        Each is (batch, learned_features, ...), sums to 1 over the features, and is taken from what :meth:`encode` gave.
        """
        return None

    def with_features(self, count: int) -> Backbone | None:
        """Return a network with this one's weights and at least ``count`` learned features, itself if it has them.

        What reads new features begins with weights of 0, so that the field is the same until it is trained. None where
        a network cannot learn features.
        """
        return self if self.learned_features >= count else None


BACKBONES: dict[str, type[Backbone]] = {}
"""The backbones by the names that settings use."""

REMOVED = {"voxelmorph": ("skip_gains",)}
"""Settings by backbone that models of before may name; experiments in Testing/benchmarks still have them."""

Kind = TypeVar("Kind", bound=type[Backbone])


def register(name: str, settings_type: type) -> Callable[[Kind], Kind]:
    """Return a decorator that makes a backbone known by a name.

    Args:
        name: what settings call it.
        settings_type: the dataclass that it is built from.
    """

    def add(backbone: Kind) -> Kind:
        backbone.settings_type = settings_type
        BACKBONES[name] = backbone
        return backbone

    return add


def start_near_zero(flow: nn.Conv3d) -> None:
    """Set a new last layer's weights so that its field is near zero."""
    nn.init.normal_(flow.weight, 0.0, 1e-5)
    if flow.bias is not None:
        nn.init.zeros_(flow.bias)


def build_backbone(name: str, settings: Mapping[str, object] | None = None) -> Backbone:
    """Make a network with fresh weights.

    Args:
        name: a key of BACKBONES.
        settings: fields of its settings dataclass; missing ones take their defaults.

    Raises:
        MorphSeekError: unknown name or setting.
    """
    if name not in BACKBONES:
        raise MorphSeekError(f"There is no backbone '{name}'; choose one of: {', '.join(sorted(BACKBONES))}.")
    kind, settings = BACKBONES[name], dict(settings or {})
    for removed in REMOVED.get(name, ()):
        if settings.pop(removed, None):  # one that is empty changed nothing
            raise MorphSeekError(f"The setting '{removed}' of backbone '{name}' was removed; train again without it.")
    return kind(from_dict(kind.settings_type, settings, f"backbone '{name}'"))
