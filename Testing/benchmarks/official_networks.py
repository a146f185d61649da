"""The official networks and losses of the published architectures, made from clones of their repositories.

The clones lie in one folder, under their repositories' names (a part of the name suffices for the long one):
voxelmorph (branch dev), TransMorph_Transformer_for_Medical_Image_Registration, LapIRN, Registration-NICE-Trans,
Registration-CorrMLP. Nothing of them is part of MorphSeek. They were written for CUDA; here they run where torch runs.
Beside them: pip install ml_collections einops neurite==0.2 pystrum tqdm. timm is replaced by the three helpers that
TransMorph takes from it, since it wants a torchvision of torch's own build.

One process can make networks of one repository only: the repositories call their modules alike.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass
class Official:
    """An official network.

    Attributes:
        network: on the CPU.
        run: (moving, fixed) -> warped moving image, field as that code has it.
        field: what of that field our decoder's output is: (batch, 3, i, j, k) voxels, channel c along axis c.
        loss: (warped, fixed, the code's own field) -> the scalar its training lowers.
    """

    network: nn.Module
    run: Callable[[Tensor, Tensor], Pair]
    field: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


def official(name: str, shape: tuple[int, int, int], clones: Path) -> Official:
    """The official network of an architecture, with fresh weights.

    Args:
        name: a key of MorphSeekLib.backbones.architectures.ARCHITECTURES.
        shape: of the images, which these codes must know beforehand.
        clones: the folder that holds the clones.
    """
    without_cuda()
    for start, make in MAKERS.items():
        if name.startswith(start):
            return make(name, shape, clones)
    raise SystemExit(f"There is no official code for {name}; add it to {Path(__file__).name}.")


def clone(clones: Path, part: str) -> Path:
    """The clone whose name holds a word."""
    found = [folder for folder in sorted(clones.iterdir()) if part.lower() in folder.name.lower()]
    if not found:
        raise SystemExit(f"There is no clone of {part} in {clones}.")
    return found[0]


def lncc_and_diffusion(clones: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """LNCC of window 9 as these codes sum it (a dense convolution), and the mean squared forward difference.

    One definition serves them all: those of VoxelMorph, TransMorph, NICE-Trans and CorrMLP are the same.
    """
    folder = clone(clones, "TransMorph") / "IXI" / "TransMorph"
    losses = module_of(folder / "losses.py", "official_losses")
    similarity, smoothness = losses.NCC_vxm(), losses.Grad3d(penalty="l2")
    return lambda warped, fixed, field: similarity(warped, fixed) + smoothness(field, field)


def vxm(name: str, shape: tuple[int, int, int], clones: Path) -> Official:
    """VoxelMorph in the TransMorph repository."""
    folder = clone(clones, "TransMorph") / "Baseline_registration_models" / "VoxelMorph"
    models = module_of(folder / "models.py", "official_models")
    kind = {"vxm-1": "VxmDense_1", "vxm-2": "VxmDense_2", "vxm-x2": "VxmDensex2", "vxm-huge": "VxmDense_huge"}[name]
    network = getattr(models, kind)(shape)
    return Official(
        network,
        lambda moving, fixed: network(torch.cat([moving, fixed], dim=1)),
        lambda field: field,
        lncc_and_diffusion(clones),
    )


def vxm_dense(name: str, shape: tuple[int, int, int], clones: Path) -> Official:
    """VoxelMorph's own repository; its field in training is the one before integration."""
    os.environ |= {"VXM_BACKEND": "pytorch", "NEURITE_BACKEND": "pytorch"}
    sys.path.insert(0, str(clone(clones, "voxelmorph")))
    import voxelmorph

    network = voxelmorph.networks.VxmDense(inshape=shape, int_steps=0 if "disp" in name else 7)
    return Official(
        network,
        lambda moving, fixed: network(moving, fixed, registration=not torch.is_grad_enabled()),
        lambda field: field,
        lncc_and_diffusion(clones),
    )


def transmorph(name: str, shape: tuple[int, int, int], clones: Path) -> Official:
    """TransMorph, its OASIS variant, and TransMorph-diff."""
    imitate_timm()
    repository = clone(clones, "TransMorph")
    oasis = "oasis" in name
    sys.path.insert(0, str(repository / "OASIS" / "TransMorph" if oasis else repository / "TransMorph"))
    loss = lncc_and_diffusion(clones)
    if name.endswith("diff"):
        from models import TransMorph_diff, configs_TransMorph_diff

        config = configs_TransMorph_diff.get_TransMorphDiff_config()
        config.img_size = shape
        diffeomorphic = TransMorph_diff.TransMorphDiff(config)
        sizes = torch.tensor(shape).view(1, 3, 1, 1, 1)

        def run(moving: Tensor, fixed: Tensor) -> Pair:
            warped, _, field = diffeomorphic((moving, fixed))
            return warped, field

        return Official(diffeomorphic, run, lambda field: field * (sizes - 1) / 2, loss)
    from models import TransMorph

    kind = "TransMorph" + next((f"-{size.title()}" for size in ("tiny", "small", "large") if size in name), "")
    config = TransMorph.CONFIGS[kind]
    config.img_size = shape
    network = TransMorph.TransMorph(config)

    def sampled(field: Tensor) -> Tensor:
        """Where the OASIS code samples: its points are made for align_corners=True, and read with False."""
        axes = [torch.arange(n, dtype=field.dtype) for n in shape]
        points = torch.stack(torch.meshgrid(axes, indexing="ij"))
        sizes = torch.tensor(shape).view(1, 3, 1, 1, 1)
        return (points + field) * sizes / (sizes - 1) - 0.5 - points

    return Official(
        network,
        lambda moving, fixed: network(torch.cat([moving, fixed], dim=1)),
        sampled if oasis else lambda field: field,
        loss,
    )


def lapirn(name: str, shape: tuple[int, int, int], clones: Path) -> Official:
    """LapIRN with all its levels in training, and the loss of its last level."""
    sys.path.insert(0, str(clone(clones, "LapIRN") / "Code"))
    import miccai2020_model_stage as stage

    kind = "Miccai2020_LDR_laplacian_unit_" + ("disp_add_lvl" if name.endswith("disp") else "add_lvl")
    network = None
    for level in (1, 2, 3):
        size = tuple(n // 2 ** (3 - level) for n in shape)
        lower = {} if network is None else {f"model_lvl{level - 1}": network}
        network = getattr(stage, f"{kind}{level}")(2, 3, 7, is_train=True, imgshape=size, range_flow=0.4, **lower)
    whole = network
    similarity = stage.multi_resolution_NCC(win=7, scale=3)
    weight = 1.0 if name.endswith("disp") else 3.5
    sizes = torch.tensor(shape).flip(0).view(1, 3, 1, 1, 1)

    def run(moving: Tensor, fixed: Tensor) -> Pair:
        field, warped = whole(moving, fixed)[:2]
        return warped, field

    def loss(warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
        return similarity(warped, fixed) + weight * stage.smoothloss(field * (sizes - 1))

    return Official(whole, run, lambda field: field.flip(1) * (sizes.flip(1) - 1) / 2, loss)


def siamese(name: str, shape: tuple[int, int, int], clones: Path) -> Official:
    """NICE-Trans and CorrMLP; which class it is, and what it takes, is asked of the module when it runs."""
    word = name.replace("-", "").lower()
    folder = next(clone(clones, "NICE-Trans" if "nice" in name else "CorrMLP").rglob("networks.py")).parent
    sys.path.insert(0, str(folder))
    import networks

    classes = {k.replace("_", "").replace("-", "").lower(): v for k, v in inspect.getmembers(networks, inspect.isclass)}
    kind = classes[word]
    takes = inspect.signature(kind).parameters
    # recomputing trades time for memory; here time is measured
    network = kind(**{key: False for key in takes if "checkpoint" in key})

    def run(moving: Tensor, fixed: Tensor) -> Pair:
        warped, field = network(fixed, moving)[:2]
        return warped, field

    return Official(network, run, lambda field: field, lncc_and_diffusion(clones))


MAKERS = {
    "vxm-dense": vxm_dense,
    "vxm-": vxm,
    "transmorph": transmorph,
    "lapirn": lapirn,
    "nice-trans": siamese,
    "corrmlp": siamese,
}


def without_cuda() -> None:
    """Where torch sees no GPU, what these codes put on CUDA stays where it is."""
    if torch.cuda.is_available():
        return
    to = Tensor.to

    def stay(self: Tensor, *arguments, **words) -> Tensor:
        left = [a for a in arguments if not (isinstance(a, str) and a.startswith("cuda"))]
        return to(self, *left, **words) if left or words else self

    Tensor.to = stay
    Tensor.cuda = lambda self, *_, **__: self
    nn.Module.cuda = lambda self, *_, **__: self


def imitate_timm() -> None:
    """timm.models.layers with what TransMorph takes from it."""
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath, layers.trunc_normal_ = DropPath, nn.init.trunc_normal_
    layers.to_3tuple = lambda value: value if isinstance(value, (tuple, list)) else tuple(repeat(value, 3))
    sys.modules |= {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models")}
    sys.modules["timm.models.layers"] = layers


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is left out now and then."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob or 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        kept = 1 - self.drop_prob
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(kept) / kept


def module_of(path: Path, name: str) -> types.ModuleType:
    """A module from its file, whatever others are called."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def halved(image: Tensor) -> Tensor:
    """An image as LapIRN's losses see it one scale further up."""
    return F.avg_pool3d(image, 3, stride=2, padding=1, count_include_pad=False)
