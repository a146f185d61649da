"""What the section Fine-tune says: sentences, the table of figures before and after, short names."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from MorphSeekLib.protocol.run_folder import HeldOut

from .faults import Fault
from .messages import fault_sentence
from .scene import _
from .training_run import RunStatus

_FIGURES = {
    "dice": (_("Dice"), "{:.3f}", 1),
    "hd95": (_("HD95, mm"), "{:.2f}", -1),
    "folded_percent": (_("Folded cells, %"), "{:.3f}", -1),
    "njd_percent": (_("NJD, % (central differences)"), "{:.3f}", -1),
    "sdlogj": (_("SDlogJ"), "{:.3f}", -1),
}


def figures_table(held_out: HeldOut, better_ink: str, worse_ink: str) -> str:
    """Return the figures before and after as rich text; what got better and what got worse has a color of its own."""
    start, result = held_out.get("start"), held_out["mean"]
    lines = []
    for name, (title, form, better) in _FIGURES.items():
        if name not in result:  # a model of an earlier version has no folded cells
            continue
        values = result.get(f"{name}_aligned"), (start or {}).get(name), result[name]
        aligned, before, after = ("-" if value is None else form.format(value) for value in values)
        if "-" not in (before, after) and before != after:
            color = better_ink if (result[name] - start[name]) * better > 0 else worse_ink
            after = f'<b style="color: {color}">{after}</b>'
        tip = escape(held_out["definitions"].get(name, ""))
        cells = (aligned, before, after)
        lines.append(
            f'<tr><td title="{tip}">{title}</td>' + "".join(f'<td align="right">{cell}</td>' for cell in cells)
        )
    head = [_("{count} held-out pairs").format(count=held_out["pairs"]), _("aligned"), _("before"), _("after")]
    return (
        '<table cellpadding="3"><tr>'
        + "".join(f"<th>{h}</th>" for h in head)
        + "</tr>"
        + "</tr>".join(lines)
        + "</tr></table>"
    )


def status_sentence(status: RunStatus) -> str:
    """Return where a run stands in one sentence."""
    if status.state == "stopping":
        return _("Stopping: the iteration under way is finished first. {message}").format(message=status.message)
    if status.state == "done":
        return _("Done. The model '{name}' is in the list of models.").format(name=Path(status.model).stem)
    if status.state == "failed" and not status.message:
        if status.last_words:
            return fault_sentence(Fault.RUN_NOT_BEGUN, reason=status.last_words)
        return fault_sentence(Fault.RUN_NOT_BEGUN_SILENTLY)
    states = {
        "new": _("Not started yet."),
        "starting": _("Starting the engine"),
        "stopped": _("Stopped; it can be resumed."),
        "interrupted": _("The training was interrupted; Resume goes on from the last state that it saved."),
    }
    if status.state in states:
        return states[status.state]
    stages = {
        "features": _("Features"),
        "warmup": _("Warm-up"),
        "finetune": _("Fine-tuning"),
        "evaluate": _("Figures"),
        "final": _("All cases"),
    }
    if status.state == "running" and status.stage in stages:
        return f"{stages[status.stage]}: {status.message}"
    return status.message


def distinct_names(names: list[str], kept: int = 8) -> list[str]:
    """Shorten paths to what tells them apart: without their common folder, and without a long beginning in common."""
    prefix = os.path.commonprefix(names)  # noqa: RUF071 - by characters is meant
    folder = prefix.rfind("/") + 1
    if len(names) < 2 or len(prefix) - folder <= kept:
        return [name[folder:] for name in names]
    return [f"\N{HORIZONTAL ELLIPSIS}{name[len(prefix) - kept // 2 :]}" for name in names]


def size_text(numbers: list) -> str:
    """Return numbers along the axes, such as 24 x 28 x 20."""
    return " x ".join(f"{n:g}" for n in numbers)


def file_name(name: str) -> str:
    """Return a name without what file systems dislike."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"
