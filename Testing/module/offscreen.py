"""Slicer's scene and views without the application: slicer-core's own logics and view managers, drawn off screen.

    application = Application()          # a fresh scene, which is slicer.mrmlScene too
    view = application.slice_view("Axial")
    pixels = view.draw("axial.png")      # (height, width, 3) uint8, and a file if a name is given

What is drawn is what Slicer draws: the same classes build the slice and 3D views there. Needs EGL or Mesa (Debian:
libegl1 libegl-mesa0 libgl1-mesa-dri libx11-6 libxcursor1), no screen.
"""

from __future__ import annotations

import os

import numpy as np
import slicer
import slicer.util
import vtk
import vtkmodules.vtkInteractionStyle
import vtkmodules.vtkRenderingContextOpenGL2
import vtkmodules.vtkRenderingOpenGL2
import vtkmodules.vtkRenderingVolumeOpenGL2  # noqa: F401 - importing these makes VTK able to draw
from vtk.util import numpy_support

_LOGICS = {
    "Terminologies": "vtkSlicerTerminologiesModuleLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "Volumes": "vtkSlicerVolumesLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "Plots": "vtkSlicerPlotsLogic",
    "Sequences": "vtkSlicerSequencesLogic",
}
_SLICE_MANAGERS = (
    "vtkMRMLTransformsDisplayableManager2D",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLMarkupsDisplayableManager",
)
_THREE_D_MANAGERS = (
    "vtkMRMLCameraDisplayableManager",
    "vtkMRMLViewDisplayableManager",
    "vtkMRMLModelDisplayableManager",
    "vtkMRMLTransformsDisplayableManager3D",
    "vtkMRMLSegmentationsDisplayableManager3D",
)


class Application:
    """A fresh MRML scene with the application logic, colors and module logics that Slicer gives it."""

    def __init__(self) -> None:
        # slicer-core ships without terminology files and says so in red at every start
        verbosity = vtk.vtkLogger.GetCurrentVerbosityCutoff()
        vtk.vtkLogger.SetStderrVerbosity(vtk.vtkLogger.VERBOSITY_OFF)
        self.scene = slicer.mrmlScene = slicer.vtkMRMLScene()
        self.logic = slicer.vtkSlicerApplicationLogic()
        self.logic.SetMRMLScene(self.scene)
        self.logic.GetColorLogic().SetMRMLScene(self.scene)
        self.logic.GetColorLogic().AddDefaultColorNodes()
        self.logic.SetSliceLogics(vtk.vtkCollection())
        self.logic.SetViewLogics(vtk.vtkCollection())
        self._modules = []
        for name, kind in _LOGICS.items():
            module = getattr(slicer, kind)()
            module.SetMRMLScene(self.scene)
            module.SetMRMLApplicationLogic(self.logic)
            self.logic.SetModuleLogic(name, module)
            self._modules.append(module)
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene, True)
        vtk.vtkLogger.SetStderrVerbosity(verbosity)

    def slice_view(self, orientation: str = "Axial", name: str = "Red", size: tuple[int, int] = (500, 500)):
        """A slice view; give it volumes through its ``composite`` node, or with slicer.util.setSliceViewerLayers."""
        return SliceView(self, orientation, name, size)

    def three_d_view(self, size: tuple[int, int] = (500, 500)):
        """A 3D view of everything in the scene that shows itself in 3D."""
        return ThreeDView(self, size)


class _View:
    """A render window filled by Slicer's displayable managers."""

    def __init__(self, application: Application, factory, managers, node, size: tuple[int, int]) -> None:
        self.node = node
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.ShowWindowOff()
        self.window.SetSize(*size)
        self.window.SetMultiSamples(8)
        self.renderer = vtk.vtkRenderer()
        self.window.AddRenderer(self.renderer)
        self._interactor = vtk.vtkRenderWindowInteractor()
        self._interactor.SetRenderWindow(self.window)
        factory.SetMRMLApplicationLogic(application.logic)
        for manager in managers:
            if not factory.IsDisplayableManagerRegistered(manager):
                factory.RegisterDisplayableManager(manager)
        self._group = slicer.vtkMRMLDisplayableManagerGroup()
        self._group.Initialize(factory, self.renderer)
        self._group.SetMRMLDisplayableNode(node)

    def draw(self, path: str | os.PathLike | None = None) -> np.ndarray:
        """Draw, write a PNG if a path is given, and return the pixels (height, width, 3), first row on top."""
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.Update()
        if path is not None:
            writer = vtk.vtkPNGWriter()
            writer.SetFileName(str(path))
            writer.SetInputConnection(grab.GetOutputPort())
            writer.Write()
        width, height, _ = grab.GetOutput().GetDimensions()
        pixels = numpy_support.vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars())
        return pixels.reshape(height, width, -1)[::-1, :, :3].copy()


class SliceView(_View):
    """A slice view with its slice and composite nodes."""

    def __init__(self, application: Application, orientation: str, name: str, size: tuple[int, int]) -> None:
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(application.logic)
        application.logic.GetSliceLogics().AddItem(self.logic)
        self.logic.SetMRMLScene(application.scene)
        node = self.logic.AddSliceNode(name)
        node.SetMappedInLayout(1)
        node.SetOrientation(orientation)
        self.composite = self.logic.GetSliceCompositeNode()
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        super().__init__(application, factory, _SLICE_MANAGERS, node, size)
        self.logic.ResizeSliceNode(*size)
        # the slice logic blends its layers into 8-bit colors; Slicer shows them through such a mapper too
        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self._mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(actor)

    def fit(self, offset_mm: float | None = None, zoom: float = 1.0) -> None:
        """Fit the slice to its background volume and go to an offset (RAS mm along the slice's normal)."""
        self.logic.FitSliceToBackground()
        x, y, z = self.node.GetFieldOfView()
        self.node.SetFieldOfView(x / zoom, y / zoom, z)
        if offset_mm is not None:
            self.logic.SetSliceOffset(offset_mm)

    def draw(self, path: str | os.PathLike | None = None) -> np.ndarray:
        self.logic.UpdatePipeline()
        connection = self.logic.GetImageDataConnection()
        self._mapper.SetInputConnection(connection)
        return super().draw(path)


class ThreeDView(_View):
    """A 3D view with its view and camera nodes."""

    def __init__(self, application: Application, size: tuple[int, int]) -> None:
        node = application.scene.AddNewNodeByClass("vtkMRMLViewNode", "View1")
        node.SetLayoutName("1")
        node.SetMappedInLayout(1)
        camera = application.scene.AddNewNodeByClass("vtkMRMLCameraNode", "Camera")
        camera.SetLayoutName("1")
        factory = slicer.vtkMRMLThreeDViewDisplayableManagerFactory.GetInstance()
        super().__init__(application, factory, _THREE_D_MANAGERS, node, size)

    def look(self, towards: tuple[float, float, float], up=(0.0, 0.0, 1.0), zoom: float = 1.0) -> None:
        """Look at everything visible, in the direction ``towards`` (RAS)."""
        self.window.Render()
        self.renderer.ResetCamera()
        camera = self.renderer.GetActiveCamera()
        focus = np.array(camera.GetFocalPoint())
        camera.SetPosition(focus - np.array(towards) / np.linalg.norm(towards) * camera.GetDistance())
        camera.SetViewUp(*up)
        camera.Zoom(zoom)
        self.renderer.ResetCameraClippingRange()
