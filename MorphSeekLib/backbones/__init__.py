"""Registration networks behind one contract, :class:`.backbone.Backbone`. Each file named here registers its own."""

from .backbone import BACKBONES, Backbone, build_backbone, register
from .corrmlp import CorrMLP
from .lapirn import LapIRN
from .nice_trans import NICETrans
from .segmenter import Segmenter
from .spac import SPAC
from .transmorph import TransMorph
from .voxelmorph import VoxelMorph
from .vxm_dense import VxmDense

__all__ = [
    "BACKBONES",
    "SPAC",
    "Backbone",
    "CorrMLP",
    "LapIRN",
    "NICETrans",
    "Segmenter",
    "TransMorph",
    "VoxelMorph",
    "VxmDense",
    "build_backbone",
    "register",
]
