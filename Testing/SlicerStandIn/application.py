"""slicer.app, the module factory, layout manager, i18n, packaging and sample data, and their installation."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import types
from importlib import metadata
from pathlib import Path

import offscreen
import slicer
import slicer.util
from packaging import requirements
from PySide6 import QtCore, QtGui, QtWidgets
from PySide6.QtCore import Property, Signal

from . import parameters, scripted_module, ui_files, widgets
from .launcher import Launcher
from .pythonqt import QT_MODULES, QtModule, class_of, errors, native, wrap

VERSION = (5, 13)
_SCRIPTED = (
    "ScriptedLoadableModule",
    "ScriptedLoadableModuleWidget",
    "ScriptedLoadableModuleLogic",
    "ScriptedLoadableModuleTest",
)
_PARAMETERS = (
    "Choice",
    "Decimals",
    "Default",
    "Maximum",
    "Minimum",
    "SingleStep",
    "WithinRange",
    "parameterNodeWrapper",
)


class qSlicerApplication(QtWidgets.QApplication):
    """slicer.app."""

    startupCompleted = Signal()
    mrmlSceneChangedObject = Signal(object)
    SIGNALS = {"mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChangedObject"}

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(arguments)
        self.testing = True
        self._modules, self._layouts = qSlicerModuleFactoryManager(self), qSlicerLayoutManager(self)
        self._folder = tempfile.TemporaryDirectory(prefix="slicer-stand-in-")
        self.launcher = Launcher(Path(self._folder.name) / "Slicer")
        QtCore.QSettings.setDefaultFormat(QtCore.QSettings.Format.IniFormat)
        QtCore.QSettings.setPath(QtCore.QSettings.Format.IniFormat, QtCore.QSettings.Scope.UserScope, self._folder.name)
        self.setOrganizationName("SlicerStandIn")
        self.setApplicationName("Slicer")
        self.setApplicationVersion(f"{VERSION[0]}.{VERSION[1]}.0")

    def mrmlScene(self):
        return slicer.mrmlScene

    def applicationLogic(self):
        return self.world.logic

    def moduleManager(self):
        return self._modules

    def layoutManager(self):
        return self._layouts

    def settings(self):
        return QtCore.QSettings()

    userSettings = settings

    def testingEnabled(self) -> bool:
        return self.testing

    def startupEnvironment(self):
        environment = QtCore.QProcessEnvironment()
        for name, value in self.launcher.startup_environment().items():
            environment.insert(name, value)
        return environment

    slicerHome = Property(str, lambda self: str(self.launcher.home))
    temporaryPath = Property(str, lambda self: self._folder.name)
    majorVersion = Property(int, lambda self: VERSION[0])
    minorVersion = Property(int, lambda self: VERSION[1])


class qSlicerModuleFactoryManager(QtCore.QObject):
    """slicer.app.moduleManager()."""

    moduleAboutToBeUnloaded = Signal(str)
    moduleLoaded = Signal(str)


class qMRMLSliceWidget(QtCore.QObject):
    """One slice view of the layout, without a window; drawn off screen."""

    def __init__(self, view: offscreen.SliceView, parent) -> None:
        super().__init__(parent)
        self.view = view

    def sliceLogic(self):
        return self.view.logic

    def mrmlSliceNode(self):
        return self.view.node


class qMRMLThreeDView(QtCore.QObject):
    """The 3D view: its camera looks at the world's origin until it is told otherwise."""

    def __init__(self, view: offscreen.ThreeDView, parent) -> None:
        super().__init__(parent)
        self.view = view

    def resetFocalPoint(self) -> None:
        self.view.window.Render()
        bounds = self.view.renderer.ComputeVisiblePropBounds()
        if bounds[0] <= bounds[1]:
            camera = self.view.renderer.GetActiveCamera()
            camera.SetFocalPoint(*(sum(bounds[2 * axis : 2 * axis + 2]) / 2 for axis in range(3)))

    def resetCamera(self) -> None:
        self.view.renderer.ResetCamera()


class qMRMLThreeDWidget(QtCore.QObject):
    """One 3D view of the layout, without a window; drawn off screen."""

    def __init__(self, view: offscreen.ThreeDView, parent) -> None:
        super().__init__(parent)
        self._view = qMRMLThreeDView(view, self)

    def threeDView(self):
        return self._view


class qMRMLPlotView(QtCore.QObject):
    """One plot view of the layout, without a window: what its axes show.

    Kept from Slicer: the axes are fitted when another chart comes, and by ``fitToContent``, which tells the chart node
    too. They stay where they are when the chart's table grows.
    """

    def __init__(self, node, parent) -> None:
        super().__init__(parent)
        self.node, self._chart, self.axes = node, None, ((0.0, 1.0), (0.0, 1.0))
        node.AddObserver(node.PlotChartNodeChangedEvent, self._look)

    def mrmlPlotViewNode(self):
        return self.node

    def _look(self, *_arguments) -> None:
        if self.node.GetPlotChartNode() is not self._chart:
            self._chart = self.node.GetPlotChartNode()
            self._fit()

    def _fit(self) -> None:
        """The bounds of all curves; without any the axes stay."""
        ranges: tuple[list, list] = [], []
        for n in range(self._chart.GetNumberOfPlotSeriesNodes() if self._chart is not None else 0):
            series = self._chart.GetNthPlotSeriesNode(n)
            table = series.GetTableNode().GetTable()
            columns = [table.GetColumnByName(name) for name in (series.GetXColumnName(), series.GetYColumnName())]
            if all(column is not None and column.GetNumberOfValues() for column in columns):
                for found, column in zip(ranges, columns, strict=True):
                    found.append(column.GetRange())
        if ranges[0]:
            self.axes = tuple((min(low for low, _ in r), max(high for _, high in r)) for r in ranges)

    def fitToContent(self) -> None:
        self._fit()
        self._tell()

    def zoom(self, x: tuple[float, float]) -> None:
        """What the user does with the mouse."""
        self.axes = (x, self.axes[1])
        self._tell()

    def _tell(self) -> None:
        if self._chart is not None:
            self._chart.SetXAxisRange(*self.axes[0])
            self._chart.SetYAxisRange(*self.axes[1])


class qMRMLPlotWidget(QtCore.QObject):
    """A plot view with its controller."""

    def __init__(self, node, parent) -> None:
        super().__init__(parent)
        self.view = qMRMLPlotView(node, self)

    def plotView(self):
        return self.view

    def mrmlPlotViewNode(self):
        return self.view.node


class qSlicerLayoutManager(QtCore.QObject):
    """slicer.app.layoutManager(): the views that :class:`Application` opened."""

    layoutChanged = Signal(int)

    def __init__(self, parent) -> None:
        super().__init__(parent)
        self.slices: dict[str, qMRMLSliceWidget] = {}
        self.three_d: list[qMRMLThreeDWidget] = []
        self.plots: list[qMRMLPlotWidget] = []
        self._layout = 4

    threeDViewCount = Property(int, lambda self: len(self.three_d))

    def threeDWidget(self, number: int):
        return self.three_d[number]

    def sliceViewNames(self) -> list[str]:
        return list(self.slices)

    def sliceWidget(self, name: str):
        return self.slices.get(name)

    def plotWidget(self, number: int):
        return self.plots[number] if 0 <= number < len(self.plots) else None

    plotViewCount = Property(int, lambda self: len(self.plots))

    def resetSliceViews(self) -> None:
        for widget in self.slices.values():
            widget.view.logic.FitSliceToBackground()

    def mrmlSliceLogics(self):
        return slicer.app.applicationLogic().GetSliceLogics()

    def setLayout(self, number: int) -> None:
        self._layout = number
        self.layoutChanged.emit(number)

    layout = Property(int, lambda self: self._layout, setLayout)


class qSlicerModulePanel(QtWidgets.QScrollArea):
    """Slicer's module panel: one module at a time, no narrower than the module's widget says.

    Kept from Slicer: the layout item of a module that leaves is taken out and never freed. So the widget belongs to its
    first item for good, and an item that it gets later is not told when the content changes: the height that it
    once computed for a width stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._items: list[QtWidgets.QLayoutItem] = []  # never freed
        self.module: qSlicerScriptedLoadableModule | None = None
        content = QtWidgets.QWidget()
        layout = QtWidgets.QVBoxLayout(content)
        self._help = widgets.ctkCollapsibleButton()
        self._help.setText("Help & Acknowledgement")
        self._help.setChecked(False)
        layout.addWidget(self._help)
        policy = QtWidgets.QSizePolicy.Policy
        layout.addItem(QtWidgets.QSpacerItem(0, 0, policy.Minimum, policy.MinimumExpanding))
        self.setWidget(content)
        self.setWidgetResizable(True)
        self.setHorizontalScrollBarPolicy(QtCore.Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setAttribute(QtCore.Qt.WidgetAttribute.WA_DontShowOnScreen)

    def setModule(self, module: qSlicerScriptedLoadableModule | None) -> None:
        """Show a module; None is any other one."""
        if self.module is not None:
            old = self.module.widgetRepresentation()
            old.exit()
            layout = self.widget().layout()
            self._items.append(layout.takeAt(layout.indexOf(old)))
            old.setVisible(False)
            old.setParent(None)
        self.module = module
        if module is not None:
            new = module.widgetRepresentation()
            new.layout().setContentsMargins(0, 0, 0, 0)
            self.widget().layout().insertWidget(1, new, 1)
            new.setSizePolicy(QtWidgets.QSizePolicy.Policy.Minimum, new.sizePolicy().verticalPolicy())
            new.setVisible(True)
            new.enter()

    def minimumSizeHint(self) -> QtCore.QSize:
        bar = self.verticalScrollBar().sizeHint().width()
        return QtCore.QSize(self.widget().minimumSizeHint().width() + bar, super().minimumSizeHint().height())


class qSlicerScriptedLoadableModule(QtCore.QObject):
    """What the factory makes of a module file, before any panel is opened."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._values = {"path": path}
        self.python = None
        self.representation = None

    def widgetRepresentation(self):
        """The panel's widget; made when first asked for, as Slicer does."""
        if self.representation is None:
            self.representation = qSlicerScriptedLoadableModuleWidget(self)
            self.representation.reload()
        return self.representation

    def _value(name: str, kind, default):  # noqa: N805
        def write(self, value) -> None:
            self._values[name] = value

        return Property(kind, lambda self: self._values.get(name, default), write)

    path = Property(str, lambda self: self._values["path"])
    name = Property(str, lambda self: Path(self._values["path"]).stem)
    title = _value("title", str, "")
    helpText = _value("helpText", str, "")
    acknowledgementText = _value("acknowledgementText", str, "")
    categories = _value("categories", "QStringList", [])
    dependencies = _value("dependencies", "QStringList", [])
    contributors = _value("contributors", "QStringList", [])
    associatedNodeTypes = _value("associatedNodeTypes", "QStringList", [])
    icon = _value("icon", QtGui.QIcon, QtGui.QIcon())
    hidden = _value("hidden", bool, False)
    index = _value("index", int, -1)


class qSlicerScriptedLoadableModuleWidget(widgets.qMRMLWidget):
    """The widget that holds a module's panel."""

    def __init__(self, module: qSlicerScriptedLoadableModule) -> None:
        super().__init__()
        self._module, self._entered, self.python = module, False, None
        QtWidgets.QVBoxLayout(self)
        self._scene = slicer.mrmlScene

    def reload(self) -> None:
        """Make the panel anew from the class that the module file now defines."""
        name = self._module.name
        self.python = getattr(sys.modules[name], f"{name}Widget")(wrap(self))
        self.python.setup()
        setattr(slicer.modules, f"{name}Widget", self.python)
        if self._entered:
            self.enter()

    def enter(self) -> None:
        self._entered = True
        getattr(self.python, "enter", lambda: None)()

    def exit(self) -> None:
        self._entered = False
        getattr(self.python, "exit", lambda: None)()

    def self(self):
        return self.python

    isEntered = Property(bool, lambda self: self._entered)


class Application:
    """The stand-in as tests and the preview use it."""

    def __init__(self) -> None:
        self.qt = qSlicerApplication(["Slicer"])
        _install(self.qt)
        self.fresh()

    def fresh(self):
        """A new scene (slicer.mrmlScene); modules must be loaded again. Returns the scene."""
        self.unload()
        self.world = self.qt.world = offscreen.Application()
        self.qt.layoutManager().slices.clear()
        self.qt.layoutManager().three_d.clear()
        self.qt.layoutManager().plots.clear()
        # of Slicer's own modules, those that are asked for their logic
        slicer.modules.plots = types.SimpleNamespace(logic=lambda: self.world.logic.GetModuleLogic("Plots"))
        self.qt.testing = True
        QtCore.QSettings().clear()
        errors.clear()
        return slicer.mrmlScene

    def open_views(self, size: tuple[int, int] = (400, 400)) -> dict[str, offscreen.SliceView]:
        """The three slice views of the conventional layout."""
        manager = self.qt.layoutManager()
        for name, orientation in (("Red", "Axial"), ("Yellow", "Sagittal"), ("Green", "Coronal")):
            manager.slices[name] = qMRMLSliceWidget(self.world.slice_view(orientation, name, size), manager)
        return {name: widget.view for name, widget in manager.slices.items()}

    def open_3d_view(self, size: tuple[int, int] = (300, 300)) -> offscreen.ThreeDView:
        """The 3D view of the conventional layout, with the camera where Slicer's stands at first."""
        view = self.world.three_d_view(size)
        self.qt.layoutManager().three_d.append(qMRMLThreeDWidget(view, self.qt.layoutManager()))
        return view

    def open_plot_view(self) -> qMRMLPlotView:
        """A plot view, as the layouts with one have it."""
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLPlotViewNode", "PlotView")
        manager = self.qt.layoutManager()
        manager.plots.append(qMRMLPlotWidget(node, manager))
        return manager.plots[-1].view

    def load_module(self, path: str | os.PathLike) -> qSlicerScriptedLoadableModule:
        """Load a scripted module's file as Slicer's factory does, and say that the startup is complete."""
        path = Path(path).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        source = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        sys.modules[path.stem] = source
        spec.loader.exec_module(source)
        module = qSlicerScriptedLoadableModule(str(path))
        module.python = getattr(source, path.stem)(wrap(module))
        setattr(slicer.modules, path.stem.lower(), wrap(module))
        setattr(slicer.modules, f"{path.stem}Instance", module.python)
        self.qt.moduleManager().moduleLoaded.emit(path.stem)
        self.qt.startupCompleted.emit()
        return module

    def unload(self) -> None:
        """Unload all modules, as at the application's end; panels are cleaned up and deleted."""
        for name in [
            n for n, m in vars(slicer.modules).items() if isinstance(native(m), qSlicerScriptedLoadableModule)
        ]:
            module = native(getattr(slicer.modules, name))
            self.qt.moduleManager().moduleAboutToBeUnloaded.emit(module.name)
            if module.representation is not None:
                if module.representation._entered:
                    module.representation.exit()
                module.representation.deleteLater()
            for attribute in (name, f"{module.name}Widget", f"{module.name}Instance"):
                vars(slicer.modules).pop(attribute, None)
        wrap(self.qt).disconnect("startupCompleted()")
        self.process()

    def take_errors(self) -> list[BaseException]:
        """What slots raised since the last time; a test that leaves some fails."""
        taken = list(errors)
        errors.clear()
        return taken

    def process(self) -> None:
        """Let Qt handle what waits, deletions too."""
        self.qt.processEvents()
        self.qt.sendPostedEvents(None, QtCore.QEvent.Type.DeferredDelete)

    def wait(self, condition, seconds: float = 300.0) -> None:
        """Run the event loop until a condition holds; the limit only ends a hang.

        Raises:
            TimeoutError: it did not within that time.
        """
        timer = QtCore.QElapsedTimer()
        timer.start()
        while not condition():
            if timer.elapsed() > 1000 * seconds:
                raise TimeoutError(f"it did not happen within {seconds} seconds")
            self.qt.processEvents(QtCore.QEventLoop.ProcessEventsFlag.AllEvents, 50)
            QtCore.QThread.msleep(5)

    def open_panel(self, module: qSlicerScriptedLoadableModule, width: int = 472, height: int = 900):
        """A module in Slicer's module panel, without a window on the screen; the panel is as wide as it must be."""
        panel = qSlicerModulePanel()
        panel.setModule(module)
        panel.resize(max(width, panel.minimumSizeHint().width()), height)
        panel.show()
        self.process()
        return panel

    def show(self, widget, width: int = 480) -> None:
        """Show a widget as it would stand in Slicer's module panel, without a window on the screen."""
        widget = native(widget)
        widget.setAttribute(QtCore.Qt.WidgetAttribute.WA_DontShowOnScreen)
        widget.resize(width, widget.sizeHint().height())
        widget.show()
        self.process()

    def grab(self, widget, path: str | os.PathLike, width: int = 480) -> Path:
        """A picture of a widget as it would stand in Slicer's module panel."""
        self.show(widget, width)
        widget = native(widget)
        widget.resize(width, max(widget.minimumSizeHint().height(), widget.sizeHint().height()))
        self.process()
        widget.grab().save(str(path))
        return Path(path)


_application: Application | None = None


def start() -> Application:
    """The one stand-in of this process."""
    global _application
    if _application is None:
        os.environ.setdefault("QT_QPA_PLATFORM", "offscreen" if sys.platform == "linux" else "")
        _application = Application()
    return _application


def _install(app: qSlicerApplication) -> None:
    qt = QtModule("qt", {"QUiLoader": ui_files.QUiLoader}, QT_MODULES)
    sys.modules["qt"], sys.modules["ctk"] = qt, QtModule("ctk", widgets.CTK)
    for name, cls in widgets.SLICER.items():
        setattr(slicer, name, class_of(cls))
    slicer.app = wrap(app)
    slicer.modules = types.SimpleNamespace()
    _module("slicer.i18n", tr=lambda text: text, translate=lambda context, text: text)
    _module("slicer.ScriptedLoadableModule", **{n: getattr(scripted_module, n) for n in _SCRIPTED})
    _module("slicer.parameterNodeWrapper", **{n: getattr(parameters, n) for n in _PARAMETERS})
    packaging = Packaging()
    _module("slicer.packaging", **{n: getattr(packaging, n) for n in ("pip_check", "pip_ensure", "pip_install")})
    _module("SampleData", SampleDataLogic=SampleDataLogic)


def _module(name: str, **attributes) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    # "from slicer.X import *" takes what Slicer's __all__ would give
    module.__all__ = [n for n in attributes if not n.startswith("_")]
    sys.modules[name] = module
    if name.startswith("slicer."):
        setattr(slicer, name.partition(".")[2], module)
    return module


class Packaging:
    """slicer.packaging without pip: no test may change its own Python. Tests put their own functions in the place."""

    def pip_check(self, requirement) -> bool:
        requirement = requirements.Requirement(str(requirement))
        try:
            return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            return False

    def pip_ensure(
        self, requirements, constraints=None, skip_packages=None, prompt_install=True, prompt_restart=True,
        requester=None, skip_in_testing=True, show_progress=True,
    ):  # fmt: skip
        raise NotImplementedError("a test that gets here must say what pip does")

    def pip_install(
        self, requirements, constraints=None, no_deps_requirements=None, skip_packages=None, blocking=True,
        show_progress=True, requester=None, logCallback=None, completedCallback=None,
    ):  # fmt: skip
        raise NotImplementedError("a test that gets here must say what pip does")


class SampleDataLogic:
    """SampleData.SampleDataLogic: what is registered stands in ``sources``."""

    sources: list[dict] = []

    @staticmethod
    def registerCustomSampleDataSource(
        category="Custom", sampleName=None, uris=None, fileNames=None, nodeNames=None, customDownloader=None,
        thumbnailFileName=None, loadFileType=None, loadFiles=None, loadFileProperties=None, checksums=None,
    ):  # fmt: skip
        SampleDataLogic.sources.append(dict(locals()))
