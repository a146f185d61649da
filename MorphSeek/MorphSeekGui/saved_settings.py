"""The row *Settings* of the section Register: model and choices, saved by a name and taken from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import qt

from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.settings_file import ENDINGS, RegistrationSettings, read_settings, settings_text

from .messages import sentence
from .panel import Panel
from .scene import _


class SavedSettings:
    """Lists the settings in the user's folder, saves more, and opens those of others.

    Args:
        panel: the section Register.
        chosen: returns what is chosen in the panel.
        use: chooses settings in the panel.
        fail: shows a sentence.
    """

    def __init__(
        self,
        panel: Panel,
        chosen: Callable[[], RegistrationSettings],
        use: Callable[[RegistrationSettings | None], None],
        fail: Callable[[str], None],
    ) -> None:
        self._panel, self._chosen, self._use, self._fail = panel, chosen, use, fail
        self._opened: list[Path] = []  # in other folders
        self._files: list[Path] = []
        ui = panel.ui
        ui.saveSettingsButton.connect("clicked(bool)", lambda _on: self.save())
        ui.openSettingsButton.connect("clicked(bool)", lambda _on: self.open())
        ui.savedSettingsSelector.connect("activated(int)", self._choose)
        self.refresh()

    def refresh(self, current: Path | None = None) -> None:
        """List the files again; ``current`` is shown as chosen."""
        own = sorted(path for path in folder().glob("*") if path.suffix in ENDINGS) if folder().is_dir() else []
        self._files = [*own, *(path for path in self._opened if path.is_file() and path not in own)]
        selector = self._panel.ui.savedSettingsSelector
        blocked = selector.blockSignals(True)
        selector.clear()
        selector.addItem(_("none saved") if not self._files else _("Choose saved settings"))
        for path in self._files:
            selector.addItem(path.stem)
        selector.currentIndex = self._files.index(current) + 1 if current in self._files else 0
        selector.blockSignals(blocked)

    def save(self) -> None:
        """Ask for a name, and save what is chosen."""
        folder().mkdir(parents=True, exist_ok=True)
        title, kinds = _("Save the settings as"), _("MorphSeek settings (*.toml *.json)")
        name = qt.QFileDialog.getSaveFileName(self._panel.widget, title, str(folder() / "settings.toml"), kinds)
        if not name:
            return
        path = Path(name) if Path(name).suffix in ENDINGS else Path(f"{name}.toml")
        try:
            path.write_text(settings_text(self._chosen(), path), encoding="utf-8")
        except (MorphSeekError, OSError) as problem:
            reason = getattr(problem, "strerror", None)
            self._fail(
                _("{path} cannot be written ({reason}); choose another folder.").format(path=path, reason=reason)
                if reason
                else sentence(problem)
            )
            return
        self._list(path)

    def open(self) -> None:
        """Ask for a file, and choose what it says."""
        title, kinds = _("Open settings"), _("MorphSeek settings (*.toml *.json)")
        name = qt.QFileDialog.getOpenFileName(self._panel.widget, title, "", kinds)
        if name and self._take(Path(name)):
            self._list(Path(name))

    def _list(self, path: Path) -> None:
        if path.parent != folder() and path not in self._opened:
            self._opened.append(path)
        self.refresh(path)

    def _choose(self, index: int) -> None:
        if index == 0:
            self._use(None)
        elif not self._take(self._files[index - 1]):
            self.refresh()

    def _take(self, path: Path) -> bool:
        """Choose what a file says; return whether it could be read."""
        try:
            self._use(read_settings(path))
        except MorphSeekError as problem:
            self._fail(sentence(problem))
            return False
        return True


def folder() -> Path:
    """Return the folder of the user's own settings, beside Slicer's."""
    return Path(qt.QSettings().fileName()).parent / "MorphSeek"
