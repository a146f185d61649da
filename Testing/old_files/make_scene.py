"""Make the saved scene of before in a checkout of commit 78e58be, after make_engine_files.py; README.txt says how.

Its imports are those of that commit. The panel registers two small synthetic volumes with two segmentations, as a user
does, and the scene is saved with its files; expected.json holds what was in it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import SlicerStandIn

HERE = Path(__file__).resolve().parent
SCENE = HERE / "scene"
VOLUMES = ("fixed", "moving", "warped", "aligned", "jacobian")
ATTRIBUTE = "MorphSeek.Report"
STORAGE = {"Transform": "h5", "Segmentation": "seg.nrrd", "ScalarVolume": "nrrd", "LabelMapVolume": "nrrd"}


def main() -> None:
    """Register in the panel, set every parameter off its default, and save."""
    application = SlicerStandIn.start()
    application.fresh()
    register_and_save(application)
    application.unload()


def register_and_save(application) -> None:
    """Do what a user does."""
    import slicer
    import slicer.util

    module = application.load_module(Path("MorphSeek/MorphSeek.py").resolve())
    application.show(module.widgetRepresentation())
    module.widgetRepresentation().enter()
    panel = slicer.modules.MorphSeekWidget.panels["register"]
    from MorphSeekGui.parameters import Alignment, Fit, FitBy

    fixed, fixed_labels = blob("F", 0.0)
    moving, moving_labels = blob("M", 3.0)
    initial = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "start")
    matrix = np.eye(4)
    matrix[:3, 3] = (1.5, -1.0, 0.5)
    slicer.util.updateTransformMatrixFromArray(initial, matrix)
    results = []
    panel.on_result.append(results.append)
    p = panel.logic.getParameterNode()
    p.fixedVolume, p.movingVolume, p.fixedLabels, p.movingLabels = fixed, moving, fixed_labels, moving_labels
    p.initialTransform, p.alignment, p.inverse = initial, Alignment.RIGID, True
    p.fit, p.fitBy, p.device = Fit.IMAGE_GRID, FitBy.MIND, "cpu"
    panel.refresh_models(str(HERE / "run" / "blobs.safetensors"))
    application.process()
    panel.ui.stepsSpinBox.value = 3
    panel.ui.registerButton.click()
    application.wait(lambda: panel._run is None)
    [nodes] = results
    p = panel.logic.getParameterNode()
    p.model, p.steps, p.stopEarly, p.showSteps = "hippocampus-mr", 3, True, False
    p.outputVolume, p.outputTransform = nodes.warped, nodes.transform
    expected = {
        "roles": {role: getattr(nodes, role).GetName() for role in (*VOLUMES, "folding", "inverse", "warped_labels")},
        "transform": nodes.transform.GetName(),
        "report": nodes.report,
        "means": {role: float(slicer.util.arrayFromVolume(getattr(nodes, role)).mean()) for role in VOLUMES},
        "warped_labels": counts(slicer.util.arrayFromVolume(nodes.warped_labels)),
        "points": points_through(nodes),
    }
    save(expected)


def blob(name: str, shift: float):
    """Two nested ellipsoids, moved along i by so many mm, and a segmentation of them."""
    import slicer
    import slicer.util

    k, j, i = np.mgrid[:12, :14, :13] * 2.5
    inner = np.sqrt(((i - 14 - shift) / 6.5) ** 2 + ((j - 16) / 8) ** 2 + ((k - 14) / 6) ** 2)
    values = 60.0 * (inner < 1.6) + 100.0 * (inner < 1) + 2 * np.sin(i + 2 * j + 3 * k)
    volume = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    volume.SetSpacing(2.5, 2.5, 2.5)
    volume.SetOrigin(-20.0, 10.0, 5.0)
    slicer.util.updateVolumeFromArray(volume, np.round(values).astype(np.int16))
    volume.CreateDefaultDisplayNodes()
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{name} segments")
    segmentation.CreateDefaultDisplayNodes()
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    from MorphSeekGui.scene import ijk_to_ras, to_vtk
    from vtk.util import numpy_support

    for label, mask, color in (
        ("shell", (inner >= 1) & (inner < 1.6), [0.0, 1.0, 0.0]),
        ("core", inner < 1, [0.0, 0.0, 1.0]),
    ):
        image = slicer.vtkOrientedImageData()
        image.SetDimensions(*mask.shape[::-1])
        image.GetPointData().SetScalars(numpy_support.numpy_to_vtk(mask.astype(np.uint8).ravel(), deep=True))
        image.SetImageToWorldMatrix(to_vtk(ijk_to_ras(volume)))
        segmentation.AddSegmentFromBinaryLabelmapRepresentation(image, label, color)
    return volume, segmentation


def counts(array: np.ndarray) -> dict[str, int]:
    """Voxels of each label."""
    values, numbers = np.unique(array, return_counts=True)
    return {str(int(value)): int(number) for value, number in zip(values, numbers, strict=True)}


def points_through(nodes) -> list[list[list[float]]]:
    """Points (RAS mm) of the fixed volume, and where the transform and the inverse lead them."""
    points = np.array([[-6.0, 26.0, 19.0], [-3.0, 30.0, 22.0], [-10.0, 22.0, 14.0]])
    found = [points.tolist()]
    for node in (nodes.transform, nodes.inverse):
        transform = node.GetTransformFromParent()
        found.append([list(transform.TransformPoint(point)) for point in points])
    return found


def save(expected: dict) -> None:
    """Write each node's file as Slicer names them, and the scene."""
    import slicer

    shutil.rmtree(SCENE, ignore_errors=True)
    SCENE.mkdir()
    scene = slicer.mrmlScene
    scene.SetRootDirectory(str(SCENE))
    for n in range(scene.GetNumberOfNodes()):
        node = scene.GetNthNode(n)
        kind = next((suffix for name, suffix in STORAGE.items() if node.GetClassName() == f"vtkMRML{name}Node"), None)
        if kind is None:
            continue
        storage = node.CreateDefaultStorageNode()
        storage.UnRegister(None)
        scene.AddNode(storage)
        storage.SetFileName(str(SCENE / f"{node.GetName()}.{kind}"))
        storage.SetUseCompression(True)
        assert storage.WriteData(node), node.GetName()
        node.SetAndObserveStorageNodeID(storage.GetID())
    scene.SetURL(str(SCENE / "scene.mrml"))
    assert scene.Commit()
    (SCENE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
