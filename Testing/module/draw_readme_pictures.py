# ruff: noqa: E402 - the paths come first
"""Draw the README's pictures of the demo's registrations as Slicer shows them, off screen.

    python Testing/module/draw_readme_pictures.py DEMO_OUTPUT [-o Resources/Screenshots]

DEMO_OUTPUT is what `make demo` wrote, with Colin27 of Debian's mricron-data on the machine. Only freely usable images
may end up in the README: those of the demo.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "MorphSeek")]

import slicer
import slicer.util
import vtk
from MorphSeekGui import scene
from MorphSeekGui.views import ResultViews
from offscreen import Application
from vtk.util import numpy_support

from MorphSeekLib.app.demo import abdomen_pair, brain_pair
from MorphSeekLib.io.images import write_image


def read_volume(path: Path, kind: str = "vtkMRMLScalarVolumeNode"):
    """An image file as a volume node, read by MRML."""
    node = slicer.mrmlScene.AddNewNodeByClass(kind, path.name.split(".")[0])
    storage = slicer.vtkMRMLVolumeArchetypeStorageNode()
    slicer.mrmlScene.AddNode(storage)
    storage.SetFileName(str(path))
    storage.SetSingleFile(1)
    if not storage.ReadData(node):
        raise SystemExit(f"{path} cannot be read.")
    node.CreateDefaultDisplayNodes()
    return node


def read_result(fixed: Path, folder: Path) -> scene.RegistrationNodes:
    """The files of a registration as the nodes that the module makes."""
    fixed_node, warped = read_volume(fixed), read_volume(folder / "warped.nii.gz")
    for node in (fixed_node, warped):
        array = slicer.util.arrayFromVolume(node)
        node.GetDisplayNode().AutoWindowLevelOff()
        window = (-160.0, 300.0) if array.min() < -500 else (0.0, 1.3 * float(np.percentile(array[array > 0], 99.0)))
        node.GetDisplayNode().SetWindowLevelMinMax(*window)
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "transform")
    storage = slicer.vtkMRMLTransformStorageNode()
    slicer.mrmlScene.AddNode(storage)
    storage.SetFileName(str(folder / "transform.h5"))
    if not storage.ReadData(transform):
        raise SystemExit(f"{folder / 'transform.h5'} cannot be read.")
    scene.keep_linear(transform)
    folding = scene.read_volume(read_volume(folder / "folding.nii.gz"))
    return scene.RegistrationNodes(
        fixed=fixed_node,
        moving=warped,
        warped=warped,
        transform=transform,
        jacobian=read_volume(folder / "jacobian.nii.gz"),
        folding=scene._fill_folding(scene._New(slicer.mrmlScene, "moving", "fixed").folding(), folding),
    )


def busiest(nodes: scene.RegistrationNodes) -> np.ndarray:
    """(3,) RAS mm of the place to look at: of each axis the slice with most folding, or the middle without any."""
    folded = np.argwhere(scene.read_labels(nodes.folding, nodes.fixed).array) if has_folding(nodes) else []
    shape = np.array(nodes.fixed.GetImageData().GetDimensions())
    index = (shape - 1) / 2
    if len(folded):
        # folding near the rim makes no picture: count only what lies in the middle half
        counts = [np.bincount(folded[:, axis], minlength=shape[axis]) for axis in range(3)]
        for axis, count in enumerate(counts):
            middle = slice(shape[axis] // 4, -(shape[axis] // 4))
            if count[middle].any():
                index[axis] = shape[axis] // 4 + int(np.argmax(count[middle]))
    return (scene.ijk_to_ras(nodes.fixed) @ [*index, 1.0])[:3]


def has_folding(nodes: scene.RegistrationNodes) -> bool:
    try:
        scene.read_labels(nodes.folding, nodes.fixed)
    except scene.InputError:
        return False
    return True


def save_png(path: Path, pixels: np.ndarray) -> None:
    """(height, width, 3) uint8, first row on top."""
    image = vtk.vtkImageData()
    image.SetDimensions(pixels.shape[1], pixels.shape[0], 1)
    flat = np.ascontiguousarray(pixels[::-1]).reshape(-1, 3)
    image.GetPointData().SetScalars(numpy_support.numpy_to_vtk(flat, deep=True))
    writer = vtk.vtkPNGWriter()
    writer.SetFileName(str(path))
    writer.SetInputData(image)
    writer.Write()
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder that `make demo` wrote")
    default = HERE.parents[1] / "Resources" / "Screenshots"
    parser.add_argument("-o", "--output", type=Path, default=default)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for pair, name, spacing in ((brain_pair(), "slices.png", 6.0), (abdomen_pair(), "slices-abdomen.png", 15.0)):
        with tempfile.TemporaryDirectory() as folder:
            write_image(pair.fixed, Path(folder) / "fixed.nii.gz")
            application = Application()
            nodes = read_result(Path(folder) / "fixed.nii.gz", arguments.demo / pair.name)
        views = ResultViews(nodes)
        slices, offsets = slice_views(application, nodes)
        draw_row(views, slices["Coronal"], spacing, arguments.output / name)
        if pair.name == "brain":
            draw_3d(application, views, nodes, slices, offsets, arguments.output / "view-3d.png")


def slice_views(application: Application, nodes: scene.RegistrationNodes) -> tuple[dict, dict[str, float]]:
    """The three slice views of the fixed volume, and where they stand, by name."""
    slicer.util.setSliceViewerLayers(background=nodes.fixed)
    slices = {
        name: application.slice_view(name, color, size=(400, 420))
        for name, color in (("Axial", "Red"), ("Coronal", "Green"), ("Sagittal", "Yellow"))
    }
    offsets = dict(zip(slices, busiest(nodes)[::-1], strict=True))
    for name, view in slices.items():
        view.composite.SetBackgroundVolumeID(nodes.fixed.GetID())
        view.fit(offsets[name], zoom={"Axial": 1.35, "Coronal": 1.2, "Sagittal": 1.0}[name])
    return slices, offsets


def draw_row(views: ResultViews, view, spacing_mm: float, path: Path) -> None:
    """A row: fixed, warped, grid and folding, Jacobian and folding."""
    views.overlay(True, opacity=0.0)
    row = [view.draw()]
    views.overlay(True, opacity=1.0)
    row.append(view.draw())
    views.overlay(True, opacity=0.0)
    views.folding(True)
    views.grid(True, spacing_mm=spacing_mm)
    row.append(view.draw())
    views.grid(False)
    views.jacobian(True)
    row.append(view.draw())
    views.jacobian(False)
    gap = np.full((row[0].shape[0], 6, 3), 255, np.uint8)
    save_png(path, np.hstack([part for picture in row for part in (picture, gap)][:-1]))


def draw_3d(application: Application, views: ResultViews, nodes, slices: dict, offsets: dict, path: Path) -> None:
    """In 3D: two slices cut out of their black surroundings, the grid of a third, the folding as a surface."""
    display = nodes.fixed.GetDisplayNode()
    display.SetThreshold(0.08 * display.GetWindowLevelMax(), 1e9)
    display.ApplyThresholdOn()
    views.overlay(False)
    slicer.util.setSliceViewerLayers(background=nodes.fixed)
    views.grid(True, spacing_mm=7.0, region=slices["Axial"].node, in_3d=True)
    for name in ("Coronal", "Sagittal"):
        slices[name].fit(offsets[name])
        slices[name].node.SetSliceVisible(1)
        slices[name].draw()
    three_d = application.three_d_view((960, 760))
    three_d.node.SetBoxVisible(False)
    three_d.node.SetAxisLabelsVisible(False)
    three_d.look((-0.5, 1.0, -0.5), zoom=1.75)
    save_png(path, three_d.draw())


if __name__ == "__main__":
    main()
