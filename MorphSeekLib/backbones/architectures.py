"""The published networks: backbones with settings that make them equal the official codes, defects included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import corrmlp, lapirn, nice_trans, spac, transmorph, voxelmorph, vxm_dense


@dataclass(frozen=True)
class Architecture:
    """A published network.

    Attributes:
        backbone: a key of :data:`MorphSeekLib.backbones.backbone.BACKBONES`.
        settings: the backbone's settings under which official weights give the official output.
        from_official: renames the official code's weights as ours and drops what is none (grids, index tables).
        source: who published it, and where the code stands.
        infer: where settings are no part of the name: (weights under our names, the constructor's arguments if the
            file holds them) -> the settings that they imply.
    """

    backbone: str
    settings: Any
    from_official: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    source: str
    infer: Callable[[dict[str, Tensor], Mapping[str, object]], Any] | None = None


VXM = "Balakrishnan et al. 2019, as the TransMorph repository compares with it"
VXM_DENSE = "Balakrishnan et al. 2019 and Dalca et al. 2019, VoxelMorph's repository, PyTorch"
CHEN = "Chen et al., Medical Image Analysis 2022, TransMorph's repository"
MOK = "Mok and Chung, MICCAI 2020, LapIRN's repository"
MENG = "Meng et al., MICCAI 2023, NICE-Trans's repository"
MENG_MLP = "Meng et al., CVPR 2024, CorrMLP's repository"
LUO = "Luo et al. 2021, SPAC's repository"

ARCHITECTURES = {
    "vxm-1": Architecture("voxelmorph", voxelmorph.VXM1, voxelmorph.from_official, VXM),
    "vxm-2": Architecture("voxelmorph", voxelmorph.VXM2, voxelmorph.from_official, VXM),
    "vxm-x2": Architecture("voxelmorph", voxelmorph.VXM_X2, voxelmorph.from_official, VXM),
    "vxm-huge": Architecture("voxelmorph", voxelmorph.VXM_HUGE, voxelmorph.from_official, VXM),
    "vxm": Architecture("voxelmorph", voxelmorph.VXM2, voxelmorph.from_official, VXM, voxelmorph.widths_of),
    "vxm-dense-svf": Architecture("vxm_dense", vxm_dense.OFFICIAL_SVF, vxm_dense.from_official, VXM_DENSE),
    "vxm-dense-disp": Architecture("vxm_dense", vxm_dense.DISPLACEMENT, vxm_dense.from_official, VXM_DENSE),
    "vxm-dense": Architecture(
        "vxm_dense", vxm_dense.OFFICIAL_SVF, vxm_dense.from_official, VXM_DENSE, vxm_dense.settings_of
    ),
    "transmorph": Architecture("transmorph", transmorph.BASE, transmorph.from_official, CHEN),
    "transmorph-tiny": Architecture("transmorph", transmorph.TINY, transmorph.from_official, CHEN),
    "transmorph-small": Architecture("transmorph", transmorph.SMALL, transmorph.from_official, CHEN),
    "transmorph-large": Architecture("transmorph", transmorph.LARGE, transmorph.from_official, CHEN),
    "transmorph-oasis": Architecture("transmorph", transmorph.OASIS, transmorph.from_official, CHEN),
    "transmorph-oasis-large": Architecture("transmorph", transmorph.OASIS_LARGE, transmorph.from_official, CHEN),
    "transmorph-diff": Architecture("transmorph", transmorph.DIFFEOMORPHIC, transmorph.from_official_diff, CHEN),
    "lapirn-disp": Architecture("lapirn", lapirn.DISPLACEMENT, lapirn.from_official, MOK),
    "lapirn-diff": Architecture("lapirn", lapirn.DIFFEOMORPHIC, lapirn.from_official, MOK),
    "nice-trans": Architecture("nice_trans", nice_trans.OFFICIAL, nice_trans.from_official, MENG),
    "corrmlp": Architecture("corrmlp", corrmlp.OFFICIAL, corrmlp.from_official, MENG_MLP),
    "spac": Architecture("spac", spac.OFFICIAL, spac.from_official, LUO, spac.settings_of),
}
