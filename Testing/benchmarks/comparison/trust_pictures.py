"""Pictures of the estimated error for the documents, of images that anybody may show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from MorphSeekLib.app.demo import COLIN27, known_map, template
from MorphSeekLib.app.phantom import abdomen, abdomen_grid
from MorphSeekLib.io.images import read_image
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.report.page import RegistrationPictures, TrustPicture, draw_sheets
from MorphSeekLib.space.geometry import Grid, Volume, resample, smooth_for_spacing

_WIDTH = 1100  # pixels
_RESECTED = (30.0, -25.0, 20.0), 22.0  # LPS mm from the middle of the grid, and its radius


def draw(folder: Path) -> None:
    """Write a picture of each pair, and print what is said of it."""
    brain, abdomen_fixed = _coarser(template()), abdomen(abdomen_grid(), "ct")
    moved = known_map(brain.grid, seed=2)
    other = _coarser(read_image(COLIN27)) if COLIN27.is_file() else _mirrored(brain)
    pairs = {
        "brain": (brain, resample(other, brain.grid, moved)),
        "abdomen": (
            abdomen_fixed,
            abdomen(abdomen_fixed.grid, "mr", known_map(abdomen_fixed.grid, 1, 80.0, 8.0), seed=1),
        ),
        "resection": (brain, resample(_resected(other), brain.grid, moved)),
    }
    for name, (fixed, moving) in pairs.items():
        found = register(fixed, moving, options=RegistrationOptions(inverse=False, trust="on"))
        assert found.trust is not None  # it was asked for
        pictures = RegistrationPictures(
            fixed,
            found.aligned,
            found.warped,
            found.jacobian,
            found.folding,
            found.transform,
            TrustPicture(found.trust.colors, found.trust.section),
        )
        sheet = next(sheet for sheet in draw_sheets(pictures) if "relied" in sheet.title)
        image = Image.open(io.BytesIO(sheet.png)).convert("RGB")
        image = image.resize((_WIDTH, round(_WIDTH * image.height / image.width)), Image.Resampling.LANCZOS)
        image.quantize(128).save(folder / f"trust-{name}.png", optimize=True)
        print(name, {key: value for key, value in found.trust.section.items() if key != "definition"}, flush=True)


def _coarser(image: Volume) -> Volume:
    """Return an image on voxels of 2 mm."""
    shape = np.ceil(np.array(image.grid.shape) * image.grid.spacing / 2).astype(int)
    grid = Grid.from_parts(shape, (2.0, 2.0, 2.0), image.grid.direction, image.grid.origin)
    return resample(smooth_for_spacing(image, 2.0), grid)


def _mirrored(image: Volume) -> Volume:
    """Return a brain whose sides have changed places, which is another brain as far as its halves differ."""
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirror[0, 3] = 2 * image.grid.center[0]
    return resample(image, image.grid, mirror)


def _resected(image: Volume) -> Volume:
    """Return a brain of which a part was taken out, and fluid took its place."""
    place, radius = _RESECTED
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in image.grid.shape), indexing="ij")).float()
    points = torch.einsum("ab,bijk->aijk", torch.from_numpy(image.grid.affine[:3, :3]).float(), index)
    center = image.grid.center + np.array(place) - image.grid.origin
    away = (points - torch.from_numpy(center).float().view(3, 1, 1, 1)).norm(dim=0)
    inside = (away < radius) & (image.data > 0)
    return Volume(torch.where(inside, 0.12 * float(image.data.max()), image.data), image.grid)
