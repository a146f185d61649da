"""MRML nodes in and out: volumes, labels and transforms as the engine takes them, and its results as nodes.

Two worlds meet here and nowhere else. MRML: RAS mm, arrays (k, j, i), a node's coordinates may lie under parent
transforms. The engine: LPS mm, arrays (i, j, k), no parents.

Parent transforms. The fixed volume is registered where it stands in the world, the moving volume too, so a linear
parent transform counts as part of the image's geometry; a non-linear one is refused. All results lie in world
coordinates and have no parent. The transform node leads from the fixed volume's world place to the moving volume's OWN
coordinates: choose it as the moving volume's transform (instead of a parent that it had, which is contained) and the
moving volume appears as the warped volume does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import slicer
import slicer.util
import vtk
from vtk.util import numpy_support

from MorphSeekLib.protocol.messages import Answer, ArrayReference
from MorphSeekLib.protocol.report import SavedReport, StepSection, TrustSection

try:
    from slicer.i18n import tr as _
except ImportError:  # slicer-core has no translations

    def _(text: str) -> str:
        return text


FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS
# the transform node's attribute that holds the report; it marks the transform as a registration's result
REPORT = "MorphSeek.Report"
LABEL_TAG = "MorphSeek.Label"  # of a warped segment: the value that it had in the engine
ESTIMATED = ("trust", "trust_colors")  # the roles of the nodes of an estimated error
_ROLES = ("fixed", "moving", "warped", "jacobian", "folding", "inverse", "aligned", "warped_labels", *ESTIMATED)
_FEW, _SHOWN = 48, 0.02  # voxels along an axis that are looked at; share of the values above which one is shown
_OPTIONAL = ("inverse", "aligned", "warped_labels", *ESTIMATED)
# an initial transform is sampled on at most about this many points of the fixed grid (a 1 mm head has seven million)
_MOST_SAMPLES = 8_000_000
_SAME_MM = 1e-3
_LARGEST_LABEL = 2**31 - 1  # the engine takes 32 bits


class InputError(ValueError):
    """A node that cannot be registered; the text is one sentence that says why and what to do."""


@dataclass
class Image:
    """What the engine needs of a volume: voxels (i, j, k), and where they lie (4x4, voxel -> LPS mm)."""

    array: np.ndarray
    affine: np.ndarray


@dataclass
class Labels:
    """A label array on a volume's grid, and what its values mean.

    Attributes:
        array: (i, j, k) int32, 0 = background.
        names: label value -> (segment's name, its RGB color); empty for a label map volume.
        color_node_id: the label map volume's color table, None for a segmentation.
        warning: a sentence about what the array could not take over, or "".
    """

    array: np.ndarray
    names: dict[int, tuple[str, tuple[float, float, float]]] = field(default_factory=dict)
    color_node_id: str | None = None
    warning: str = ""


@dataclass
class Estimate:
    """The estimated error of a registration on the fixed grid, in world coordinates.

    Attributes:
        bound: mm below which the error lies in four of five places; None where no millimeters are known.
        colors: 1 likely near, 2 in between, 3 not to be relied on; 0 where nothing is said.
        section: its figures.
    """

    bound: Image | None
    colors: Image
    section: TrustSection


class StepState(TypedDict):
    """What the engine needs to take further steps, its arrays in memory; see
    :class:`MorphSeekLib.protocol.messages.StateReference`. ``places``: where the two volumes stood, (4, 4) LPS."""

    start: dict[str, list[list[float]] | Image]
    align: str
    figures: list[StepSection]
    total: np.ndarray
    places: list[np.ndarray]


# a field of RegistrationNodes -> the node that takes the result instead of a new one, or None
Into = Mapping[str, object]


@dataclass
class RegistrationNodes:
    """What a registration leaves in the scene.

    Attributes:
        fixed, moving: the volumes that were registered.
        warped: the moving volume on the fixed grid (world coordinates, float).
        transform: fixed (world) -> moving (its own coordinates), as TransformFromParent: put the moving
            volume under it.
        inverse: the other way round, or None.
        jacobian: determinant of the transform's Jacobian on the fixed grid by central differences; 1 keeps volume.
        folding: segmentation with one segment, the fixed voxels that meet a folded cell of the transform.
        aligned: the moving volume on the fixed grid after the alignment alone, for "before"; None from a worker that
            sends none.
        warped_labels: the moving labels on the fixed grid, a segmentation where one was given; or None.
        trust, trust_colors: the estimated error as volumes, see :class:`Estimate`; None where it was not estimated, or
            no millimeters are known.
        report: the engine's figures (report.json).
        state: what the engine needs to take one more step, arrays included; None when the worker gave none.
    """

    fixed: slicer.vtkMRMLScalarVolumeNode
    moving: slicer.vtkMRMLScalarVolumeNode
    warped: slicer.vtkMRMLScalarVolumeNode
    transform: slicer.vtkMRMLTransformNode
    jacobian: slicer.vtkMRMLScalarVolumeNode
    folding: slicer.vtkMRMLSegmentationNode
    inverse: slicer.vtkMRMLTransformNode | None = None
    aligned: slicer.vtkMRMLScalarVolumeNode | None = None
    warped_labels: slicer.vtkMRMLSegmentationNode | slicer.vtkMRMLLabelMapVolumeNode | None = None
    trust: slicer.vtkMRMLScalarVolumeNode | None = None
    trust_colors: slicer.vtkMRMLScalarVolumeNode | None = None
    report: SavedReport = field(default_factory=dict)
    state: StepState | None = None


# ---------------------------------------------------------------------------------------------------------- nodes in


def read_volume(node, space=None) -> Image:
    """Return a scalar volume node's voxels and place.

    Args:
        node: the volume node. Its voxels are shared with the returned array where their type allows, not copied.
        space: transform node in whose coordinates the place is wanted; None for the world.

    Raises:
        InputError: no scalar 3D volume, empty, or under a non-linear transform.
    """
    array = voxels(node)
    return Image(array, FLIP @ matrix_to_space(node, space) @ ijk_to_ras(node))


def size_of(node) -> dict[str, object]:
    """Return the ``shape`` of a scalar volume, its ``affine`` (voxel -> LPS mm) and the share ``shown`` of each axis
    that the box around what it shows takes, by every few voxels.

    Raises:
        InputError: as :func:`read_volume`.
    """
    image = read_volume(node)
    few = image.array[tuple(slice(None, None, max(1, n // _FEW)) for n in image.array.shape)].astype(np.float32)
    low, high = np.percentile(few, [0, 99])
    places = np.argwhere(few > low + _SHOWN * (high - low))
    shown = (np.ptp(places, axis=0) + 1) / few.shape if len(places) else np.ones(3)
    return {"shape": list(image.array.shape), "affine": image.affine.tolist(), "shown": shown.tolist()}


def file_of(node) -> dict[str, str]:
    """Return where a volume node was loaded from, for the worker to look at: {"file": path}, or {} when there is no
    file."""
    storage = node.GetStorageNode()
    path = storage.GetFullNameFromFileName() if storage is not None and storage.GetFileName() else ""
    return {"file": path} if path else {}


def matrix_to_space(node, space=None) -> np.ndarray:
    """Return (4, 4) RAS: from the node's own coordinates, through its parent transforms, to ``space`` (None: the
    world).

    Raises:
        InputError: a transform on the way is not linear.
    """
    parent = node.GetParentTransformNode()
    matrix = linear_between(parent, space)
    if matrix is None:
        raise InputError(
            _(
                "'{node}' is under the non-linear transform '{transform}': harden it (Data module), or take the "
                "volume out of it and choose '{transform}' as the initial transform of a moving volume."
            ).format(node=node.GetName(), transform=_nonlinear_ancestor(parent).GetName())
        )
    return matrix


def read_labels(node, reference, numbers: dict[str, int] | None = None) -> Labels:
    """Read labels on the grid of a volume.

    A label map on another grid is resampled (nearest neighbor). The segments of a segmentation get the numbers 1, 2,
    3, ... in their order unless ``numbers`` says otherwise; where segments overlap, the later one wins, and the labels'
    ``warning`` says so.

    Args:
        node: label map volume, scalar volume with whole numbers, or segmentation.
        reference: the volume node whose grid is wanted.
        numbers: segment's name -> label; a name that is missing is added with the next free number, so that the same
            dict read for a second segmentation matches the segments by name.

    Raises:
        InputError: neither kind of node, fractions, nothing inside the volume, or non-linear transforms between them.
    """
    to_labels = _to_labels(node, reference)
    shape = reference.GetImageData().GetDimensions()
    if isinstance(node, slicer.vtkMRMLSegmentationNode):
        labels = _read_segmentation(node, to_labels, shape, {} if numbers is None else numbers)
    else:
        labels = _read_label_map(node, to_labels, shape)
    if not labels.array.any():
        raise InputError(
            _("'{node}' has no label inside the volume '{volume}'; choose the labels that belong to it.").format(
                node=node.GetName(), volume=reference.GetName()
            )
        )
    return labels


def read_label_pair(
    fixed_labels, fixed, moving_labels, moving, numbers: dict[str, int] | None = None
) -> tuple[Labels | None, Labels | None]:
    """Return the labels of both volumes, numbered alike: label maps by their values, segmentations by the segments'
    names.

    Any of the two may be None.

    Args:
        fixed_labels, fixed, moving_labels, moving: the labels, each with its volume.
        numbers: of earlier pairs that are to be numbered like this one, see :func:`read_labels`.

    Raises:
        InputError: as :func:`read_labels`; or a label map and a segmentation, which nothing matches.
    """
    if fixed_labels is not None and moving_labels is not None:
        kinds = {isinstance(n, slicer.vtkMRMLSegmentationNode) for n in (fixed_labels, moving_labels)}
        if len(kinds) == 2:
            raise InputError(
                _(
                    "One of '{a}' and '{b}' is a segmentation, the other a label map, and nothing says which labels "
                    "belong together; import the label map into a segmentation with the same segment names."
                ).format(a=fixed_labels.GetName(), b=moving_labels.GetName())
            )
    numbers = {} if numbers is None else numbers
    first = read_labels(fixed_labels, fixed, numbers) if fixed_labels is not None else None
    known = {name for name, _color in first.names.values()} if first is not None else set()
    second = read_labels(moving_labels, moving, numbers) if moving_labels is not None else None
    if known and second is not None and not known & {name for name, _color in second.names.values()}:
        raise InputError(
            _("'{a}' and '{b}' have no segment name in common; give the same structures the same names.").format(
                a=fixed_labels.GetName(), b=moving_labels.GetName()
            )
        )
    return first, second


def read_mask(node, reference) -> np.ndarray:
    """Return what a mask marks of a volume: a label map by everything but 0, a segmentation by its visible segments.

    Args:
        node: label map volume, scalar volume with whole numbers, or segmentation, on any grid (nearest neighbor).
        reference: the volume node.

    Returns:
        (i, j, k) uint8 on the volume's grid, 1 where it is marked.

    Raises:
        InputError: neither kind of node, fractions, all segments hidden, nothing inside the volume, or non-linear
            transforms between them.
    """
    to_mask = _to_labels(node, reference)
    shape = reference.GetImageData().GetDimensions()
    if isinstance(node, slicer.vtkMRMLSegmentationNode):
        ids, values = vtk.vtkStringArray(), vtk.vtkIntArray()
        for name in _visible_segments(node):
            ids.InsertNextValue(name)
            values.InsertNextValue(1)
        if node.GetSegmentation().GetNumberOfSegments() and not ids.GetNumberOfValues():
            raise InputError(
                _("All segments of '{node}' are hidden; show those that are meant (Segmentations module).").format(
                    node=node.GetName()
                )
            )
        marked = _merge_segments(node, _geometry(to_mask, shape), ids, values) != 0
    else:
        marked = _read_label_map(node, to_mask, shape).array != 0
    if not marked.any():
        raise InputError(
            _("'{node}' marks nothing inside the volume '{volume}'; choose one that was drawn on it.").format(
                node=node.GetName(), volume=reference.GetName()
            )
        )
    return marked.astype(np.uint8)


def _visible_segments(node) -> list[str]:
    """Return the ids of a segmentation's visible segments; of all where it was never shown."""
    ids, display = vtk.vtkStringArray(), node.GetDisplayNode()
    node.GetSegmentation().GetSegmentIDs(ids)
    names = [ids.GetValue(n) for n in range(ids.GetNumberOfValues())]
    return [name for name in names if display is None or display.GetSegmentVisibility(name)]


def read_points(node, space=None) -> dict[str, list] | None:
    """Return the points of a markups node as the worker takes them: "labels", and "positions" in LPS mm.

    Args:
        node: the markups; None for none.
        space: transform node in whose coordinates the positions are wanted; None for the world.

    Raises:
        InputError: no point, one that is not placed, or under a non-linear transform.
    """
    if node is None:
        return None
    count = node.GetNumberOfControlPoints()
    if not count or node.GetNumberOfDefinedControlPoints() < count:
        raise InputError(
            _("'{node}' has no points, or some that are not placed; place them or delete them.").format(
                node=node.GetName()
            )
        )
    to_lps = FLIP @ matrix_to_space(node, space)
    local = slicer.util.arrayFromMarkupsControlPoints(node)
    positions = local @ to_lps[:3, :3].T + to_lps[:3, 3]
    return {"labels": [node.GetNthControlPointLabel(n) for n in range(count)], "positions": positions.tolist()}


def read_transform(node, fixed: Image) -> np.ndarray | Image:
    """Return what an initial transform node says: where the moving volume would lie if it were under it.

    Beyond its grid a grid transform moves points as its edge does, and so does a B-spline beyond its domain, where
    Slicer lets it fade to nothing.

    Args:
        node: any transform node; its parents count too.
        fixed: the fixed volume in the world, on whose grid a non-linear transform is sampled.

    Returns:
        (4, 4) LPS, fixed -> moving, if it is linear; else an Image of displacements (3, i, j, k), LPS mm, fixed ->
        moving, on the fixed grid (on every n-th voxel of very large ones).

    Raises:
        InputError: it has no finite value somewhere on the fixed grid.
    """
    if node.IsTransformToWorldLinear():
        matrix = vtk.vtkMatrix4x4()
        node.GetMatrixTransformFromWorld(matrix)
        return FLIP @ slicer.util.arrayFromVTKMatrix(matrix) @ FLIP
    shape = np.array(fixed.array.shape)
    stride = 1
    while np.prod(nodes := np.ceil((shape - 1) / stride).astype(int) + 1) > _MOST_SAMPLES:
        stride += 1
    affine = fixed.affine @ np.diag([stride, stride, stride, 1.0])
    from_world, links = vtk.vtkGeneralTransform(), vtk.vtkCollection()
    node.GetTransformFromWorld(from_world)
    slicer.vtkMRMLTransformNode.FlattenGeneralTransform(links, from_world)
    points = np.stack(_node_points(FLIP @ affine, tuple(nodes)), axis=-1).reshape(-1, 3)
    moved = points
    for n in range(links.GetNumberOfItems()):
        moved = _through_link(links.GetItemAsObject(n), moved)
    displacement = np.float32((moved - points) * np.diag(FLIP)[:3]).T.reshape(3, *nodes)
    if not np.isfinite(displacement).all():
        raise InputError(
            _("The transform '{node}' has no finite value everywhere in the fixed volume; choose another one.").format(
                node=node.GetName()
            )
        )
    return Image(displacement, affine)


def _through_link(transform, points: np.ndarray) -> np.ndarray:
    """Return (n, 3) RAS points through one transform of a chain; a B-spline goes on beyond its domain as at its
    edge."""
    if not isinstance(transform, slicer.vtkOrientedBSplineTransform) or transform.GetInverseFlag():
        return _through(transform, points)  # a grid transform of VTK keeps its edge value, and inverses are VTK's
    coefficients, turn = transform.GetCoefficientData(), transform.GetGridDirectionMatrix()
    to_ras = np.eye(4) if turn is None else slicer.util.arrayFromVTKMatrix(turn)
    to_ras = to_ras @ np.diag([*coefficients.GetSpacing(), 1.0])
    to_ras[:3, 3] = coefficients.GetOrigin()
    index = (points - to_ras[:3, 3]) @ np.linalg.inv(to_ras[:3, :3]).T
    # a cubic spline has one more row of coefficients on each side of its domain
    held = index.clip(1, np.array(coefficients.GetDimensions()) - 2) @ to_ras[:3, :3].T + to_ras[:3, 3]
    bulk = transform.GetBulkTransformMatrix()
    bulk = np.eye(4) if bulk is None else slicer.util.arrayFromVTKMatrix(bulk)
    return _through(transform, held) + (points - held) @ bulk[:3, :3].T


def _through(transform, points: np.ndarray) -> np.ndarray:
    """Return (n, 3) points through any transform of VTK."""
    points = np.ascontiguousarray(points)  # VTK keeps no copy
    before, after = vtk.vtkPoints(), vtk.vtkPoints()
    before.SetData(numpy_support.numpy_to_vtk(points))
    after.SetDataTypeToDouble()
    transform.TransformPoints(before, after)
    return numpy_support.vtk_to_numpy(after.GetData())


def save_image(image: Image, path: Path) -> ArrayReference:
    """Write voxels as .npy (no copy is made of a volume's own) and return the reference that the worker takes."""
    np.save(path, image.array)
    return {"path": str(path), "affine": image.affine.tolist()}


def load_image(reference: ArrayReference | None) -> Image | None:
    """Return the worker's reference as a memory-mapped image; None stays None."""
    if reference is None:
        return None
    array = np.load(reference["path"], mmap_mode="r", allow_pickle=False)
    return Image(array, np.array(reference["affine"], dtype=np.float64))


# --------------------------------------------------------------------------------------------------------- nodes out


@contextmanager
def all_or_nothing(scene) -> Iterator[None]:
    """Remove the nodes that the block adds to the scene if it fails."""
    before = {node.GetID() for node in _all_nodes(scene)}
    try:
        yield
    except BaseException:
        for node in reversed(_all_nodes(scene)):
            if node.GetID() not in before:
                scene.RemoveNode(node)
        raise


def create_nodes(
    result: Answer, fixed, moving, moving_to_space=None, labels: Labels | None = None, into: Into | None = None
) -> RegistrationNodes:
    """Make nodes of the worker's answer to "register". All is read before the first node is made, and if anything
    fails none is left.

    Args:
        result: {"warped", "aligned", "displacement", "inverse", "jacobian", "folding", "warped_labels", "trust",
            "trust_colors", "report"}: references as :func:`load_image` takes them, in the coordinates that were sent.
        fixed, moving: the volume nodes that were sent.
        moving_to_space: (4, 4) RAS, the moving volume's own coordinates -> those it was sent in; None if the same.
        labels: the moving labels that were sent, for the names and colors of the warped ones.
        into: field of :class:`RegistrationNodes` -> node of the scene that takes the result instead of a new one.
    """
    names = ("warped", "aligned", "displacement", "inverse", "jacobian", "folding", "warped_labels")
    warped, aligned, displacement, inverse, jacobian, folding, warped_labels = (
        load_image(result.get(n)) for n in names
    )
    back = None if moving_to_space is None else np.linalg.inv(moving_to_space)
    transform = grid_transform(displacement, target=back)
    inverse = None if inverse is None else grid_transform(inverse, source=back)
    scene, title = slicer.mrmlScene, moving.GetName()
    report = result.get("report") or {}
    estimate = read_estimate({**result, "section": report.get("trust")})
    into = {name: node for name, node in (into or {}).items() if node is not None and scene.IsNodePresent(node)}
    new = _New(scene, title, fixed.GetName())
    with all_or_nothing(scene):
        nodes = RegistrationNodes(
            fixed=fixed,
            moving=moving,
            warped=fill_volume(into.get("warped") or new.volume("warped"), warped),
            transform=_fill_transform(
                into.get("transform") or new.transform("transform", report), transform, fixed, moving, report
            ),
            jacobian=fill_volume(into.get("jacobian") or new.volume("jacobian"), jacobian),
            folding=_fill_folding(into.get("folding") or new.folding(), folding),
            report=report,
        )
        nodes.folding.SetReferenceImageGeometryParameterFromVolumeNode(nodes.warped)
        if "warped" not in into:
            copy_window(moving, nodes.warped)
        if aligned is not None:
            nodes.aligned = fill_volume(into.get("aligned") or new.volume("aligned"), aligned)
            if "aligned" not in into:
                copy_window(moving, nodes.aligned)
        if inverse is not None:
            nodes.inverse = _fill_transform(into.get("inverse") or new.transform("inverse"), inverse, moving, fixed)
        if warped_labels is not None:
            nodes.warped_labels = _fill_labels(into.get("warped_labels"), warped_labels, labels or Labels(None), new)
        forget_estimate(nodes.transform)
        _remember(nodes)
        put_into_folder(nodes, new.nodes)
        if estimate is not None:
            add_estimate(nodes, estimate)
    return nodes


def read_estimate(answer: Answer) -> Estimate | None:
    """Return the estimated error of the worker's answer to "estimate"; None where it has none."""
    colors = load_image(answer.get("trust_colors"))
    return None if colors is None else Estimate(load_image(answer.get("trust")), colors, answer["section"])


def add_estimate(nodes: RegistrationNodes, estimate: Estimate) -> None:
    """Make the estimated error part of a registration, as volumes and in its report, in place of an earlier one."""
    scene, name = nodes.transform.GetScene(), nodes.moving.GetName()
    plain = {"trust": _("{name} error bound, mm"), "trust_colors": _("{name} estimated error")}
    names = free_names(scene, {role: text.format(name=name) for role, text in plain.items()})
    images = {"trust": estimate.bound, "trust_colors": estimate.colors}
    nodes.trust = nodes.trust_colors = None
    forget_estimate(nodes.transform)
    with all_or_nothing(scene):
        for role, image in images.items():
            if image is not None:
                node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", names[role])
                setattr(nodes, role, fill_volume(node, image))
        nodes.report = {**nodes.report, "trust": estimate.section}
        _mark(nodes.transform, nodes.report)
        _remember(nodes)
        put_into_folder(nodes, [getattr(nodes, role) for role, image in images.items() if image is not None])


def estimate_of(nodes: RegistrationNodes) -> Estimate | None:
    """Return a copy of the estimated error that a registration has; None without one."""
    section = nodes.report.get("trust")
    if nodes.trust_colors is None or section is None:
        return None
    bound, colors = (
        None if node is None else Image(voxels(node).copy(), FLIP @ ijk_to_ras(node))
        for node in (nodes.trust, nodes.trust_colors)
    )
    return Estimate(bound, colors, section)


def forget_estimate(transform) -> None:
    """Remove the volumes of the estimated error of the registration of a transform node, which is another one now."""
    for role in ESTIMATED:
        node = transform.GetNodeReference(f"MorphSeek.{role}")
        for part in (node, node.GetDisplayNode()) if node is not None else ():
            if part is not None:
                transform.GetScene().RemoveNode(part)


class _New:
    """Makes the nodes of one registration; all bear the same number where the plain names are taken.

    Args:
        scene: where to.
        moving, fixed: the volumes' names.
    """

    def __init__(self, scene, moving: str, fixed: str) -> None:
        self._scene = scene
        plain = {
            "warped": _("{name} warped").format(name=moving),
            "aligned": _("{name} aligned").format(name=moving),
            "jacobian": _("{name} Jacobian").format(name=moving),
            "folding": _("{name} folding").format(name=moving),
            "labels": _("{name} warped labels").format(name=moving),
            "colors": _("{name} warped label colors").format(name=moving),
            "transform": _("{name} to {onto}").format(name=moving, onto=fixed),
            "inverse": _("{name} to {onto}").format(name=fixed, onto=moving),
        }
        self.names = free_names(scene, plain)
        self.nodes: list = []

    def node(self, kind: str, role: str, mark: SavedReport | None = None):
        """Return a new node of a class, with its role's name."""
        node = self._scene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetName(self.names[role])
        _mark(node, mark)  # before it is added: node selectors look at what is new only once
        self.nodes.append(self._scene.AddNode(node))
        return self.nodes[-1]

    def volume(self, role: str):
        """Return a new scalar volume."""
        return self.node("vtkMRMLScalarVolumeNode", role)

    def transform(self, role: str, report: SavedReport | None = None):
        """Return a new transform; with a report it is known as a registration's result."""
        return self.node("vtkMRMLTransformNode", role, report)

    def folding(self):
        """Return a new segmentation whose surface shows every folded voxel."""
        node = self.node("vtkMRMLSegmentationNode", "folding")
        node.CreateDefaultDisplayNodes()
        node.GetDisplayNode().SetVisibility(False)  # until views.py is asked to show it
        # smoothing and decimation would swallow the small ones
        node.GetSegmentation().SetConversionParameter("Smoothing factor", "0.0")
        node.GetSegmentation().SetConversionParameter("Decimation factor", "0.0")
        return node


def free_names(scene, names: dict[str, str]) -> dict[str, str]:
    """Return names that no node of the scene has: as they are, or all with the same number behind."""
    taken = {node.GetName() for node in _all_nodes(scene)}
    number, free = 1, dict(names)
    while taken & set(free.values()):
        number += 1
        free = {role: f"{name} ({number})" for role, name in names.items()}
    return free


def put_into_folder(nodes: RegistrationNodes, members: list) -> None:
    """Put nodes into the subject hierarchy's folder of a registration, which bears its transform's name.

    Args:
        nodes: the registration; its folder is made when it has none.
        members: the nodes; those that the user made stay where the user put them.
    """
    scene = nodes.transform.GetScene()
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    if hierarchy is None or not members:
        return
    folder = _folder_of(hierarchy, nodes.transform)
    if folder is None:
        folder = hierarchy.CreateFolderItem(hierarchy.GetSceneItemID(), nodes.transform.GetName())
        hierarchy.SetItemAttribute(folder, REPORT, nodes.transform.GetID())
    for node in members:
        item = hierarchy.GetItemByDataNode(node)
        if item:
            hierarchy.SetItemParent(item, folder)
        else:
            hierarchy.CreateItem(folder, node)


def _folder_of(hierarchy, transform) -> int | None:
    """Return the folder that was made for a transform's registration, if it is still there."""
    made_for = transform.GetID()
    return next((i for i in hierarchy_items(hierarchy) if hierarchy.GetItemAttribute(i, REPORT) == made_for), None)


def hierarchy_items(hierarchy) -> list[int]:
    """Return all items of a subject hierarchy."""
    items = vtk.vtkIdList()
    hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), items, True)
    return [items.GetId(n) for n in range(items.GetNumberOfIds())]


def _remember(nodes: RegistrationNodes) -> None:
    """Make the transform node know its registration, so that a saved scene still does when it is loaded again."""
    for role in _ROLES:
        node = getattr(nodes, role)
        nodes.transform.SetNodeReferenceID(f"MorphSeek.{role}", node.GetID() if node is not None else None)


def result_nodes(transform) -> RegistrationNodes | None:
    """Return the registration that a transform node came from, or None if it came from none or not all of it is left.
    Its transforms are made linear, see :func:`keep_linear`."""
    if transform is None or transform.GetAttribute(REPORT) is None:
        return None
    keep_linear(transform)
    parts = {role: transform.GetNodeReference(f"MorphSeek.{role}") for role in _ROLES}
    if any(parts[role] is None for role in _ROLES if role not in _OPTIONAL):
        return None
    # a scene whose files were moved has the nodes without their voxels
    if any(parts[role].GetImageData() is None for role in ("fixed", "warped", "jacobian")):
        return None
    for role in ESTIMATED:
        if parts[role] is not None and parts[role].GetImageData() is None:
            parts[role] = None
    try:
        report = json.loads(transform.GetAttribute(REPORT))
    except ValueError:
        report = {}
    return RegistrationNodes(transform=transform, report=report, **parts)


def made_by_registrations(scene) -> set[str]:
    """Return the IDs of the nodes of a scene that registrations made."""
    made = set()
    for n in range(scene.GetNumberOfNodesByClass("vtkMRMLTransformNode")):
        transform = scene.GetNthNodeByClass(n, "vtkMRMLTransformNode")
        if transform.GetAttribute(REPORT) is not None:
            parts = (transform.GetNodeReferenceID(f"MorphSeek.{role}") for role in _ROLES[2:])
            made |= {part for part in (transform.GetID(), *parts) if part}
    return made


def keep_linear(transform) -> None:
    """Interpolate a result's transform, and its inverse, linearly: the map whose folds were judged.

    Slicer sets transforms that it reads from files to cubic, which is another map.
    """
    for node in (transform, transform.GetNodeReference("MorphSeek.inverse")):
        for get in (node.GetTransformFromParentAs, node.GetTransformToParentAs) if node is not None else ():
            grid = get("vtkOrientedGridTransform", False)
            if grid is not None and grid.GetInterpolationMode() != vtk.VTK_LINEAR_INTERPOLATION:
                grid.SetInterpolationModeToLinear()


def keep_results_linear(scene) -> None:
    """Do :func:`keep_linear` for every result in a scene."""
    for n in range(scene.GetNumberOfNodesByClass("vtkMRMLTransformNode")):
        node = scene.GetNthNodeByClass(n, "vtkMRMLTransformNode")
        if node.GetAttribute(REPORT) is not None:
            keep_linear(node)


def grid_transform(displacement: Image, source=None, target=None) -> vtk.vtkObject:
    """Return a vtkOrientedGridTransform from displacements, to be set as TransformFromParent.

    Args:
        displacement: (3, i, j, k) LPS mm at the grid's nodes, T(p) = p + d(p).
        source, target: (4, 4) RAS or None (identity): the result is target o T o source^-1. Both are exact: the nodes
            of the grid move along with ``source``, and an affine map of a linear interpolation interpolates linearly.
    """
    shape = displacement.array.shape[1:]
    affine = FLIP @ displacement.affine
    field = np.empty((*shape[::-1], 3), np.float32)  # (k, j, i, RAS)
    source = np.eye(4) if source is None else source
    target = np.eye(4) if target is None else target
    if np.array_equal(source, target) and np.array_equal(target, np.eye(4)):  # nearly always, and ten times as fast
        for axis in range(3):
            np.multiply(displacement.array[axis].T, np.float32(FLIP[axis, axis]), out=field[..., axis])
    else:
        vectors = [FLIP[a, a] * np.asarray(displacement.array[a], np.float64).T for a in range(3)]
        # target (p + d) - source p = (target - source) p + target d: the small d is never added to the large p
        shift = _node_points((target - source) @ affine, shape)
        for axis in range(3):
            field[..., axis] = shift[axis].T + sum(target[axis, b] * vectors[b] for b in range(3))
        affine = source @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = np.eye(4)
    direction[:3, :3] = affine[:3, :3] / spacing
    image = vtk.vtkImageData()
    image.SetDimensions(*shape)
    image.SetSpacing(*spacing)
    image.SetOrigin(*affine[:3, 3])
    image.GetPointData().SetScalars(numpy_support.numpy_to_vtk(field.reshape(-1, 3), deep=True))
    transform = slicer.vtkOrientedGridTransform()
    transform.SetDisplacementGridData(image)
    transform.SetGridDirectionMatrix(to_vtk(direction))
    transform.SetInterpolationModeToLinear()
    return transform


# ----------------------------------------------------------------------------------------------------------- helpers


def ijk_to_ras(volume) -> np.ndarray:
    """Return (4, 4) voxel -> the volume node's own coordinates (its parent transforms left out)."""
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def to_vtk(matrix: np.ndarray) -> vtk.vtkMatrix4x4:
    """Return a (4, 4) array as VTK's."""
    out = vtk.vtkMatrix4x4()
    out.DeepCopy(np.asarray(matrix, dtype=np.float64).ravel())
    return out


def name_of(node) -> str:
    """Return what to call a node that may be missing in a message."""
    return node.GetName() if node is not None else _("nothing")


def voxels(node) -> np.ndarray:
    """Return (i, j, k) voxels of a scalar volume, in its own number type."""
    if node is None or not isinstance(node, slicer.vtkMRMLVolumeNode):
        raise InputError(_("Choose a fixed and a moving volume; '{node}' is not a volume.").format(node=name_of(node)))
    image = node.GetImageData()
    components = image.GetNumberOfScalarComponents() if image is not None else 1
    if not isinstance(node, slicer.vtkMRMLScalarVolumeNode) or components != 1:
        raise InputError(
            _(
                "'{node}' has {n} values in each voxel (a color, vector or 4D volume); choose a volume with one, for "
                "instance one frame or channel of it."
            ).format(node=node.GetName(), n=components)
        )
    if image is None or image.GetNumberOfPoints() == 0 or image.GetPointData().GetScalars() is None:
        raise InputError(_("The volume '{node}' is empty; load or choose another one.").format(node=node.GetName()))
    return slicer.util.arrayFromVolume(node).transpose(2, 1, 0)


def linear_between(source, target) -> np.ndarray | None:
    """Return (4, 4) RAS from one transform node's coordinates to another's (None: world), or None if it is not
    linear."""
    general, linear = vtk.vtkGeneralTransform(), vtk.vtkTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(source, target, general)
    if not slicer.vtkMRMLTransformNode.IsGeneralTransformLinear(general, linear):
        return None
    return slicer.util.arrayFromVTKMatrix(linear.GetMatrix())


def _nonlinear_ancestor(node):
    while node.IsLinear() and node.GetParentTransformNode() is not None:
        node = node.GetParentTransformNode()
    return node


def _node_points(affine: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return a grid's node positions, one (i, j, k) array per coordinate."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return [row[0] * i + row[1] * j + row[2] * k + row[3] for row in affine[:3]]


def _to_labels(node, reference) -> np.ndarray:
    """Return (4, 4) RAS: from the voxels of a volume to the own coordinates of labels.

    Raises:
        InputError: no labels, or a non-linear transform between them.
    """
    if not isinstance(node, (slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLScalarVolumeNode)):
        raise InputError(
            _("'{node}' holds no labels; choose a segmentation or a label map volume.").format(node=name_of(node))
        )
    between = linear_between(node.GetParentTransformNode(), reference.GetParentTransformNode())
    if between is None:
        raise InputError(
            _(
                "A non-linear transform lies between '{node}' and '{volume}'; harden it (Data module) or put "
                "both under the same transform."
            ).format(node=node.GetName(), volume=reference.GetName())
        )
    return np.linalg.inv(between) @ ijk_to_ras(reference)


def _geometry(to_labels: np.ndarray, shape):
    """Return a grid as an empty vtkOrientedImageData: its voxels to the coordinates of a segmentation."""
    geometry = slicer.vtkOrientedImageData()
    geometry.SetDimensions(*shape)
    geometry.SetImageToWorldMatrix(to_vtk(to_labels))
    return geometry


def _merge_segments(node, geometry, ids, values) -> np.ndarray:
    """Return segments as labels on a grid, (i, j, k) int32; where they overlap, the later one wins.

    Args:
        node: the segmentation.
        geometry: the grid, of :func:`_geometry`.
        ids, values: the segments and the label of each.

    Raises:
        InputError: they cannot be turned into labels.
    """
    if not ids.GetNumberOfValues():
        return np.zeros(geometry.GetDimensions(), np.int32)
    merged, extent_mode = slicer.vtkOrientedImageData(), slicer.vtkSegmentation.EXTENT_REFERENCE_GEOMETRY
    if not node.GenerateMergedLabelmapForAllSegments(merged, extent_mode, geometry, ids, values):
        raise InputError(
            _("The segments of '{node}' cannot be turned into a label map; check it in Segmentations.").format(
                node=node.GetName()
            )
        )
    array = numpy_support.vtk_to_numpy(merged.GetPointData().GetScalars()).reshape(geometry.GetDimensions()[::-1])
    return array.transpose(2, 1, 0).astype(np.int32)


def _read_segmentation(node, to_labels: np.ndarray, shape, numbers: dict[str, int]) -> Labels:
    segmentation = node.GetSegmentation()
    ids, values, names = vtk.vtkStringArray(), vtk.vtkIntArray(), {}
    for n in range(segmentation.GetNumberOfSegments()):
        segment = segmentation.GetNthSegment(n)
        name = segment.GetName()
        value = numbers.setdefault(name, len(numbers) + 1)
        if value in names:
            raise InputError(
                _("'{node}' has two segments named '{name}'; give each its own name.").format(
                    node=node.GetName(), name=name
                )
            )
        names[value] = (name, segment.GetColor())
        ids.InsertNextValue(segmentation.GetNthSegmentID(n))
        values.InsertNextValue(value)
    geometry = _geometry(to_labels, shape)
    array = _merge_segments(node, geometry, ids, values)
    return Labels(array, names, warning=_overlap(node, geometry, ids, values, names, array) if names else "")


def _overlap(node, geometry, ids, values, names: dict[int, tuple], merged: np.ndarray) -> str:
    """Say which segments lost voxels to later ones, for a label map holds one label a voxel; "" where none did."""
    if node.GetSegmentation().GetNumberOfLayers() == 1:  # segments of one layer cannot overlap
        return ""
    kept = np.bincount(merged.ravel(), minlength=max(names) + 1)
    lost = {}
    for n in range(ids.GetNumberOfValues()):
        alone, one, value = slicer.vtkOrientedImageData(), vtk.vtkStringArray(), vtk.vtkIntArray()
        one.InsertNextValue(ids.GetValue(n))
        value.InsertNextValue(1)
        extent_mode = slicer.vtkSegmentation.EXTENT_REFERENCE_GEOMETRY
        if node.GenerateMergedLabelmapForAllSegments(alone, extent_mode, geometry, one, value):
            voxels = np.count_nonzero(numpy_support.vtk_to_numpy(alone.GetPointData().GetScalars()))
            label = values.GetValue(n)
            if voxels > kept[label]:
                lost[names[label][0]] = int(voxels - kept[label])
    if not lost:
        return ""
    return _(
        "Segments of '{node}' overlap, but a label map holds one label a voxel and the later segment keeps it; lost "
        "were {lost}. Remove the overlap in the Segment Editor where that matters."
    ).format(
        node=node.GetName(),
        lost=", ".join(_("{count} voxels of '{name}'").format(count=n, name=name) for name, n in lost.items()),
    )


def _read_label_map(node, to_labels: np.ndarray, shape) -> Labels:
    voxels(node)  # refuses what is no scalar volume
    image = node.GetImageData()
    index_map = np.linalg.inv(ijk_to_ras(node)) @ to_labels
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    off_mm = np.abs(ijk_to_ras(node) @ (index_map @ corners - corners)).max()
    if image.GetDimensions() != shape or off_mm > _SAME_MM:
        reslice = vtk.vtkImageReslice()
        reslice.SetInputData(image)
        transform = vtk.vtkTransform()
        transform.SetMatrix(to_vtk(index_map))
        reslice.SetResliceTransform(transform)
        reslice.SetInterpolationModeToNearestNeighbor()
        reslice.SetOutputOrigin(0, 0, 0)
        reslice.SetOutputSpacing(1, 1, 1)
        reslice.SetOutputExtent(0, shape[0] - 1, 0, shape[1] - 1, 0, shape[2] - 1)
        reslice.Update()
        image = reslice.GetOutput()
    array = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(shape[::-1]).transpose(2, 1, 0)
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), 0, array)  # outside the field of view
    labels = array.astype(np.int64)
    if array.dtype.kind == "f" and not (labels == array).all():
        raise InputError(
            _("'{node}' holds values that are not whole numbers, so it is not a label map; choose another one.").format(
                node=node.GetName()
            )
        )
    if labels.min() < 0 or labels.max() > _LARGEST_LABEL:
        raise InputError(
            _("'{node}' has labels from {low} to {high}; use numbers from 0 to {largest} only.").format(
                node=node.GetName(), low=labels.min(), high=labels.max(), largest=_LARGEST_LABEL
            )
        )
    labels = labels.astype(np.int32)
    display = node.GetDisplayNode()
    return Labels(labels, color_node_id=display.GetColorNodeID() if display is not None else None)


def _all_nodes(scene) -> list:
    return [scene.GetNthNode(n) for n in range(scene.GetNumberOfNodes())]


def fill_volume(node, image: Image):
    """Store voxels and their place in a volume node, which gets no parent; return the node."""
    slicer.util.updateVolumeFromArray(node, image.array.transpose(2, 1, 0))
    node.SetIJKToRASMatrix(to_vtk(FLIP @ image.affine))
    node.SetAndObserveTransformNodeID(None)
    node.CreateDefaultDisplayNodes()
    return node


def _mark(transform_node, report: SavedReport | None) -> None:
    """Make a transform node known as a registration's result, with its figures."""
    if report is not None:
        transform_node.SetAttribute(REPORT, json.dumps(report))


def _fill_transform(node, transform, onto, applied_to, report: SavedReport | None = None):
    _mark(node, report)
    node.SetAndObserveTransformNodeID(None)
    node.SetAndObserveTransformFromParent(transform)
    node.SetNodeReferenceID(slicer.vtkMRMLTransformNode.GetFixedNodeReferenceRole(), onto.GetID())
    node.SetNodeReferenceID(slicer.vtkMRMLTransformNode.GetMovingNodeReferenceRole(), applied_to.GetID())
    return node


def _fill_folding(node, folding: Image):
    node.GetSegmentation().RemoveAllSegments()
    add_segment(node, Image(np.asarray(folding.array, dtype=np.uint8), folding.affine), _("Folding"), (1.0, 0.0, 0.0))
    return node


def add_segment(node, mask: Image, name: str, color) -> None:
    """Add a segment of what is not 0 in (i, j, k) uint8."""
    image = slicer.vtkOrientedImageData()
    image.SetDimensions(*mask.array.shape)
    voxels = np.array(mask.array, dtype=np.uint8, order="F").ravel(order="F")
    image.GetPointData().SetScalars(numpy_support.numpy_to_vtk(voxels, deep=True))
    image.SetImageToWorldMatrix(to_vtk(FLIP @ mask.affine))
    node.AddSegmentFromBinaryLabelmapRepresentation(image, name, list(color))


def _fill_labels(node, warped: Image, labels: Labels, new: _New):
    """Store the warped labels as they were given: segments as a segmentation, a label map as a label map."""
    if not labels.names:
        if node is None:
            node = new.node("vtkMRMLLabelMapVolumeNode", "labels")
            node.CreateDefaultDisplayNodes()
            if labels.color_node_id is not None:
                node.GetDisplayNode().SetAndObserveColorNodeID(labels.color_node_id)
        return fill_volume(node, warped)
    if node is None:
        node = new.node("vtkMRMLSegmentationNode", "labels")
        node.CreateDefaultDisplayNodes()
    segmentation = node.GetSegmentation()
    segmentation.RemoveAllSegments()
    array = np.asarray(warped.array)
    for value, (name, color) in labels.names.items():
        add_segment(node, Image((array == value).astype(np.uint8), warped.affine), name, color)
        segment = segmentation.GetNthSegment(segmentation.GetNumberOfSegments() - 1)
        segment.SetTag(LABEL_TAG, str(value))
    node.SetAndObserveTransformNodeID(None)
    return node


def label_names(labels) -> dict[int, str]:
    """Return what the values of warped labels are called in the scene; empty where nothing says so.

    A color table of Slicer's own does not: it would call any label 3 "brain".

    Args:
        labels: ``warped_labels`` of :class:`RegistrationNodes`, or None.
    """
    if isinstance(labels, slicer.vtkMRMLSegmentationNode):
        names, value = {}, vtk.reference("")
        segmentation = labels.GetSegmentation()
        for n in range(segmentation.GetNumberOfSegments()):
            segment = segmentation.GetNthSegment(n)
            if segment.GetTag(LABEL_TAG, value):
                names[int(str(value))] = segment.GetName()
        return names
    display = labels.GetDisplayNode() if labels is not None else None
    colors = display.GetColorNode() if display is not None else None
    if colors is None or colors.GetType() != colors.User:
        return {}
    return {value: colors.GetColorName(value) for value in range(colors.GetNumberOfColors())}


def copy_window(source, node) -> None:
    """Show a volume in the colors and the window of another; one that was never shown leaves them automatic."""
    shown = source.GetDisplayNode()
    if isinstance(shown, slicer.vtkMRMLScalarVolumeDisplayNode):
        display = node.GetDisplayNode()
        display.SetAndObserveColorNodeID(shown.GetColorNodeID())
        display.AutoWindowLevelOff()
        display.SetWindowLevel(shown.GetWindow(), shown.GetLevel())
