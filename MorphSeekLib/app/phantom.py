"""An abdomen that belongs to nobody: a phantom of smooth shapes with the contrast of a CT or of a T1-weighted MRI.

Shapes are depths: how far, in mm, a point lies within an organ, negative outside. Organs are painted one over the
other, with edges a voxel wide. Since the phantom is computed and not stored, it can be seen at any points, those under
a known deformation too, without an interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..space import fields
from ..space.geometry import Grid, Transform, Volume, index_points

Contrast = Literal["ct", "mr"]
Point = tuple[float, float, float]

MILLIMETERS = Grid((1, 1, 1), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # type: ignore[arg-type]
ALL = math.inf
EDGE = 2.5
"""Over so many mm one tissue goes into the next."""
TISSUES: dict[str, tuple[float, float]] = {
    "air": (-1000, 0),
    "fat": (-105, 760),
    "inner fat": (-95, 700),
    "muscle": (55, 250),
    "lung": (-820, 35),
    "heart": (140, 230),
    "cortical bone": (620, 60),
    "marrow": (230, 430),
    "disc": (90, 210),
    "cord": (35, 190),
    "liver": (105, 440),
    "vein": (180, 130),
    "bile": (8, 110),
    "spleen": (130, 270),
    "renal cortex": (195, 330),
    "renal medulla": (135, 230),
    "urine": (5, 100),
    "artery": (210, 90),
    "pancreas": (95, 480),
    "wall": (75, 330),
    "fluid": (15, 120),
    "stool": (40, 200),
    "gas": (-950, 0),
}
"""Name -> Hounsfield units of a contrast-enhanced CT, and a T1-weighted signal."""


def abdomen_grid(spacing: float = 3.0) -> Grid:
    """Return a grid of 390 x 290 x 230 mm about the phantom, axes along the patient's."""
    shape = [round(n / spacing) for n in (390, 290, 230)]
    corner = [-spacing * (n - 1) / 2 for n in shape]
    return Grid.from_parts(shape, (spacing,) * 3, torch.eye(3).numpy(), corner)


def abdomen(grid: Grid, contrast: Contrast, to_original: Transform | None = None, seed: int = 0) -> Volume:
    """Return the phantom as a scanner would show it.

    Args:
        grid: voxels to fill; the phantom's middle is the world's origin.
        contrast: "ct" (Hounsfield units) or "mr" (0 to about 800, with a bias field); both have noise.
        to_original: point of the grid's space -> point of the phantom, LPS mm; None: the phantom as it is.
        seed: of the scanner's noise; the phantom's texture is always the same.
    """
    values = _Phantom(index_points(grid, to_original, MILLIMETERS)[0], contrast).painted()
    generator = torch.Generator().manual_seed(seed)
    if contrast == "ct":
        data = values + 12 * torch.randn(values.shape, generator=generator)
        return Volume(data.round().clamp(-1024, 3071), grid, dtype="int16")
    bias = 0.8 + 0.4 * _upsampled(torch.rand(1, 1, 3, 3, 3, generator=generator), values.shape)
    real, imaginary = (9 * torch.randn(values.shape, generator=generator) for _ in range(2))
    return Volume(torch.hypot(values * bias + real, imaginary).round(), grid, dtype="int16")


def _upsampled(coarse: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a coarse field on a grid of this shape."""
    return F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]


def _column(numbers: Point) -> Tensor:
    """Return three numbers as (3, 1, 1, 1)."""
    return torch.tensor(numbers, dtype=torch.float32).view(3, 1, 1, 1)


def _length(vectors: Tensor) -> Tensor:
    """Return the lengths of (3, i, j, k) vectors; faster than a norm over an axis of three."""
    x, y, z = vectors
    return (x * x + y * y + z * z).sqrt_()


class _Phantom:
    """The painting of one image.

    Args:
        points: (3, i, j, k) mm in the phantom's space: x to the left, y to the back, z upward.
        contrast: which of the two columns of :data:`TISSUES` is painted.
    """

    def __init__(self, points: Tensor, contrast: Contrast) -> None:
        self.column = ("ct", "mr").index(contrast)
        self.texture = (0.12, 14.0)[1 - self.column]  # HU, or a share of the signal
        *bent, fine, self.lumps = (self._noise(points, step, seed) for seed, step in enumerate((45, 45, 45, 7, 14)))
        self.grain = fine + 0.7 * self.lumps
        self.still = points  # what no breath bends: body wall and bones
        self.at = points + 7.0 * torch.stack(bent)
        self.values = torch.full(points.shape[1:], float(TISSUES["air"][self.column]))

    def painted(self) -> Tensor:
        """Paint everything, from the outside in; return the values."""
        self._wall()
        self._organs()
        self._bowel()
        self._vessels()
        self._bones()
        return self.values

    def paint(self, depth: Tensor, tissue: str, mottled: float = 1.0) -> None:
        """Put a tissue where a depth is positive."""
        value = float(TISSUES[tissue][self.column])
        strength = self.texture if self.column == 0 else self.texture * value
        strength *= 0.0 if tissue in ("air", "gas") else mottled
        here = depth > -EDGE / 2
        share = (0.5 + depth[here] / EDGE).clamp(max=1)
        self.values[here] = torch.lerp(self.values[here], value + strength * self.grain[here], share)

    def ellipsoid(self, center: Point, radii: Point, turn: float = 0.0, still: bool = False) -> Tensor:
        """Return the depth in an ellipsoid, turned by degrees about the vertical; a radius of ALL makes a cylinder."""
        p = (self.still if still else self.at) - _column(center) + 1e-3  # the middle itself would be 0 / 0
        if turn:
            c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            p = torch.stack([c * p[0] + s * p[1], c * p[1] - s * p[0], p[2]])
        inverse = 1 / _column(radii)
        near = _length(p * inverse)
        return near * (1 - near) / _length(p * inverse**2)

    def tube(self, path: Sequence[Point], radius: float) -> Tensor:
        """Return the depth in a tube about a path of straight pieces."""
        nearest = torch.full(self.at.shape[1:], ALL)
        for a, b in pairwise(path):
            begin, along = _column(a), _column(b) - _column(a)
            away = self.at - begin
            place = (torch.einsum("cijk,c->ijk", away, along.flatten()) / along.square().sum()).clamp(0, 1)
            nearest = torch.minimum(nearest, _length(away - along * place))
        return radius - nearest

    def hollow(self, depth: Tensor, content: str, wall: float = 3.0, gas: Tensor | None = None) -> None:
        """Paint an organ with a wall, its content, and gas where another depth is positive, too."""
        self.paint(depth, "wall")
        self.paint(depth - wall, content, 2.5 if content == "stool" else 1.0)
        if gas is not None:
            self.paint(torch.minimum(depth - wall, gas), "gas")

    def _wall(self) -> None:
        """Paint fat, muscle, the cavity and the lungs above the diaphragm."""
        self.paint(self.ellipsoid((0, 0, 0), (168, 114, ALL), still=True), "fat", 0.5)
        ring = self.ellipsoid((0, -2, 0), (147, 93, ALL), still=True)
        self.paint(ring, "muscle")
        self.cavity = self.ellipsoid((0, -6, 0), (133, 79, ALL), still=True)
        self.paint(self.cavity, "inner fat", 0.6)
        for side in (-1, 1):
            self.paint(self.ellipsoid((side * 38, 76, 0), (30, 21, ALL), still=True), "muscle")
            self.paint(self.ellipsoid((side * 41, 44, -80), (19, 20, 90), still=True), "muscle")
        x, y, z = self.at
        domes = [top - 0.0065 * ((x - center).square() + y.square()) for center, top in ((-62, 92.0), (66, 80.0))]
        self.below = torch.maximum(*domes) - z
        self.paint(torch.minimum(self.cavity - 2, -self.below), "lung")
        self.paint(torch.minimum(self.cavity - 4, self.ellipsoid((22, -28, 112), (58, 44, 46))), "heart")
        self.inside = torch.minimum(self.cavity - 3, self.below - 4)

    def _organs(self) -> None:
        """Paint the solid organs and the stomach."""
        right = self.ellipsoid((-66, -2, 26), (70, 74, 72))
        left = self.ellipsoid((8, -40, 44), (66, 30, 32), turn=8)
        liver = torch.minimum(torch.maximum(right, left), self.inside)
        self.paint(liver, "liver")
        portal = ((-14.0, -4.0, 2.0), (-44.0, -8.0, 24.0))
        ends: list[Point] = [(-98, -26, 34), (-88, 32, 40), (-58, -44, 54), (-72, 20, -14), (12, -44, 44)]
        for end in ends:
            self.paint(torch.minimum(self.tube([portal[1], end], 4.0), liver - 3), "vein")
        for end in [(-104.0, 4.0, 40.0), (-58.0, -46.0, 40.0), (-66.0, 46.0, 34.0)]:
            self.paint(torch.minimum(self.tube([(-22, 10, 74), end], 4.0), liver - 3), "vein")
        self.paint(self.ellipsoid((-50, -50, -14), (15, 14, 25)), "bile", 0.4)
        self.paint(torch.minimum(self.ellipsoid((100, 26, 44), (27, 42, 48), turn=-20), self.inside), "spleen")
        for center, turn in (((-62, 36, -22), 25.0), ((64, 35, -8), -25.0)):
            self.paint(self.ellipsoid(center, (28, 23, 53), turn), "renal cortex")
            self.paint(self.ellipsoid(center, (18, 14, 41), turn), "renal medulla")
            middle = (center[0] * 0.84, center[1] - 7.0, float(center[2]))
            self.paint(self.ellipsoid(middle, (13, 8, 20), turn), "urine", 0.4)
        self.paint(self.tube([(-26, -14, -8), (4, -22, 4), (38, -14, 12), (72, 8, 26)], 11.0), "pancreas", 1.5)
        stomach = torch.minimum(self.ellipsoid((56, -30, 42), (40, 38, 44), turn=20), self.inside)
        self.hollow(stomach, "fluid", 4.0, gas=-44 - self.at[1])

    def _bowel(self) -> None:
        """Paint colon and small bowel."""
        colon: list[tuple[list[Point], float]] = [
            ([(-104, 4, -130), (-106, 2, -48)], 21.0),
            ([(-106, -6, -48), (-84, -42, -44), (-30, -60, -58), (34, -60, -56), (84, -44, -30), (104, -2, -18)], 17.0),
            ([(106, 6, -20), (108, 12, -130)], 17.0),
        ]
        for path, radius in colon:
            pinched = self.tube(path, radius) - 2.5 * (1 + torch.sin(self.at.sum(dim=0) / 5.5))
            self.hollow(torch.minimum(pinched, self.cavity - 2), "stool", gas=4 * self.lumps - 5 - self.at[1] / 16)
        generator = torch.Generator().manual_seed(3)
        low, high = torch.tensor([-80.0, -54.0, -122.0]), torch.tensor([80.0, 4.0, -74.0])
        ends = low + (high - low) * torch.rand(26, 3, generator=generator)
        path = [(float(x), float(y), float(z)) for x, y, z in ends]
        for n in range(0, len(path) - 1):
            loop = torch.minimum(self.tube(path[n : n + 2], 12.0), self.cavity - 3)
            self.hollow(loop, "fluid", gas=-40 - self.at[1] if n % 5 == 0 else None)

    def _vessels(self) -> None:
        """Paint aorta, vena cava and the portal vein's trunk."""
        bend = 4 * torch.sin(self.still[2] / 60)
        for center, radius, tissue in ((11.0, 11.0, "artery"), (-21.0, 12.0, "vein")):
            self.paint(radius - torch.hypot(self.still[0] - center - bend, self.still[1] - 10), tissue, 0.5)
        self.paint(self.tube([(28, -2, 8), (-14, -4, 2), (-44, -8, 24)], 6.5), "vein", 0.5)

    def _bones(self) -> None:
        """Paint spine, ribs and the wings of the pelvis."""
        x, y, z = self.still
        body = self.ellipsoid((0, 44, 0), (25, 20, ALL), still=True)
        phase = torch.remainder(z + 17, 34) - 17  # 0 in the middle of a vertebra
        vertebra = torch.minimum(body, 13 - phase.abs())
        self.paint(body - 1, "disc")
        self.paint(vertebra, "cortical bone")
        self.paint(vertebra - 3, "marrow", 2.0)
        canal = self.ellipsoid((0, 74, 0), (11, 10, ALL), still=True)
        arch = torch.minimum(canal + 6, 12 - phase.abs())
        spike = torch.minimum(self.ellipsoid((0, 96, 0), (4, 17, ALL), still=True), 9 - phase.abs())
        across = torch.minimum(self.ellipsoid((0, 67, 0), (46, 5.5, ALL), still=True), 6 - phase.abs())
        for depth in (arch, spike, across):
            self.paint(depth, "cortical bone")
            self.paint(depth - 3.5, "marrow")
        self.paint(canal, "cord", 0.4)
        angle = torch.atan2(x.abs(), y + 2)  # 0 at the back
        along = z + 42 * angle
        rib = self.ellipsoid((0, -2, 0), (141, 87, ALL), still=True)
        near = torch.hypot(rib, 0.9 * (torch.remainder(along + 13, 26) - 13))
        ribs = torch.minimum(torch.minimum(5.5 - near, along - 8), 40 * (2.2 - angle))
        self.paint(ribs, "cortical bone")
        self.paint(ribs - 3, "marrow")
        for side in (-1, 1):
            wing = 4.5 - self.ellipsoid((side * 66, 24, -150), (66, 52, 62), turn=side * 35, still=True).abs()
            wing = torch.minimum(torch.minimum(wing, side * x - 45), y + 26)
            self.paint(wing, "cortical bone")
            self.paint(wing - 3, "marrow")

    def _noise(self, points: Tensor, step: int, seed: int) -> Tensor:
        """Return smooth noise of the phantom at points, -1 to 1 or so, alike over about ``step`` mm."""
        generator = torch.Generator().manual_seed(100 + seed)
        nodes = torch.randn(1, 1, *[600 // step + 3] * 3, generator=generator)
        return fields.sample(nodes, points[None] / step + (nodes.shape[-1] - 1) / 2, padding="border")[0, 0].clone()
