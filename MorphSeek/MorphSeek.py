"""MorphSeek in Slicer: the module, its panel, its logic and its self test.

The panel has three sections, each a class in MorphSeekGui with a .ui file of its own: Register, Inspect and, where
switched on, Fine-tune. Registration needs no panel:

    from MorphSeek import MorphSeekLogic

    nodes = MorphSeekLogic().register(getNode("fixed"), getNode("moving"))
    getNode("moving").SetAndObserveTransformNodeID(nodes.transform.GetID())
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import qt
import slicer
import slicer.util
from MorphSeekGui import applying, batch_script, dependencies, registration
from MorphSeekGui.batch_section import batches_folder
from MorphSeekGui.engine_client import EngineClient, close_shared_client, shared_client
from MorphSeekGui.inspect_panel import InspectPanel
from MorphSeekGui.panel import Panel
from MorphSeekGui.parameters import MorphSeekParameterNode
from MorphSeekGui.register_panel import ENGINE_PYTHON, RegisterPanel
from MorphSeekGui.sample_data import register_sample_data
from MorphSeekGui.training_panel import TrainingPanel
from MorphSeekGui.widgets import WrappedLabels
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

TRAINING = "MorphSeek/Training"  # setting: whether the section Fine-tune is shown outside developer mode
RESOURCES = Path(__file__).resolve().parent / "Resources"


class MorphSeek(ScriptedLoadableModule):
    """What the list of modules shows."""

    def __init__(self, parent) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = "MorphSeek"
        parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        parent.dependencies = ["Sequences"]
        parent.contributors = ["The MorphSeek developers"]
        parent.helpText = _(
            "Registers two volumes, with a learned deformation or by fitting them alone, and shows where the "
            "deformation folds, or proves that it does not. Choose a fixed and a moving volume and press Register. "
            "What is proven holds for linear interpolation: Slicer sets transforms that it reads from files to cubic, "
            "which is another map, so set a transform.h5 that you load to linear; the results in a scene are kept "
            "linear by the module. The method is MorphSeek: Zhang et al., "
            '"MorphSeek: Fine-grained Latent Representation-Level Policy Optimization for Deformable Image '
            'Registration", CVPR 2026, {link}. For research; not a medical device.'
        ).format(link='<a href="https://arxiv.org/abs/2511.17392">arXiv 2511.17392</a>')
        parent.acknowledgementText = _(
            "Built on 3D Slicer, PyTorch and SimpleITK. The engine runs in its own process and sends no data anywhere."
        )
        slicer.app.connect("startupCompleted()", register_sample_data)


class MorphSeekWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: makes the sections and passes on what Slicer reports."""

    def __init__(self, parent=None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._labels: WrappedLabels | None = None
        self.panels: dict[str, Panel] = {}

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        self.logic = MorphSeekLogic()
        widget = slicer.util.loadUI(self.logic.resource_path("UI/MorphSeek.ui"))
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        widget.setMRMLScene(slicer.mrmlScene)
        self.panels["register"] = register = RegisterPanel(self.ui.registerSection, self.logic)
        self.panels["inspect"] = inspect = InspectPanel(self.ui.inspectSection, self.logic)
        self.panels["training"] = training = TrainingPanel(self.ui.trainingSection, self.logic)
        for panel in self.panels.values():
            panel.setMRMLScene(slicer.mrmlScene)
        register.on_result.append(self._inspect)
        register.on_estimate.append(inspect.take_estimate)
        inspect.on_choice.append(register.take_up)
        training.on_model.append(register.add_model)
        switch = register.ui.trainingCheckBox
        switch.checked = slicer.util.settingsValue(TRAINING, False, converter=slicer.util.toBool)
        switch.connect("toggled(bool)", self._show_training)
        self._show_training(switch.checked)

        self._labels = WrappedLabels(widget)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self._scene_closes)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self._scene_closed)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self._scene_loaded)
        self._use_parameter_node()

    def _inspect(self, nodes) -> None:
        self.ui.inspectSection.collapsed = False
        self.panels["inspect"].show(nodes)

    def _show_training(self, on: bool) -> None:
        qt.QSettings().setValue(TRAINING, on)
        self.ui.trainingSection.visible = on or self.developerMode

    def _use_parameter_node(self) -> None:
        self.panels["register"].setParameterNode(self.logic.getParameterNode())

    def _scene_closes(self, _caller, _event) -> None:
        self.panels["register"].forget()
        self.panels["register"].setParameterNode(None)

    def _scene_closed(self, _caller, _event) -> None:
        if self.parent.isEntered:
            self._use_parameter_node()

    def _scene_loaded(self, _caller, _event) -> None:
        """Take a new parameter node: the old one keeps what it read before all nodes of the scene were loaded."""
        if self.panels:
            self._use_parameter_node()

    def onReload(self) -> None:
        """Reload the package too: Slicer's developer button reads the module's own file again, and that alone."""
        for name in [name for name in sys.modules if name.partition(".")[0] in ("MorphSeekGui", "MorphSeekLib")]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def enter(self) -> None:
        """Show the module: the user has opened it."""
        self._use_parameter_node()
        for panel in self.panels.values():
            panel.enter()
        self._labels.start()

    def exit(self) -> None:
        """Hide the module: the user goes to another one; what runs goes on."""
        self._labels.stop()
        for panel in self.panels.values():
            panel.exit()

    def cleanup(self) -> None:
        """End everything: the module is reloaded, or Slicer ends."""
        self.removeObservers()
        if self._labels is not None:
            self._labels.stop()
        for panel in self.panels.values():
            panel.cleanup()
        self.panels.clear()


class MorphSeekLogic(ScriptedLoadableModuleLogic):
    """The work of the module, for scripts and for the panel, without widgets."""

    def __init__(self) -> None:
        ScriptedLoadableModuleLogic.__init__(self)

    def getParameterNode(self) -> MorphSeekParameterNode:
        """Return the choices of the section Register, kept in the scene."""
        return MorphSeekParameterNode(super().getParameterNode())

    def register(self, fixedNode, movingNode, **options) -> registration.RegistrationNodes:
        """Register the moving volume to the fixed one and wait for the end.

            nodes = MorphSeekLogic().register(fixed, moving, preset="fast")
            nodes.warped, nodes.transform, nodes.jacobian, nodes.folding, nodes.report["folding"]["cells"]
            MorphSeekLogic().register(fixed, moving, state=nodes.state)  # goes on from there

        Args:
            fixedNode, movingNode: scalar volume nodes.
            options: as for :func:`MorphSeekGui.registration.register`: model, device, threads, steps, align,
                stop_early, inverse, preset, search, fit, similarity, fit_iterations, trust, initial_transform_node,
                fixed_labels_node, moving_labels_node, fixed_landmarks_node, moving_landmarks_node, state, into,
                on_progress, cancelled.

        Raises:
            InputError, EngineError: one sentence that says what is wrong; no node was made.
        """
        return registration.register(fixedNode, movingNode, **{"client": self.client(), **options})

    def correct(
        self,
        nodes: registration.RegistrationNodes,
        fixedPoints=None,
        movingPoints=None,
        errorMm: float = 1.0,
        **options,
    ) -> registration.RegistrationNodes:
        """Correct a registration where it is wrong, and wait for the end; its nodes take the result.

            nodes = logic.correct(nodes, getNode("Fixed points"), getNode("Moving points"), errorMm=2.0)
            nodes.report["corrections"]["points"]

        Args:
            nodes: of the registration.
            fixedPoints, movingPoints: markups that belong together, each with its volume; without them by the lines
                alone that were drawn for this registration in the panel.
            errorMm: how far off a point may be, one standard deviation.
            options: as for :func:`MorphSeekGui.registration.register`; ``fit="off"`` moves the points alone.

        Raises:
            InputError, EngineError: one sentence that says what is wrong; the nodes are as they were.
        """
        options = {"client": self.client(), "error_mm": errorMm, **options}
        return registration.correct(nodes, fixedPoints, movingPoints, **options)

    def registerBatch(
        self, pairs, folder=None, workers: int = 1, load: bool = True, **options
    ) -> list[batch_script.Outcome]:
        """Register many pairs by `morphseek batch` and wait for the end; one that fails does not stop the others.

            pairs = [{"fixed_node": atlas, "moving_node": scan} for scan in scans]
            for outcome in MorphSeekLogic().registerBatch(pairs):
                print(outcome.pair["moving_node"].GetName(), outcome.error or outcome.figures["folded_percent"])

        Args:
            pairs: dicts of the arguments of :meth:`register` that differ, "fixed_node" and "moving_node" at least.
            folder: where the batch gets a folder of its own, which the panel can open; the folder of batches by
                default.
            workers: how many pairs are registered at once.
            load: put the results of each pair into the scene; False leaves them in their files.
            options: the arguments of :meth:`register` that all pairs share; also on_outcome, called after each pair,
                and cancelled.

        Returns:
            an outcome for each pair: nodes, error, folder, figures; see :class:`MorphSeekGui.batch_script.Outcome`.

        Raises:
            InputError, RunError: the folder cannot be written, or the engine cannot be started.
        """
        engine = batch_script.Engine(self.client(), self.engine_python() or None, self.engine_environment())
        root = Path(folder) if folder is not None else batches_folder()
        return batch_script.register_batch(pairs, root, engine, workers=workers, load=load, **options)

    def apply(self, nodes: registration.RegistrationNodes, node, **options):
        """Apply a registration to another node that lies with its moving volume, and wait for the end.

            logic.apply(nodes, getNode("Segmentation"))
            logic.apply(nodes, getNode("Atlas labels"), backward=True)  # from the fixed onto the moving volume

        Args:
            nodes: of the registration.
            node: a volume, label map, segmentation, model, or points, lines or curves.
            options: as for :func:`MorphSeekGui.applying.apply`: backward, interpolation, on_progress, cancelled.

        Returns:
            a new node of the same kind.

        Raises:
            InputError, EngineError: one sentence that says what is wrong; no node was made.
        """
        return applying.apply(nodes, node, **{"client": self.client(), **options})

    def client(self) -> EngineClient:
        """Return the process of the engine, started with the first request and alive until Slicer ends."""
        return shared_client(self.engine_python(), self.engine_environment)

    def close_engine(self) -> None:
        """End the engine's process; the next request starts a new one."""
        close_shared_client()

    def engine_python(self) -> str:
        """Return the Python that the user chose for the engine; empty for Slicer's own."""
        return slicer.util.settingsValue(ENGINE_PYTHON, "") or ""

    def engine_environment(self) -> dict[str, str] | None:
        """Return the variables for that Python; None for those of Slicer itself, which only its own Python can take."""
        python, home = self.engine_python(), Path(slicer.app.slicerHome).resolve()
        if not python or Path(python).resolve().is_relative_to(home):
            return None
        return slicer.util.startupEnvironment()

    def resource_path(self, name: str) -> str:
        """Return the path of a file in the Resources of the module."""
        return str(RESOURCES / name)


class MorphSeekTest(ScriptedLoadableModuleTest):
    """The self test that Slicer runs (Reload and Test, or ctest)."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def tearDown(self) -> None:
        slicer.mrmlScene.Clear()

    def test_parameters_are_kept_in_the_scene(self) -> None:
        self.delayDisplay("Parameters")
        logic = MorphSeekLogic()
        logic.getParameterNode().steps = 5
        self.assertEqual(MorphSeekLogic().getParameterNode().steps, 5)
        with self.assertRaises(ValueError):
            logic.getParameterNode().steps = 99

    def test_a_wrong_input_is_refused_in_one_sentence(self) -> None:
        self.delayDisplay("Refusals")
        before = slicer.mrmlScene.GetNumberOfNodes()
        with self.assertRaisesRegex(registration.InputError, "Choose a fixed and a moving volume"):
            MorphSeekLogic().register(None, None)
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodes(), before)

    def test_two_volumes_are_registered(self) -> None:
        missing = dependencies.missing()
        if missing and not MorphSeekLogic().engine_python():
            self.delayDisplay(f"Registration is not tested: {', '.join(missing)} not installed")
            return
        self.delayDisplay("Registration")
        fixed, moving = _ball("fixed", 0.0), _ball("moving", 6.0)
        nodes = MorphSeekLogic().register(fixed, moving, device="cpu", align="none")
        error = [
            np.abs(slicer.util.arrayFromVolume(fixed) - slicer.util.arrayFromVolume(n)) for n in (moving, nodes.warped)
        ]
        self.assertLess(error[1].mean(), 0.5 * error[0].mean())
        self.delayDisplay("Passed")


def _ball(name: str, shift: float):
    """Make a volume with two overlapping balls, moved along i by ``shift`` mm."""
    k, j, i = np.mgrid[:40, :44, :48] * 2.0
    first = np.sqrt((i - 46 - shift) ** 2 + (j - 44) ** 2 + (k - 40) ** 2)
    second = np.sqrt((i - 60 - shift) ** 2 + (j - 50) ** 2 + (k - 46) ** 2)
    values = 100 / (1 + np.exp(first - 24)) + 80 / (1 + np.exp(second - 10))
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    node.SetSpacing(2.0, 2.0, 2.0)
    slicer.util.updateVolumeFromArray(node, values.astype(np.float32))
    return node
