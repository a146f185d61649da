"""Slicer's application layer for tests and a first look, over PySide6 and slicer-core's real MRML.

    slicer_app = start()                                   # installs qt, ctk, slicer.app, slicer.util's missing half
    module = slicer_app.load_module(".../MorphSeek.py")    # as Slicer's module factory does
    panel = module.widget                                  # the ScriptedLoadableModuleWidget
    slicer_app.grab(module.representation, "panel.png")

slicer-core (PyPI) has no Qt: no qt, ctk, qMRML widgets, ScriptedLoadableModule, parameterNodeWrapper, slicer.app. Here
is as much of them as the module uses, and no more. The rule: what Slicer or PythonQt refuses is refused here too (and
now and then more than that), so that a test that passes here means something there. slicer.util is Slicer's own file.

- pythonqt: QObjects as PythonQt shows them; the ``qt`` module.
- widgets: ctk's and qMRML's widgets. A new one is a class in its list.
- ui_files: the QUiLoader that builds a .ui file, strictly.
- parameters: parameterNodeWrapper.
- scripted_module: ScriptedLoadableModule and its Widget, Logic and Test.
- launcher: the environment variables that Slicer's launcher sets.
- application: slicer.app, the module factory, layout manager, i18n, packaging.
"""

from .application import Application, start
from .pythonqt import errors, native, wrap

__all__ = ["Application", "errors", "native", "start", "wrap"]
