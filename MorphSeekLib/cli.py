"""The command line: ``morphseek register | evaluate | check | warmup | finetune | spac | train | import-checkpoint |
info | demo | benchmark``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import Cancelled, MorphSeekError
from .events import Event, OnEvent

if TYPE_CHECKING:
    from .cases import CheckReport
    from .refinement import RefinementSettings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="MorphSeek: learned deformable registration, with a map of where it folds. For research, not for diagnosis.",
)
benchmarks = typer.Typer(no_args_is_help=True, help="Train and measure what a paper's table compares; hours to days.")
app.add_typer(benchmarks, name="benchmark")
console = Console()
errors = Console(stderr=True, soft_wrap=True)

Model = Annotated[str, typer.Option(help="A bundled model's name, or a .safetensors file.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
Steps = Annotated[int | None, typer.Option(help="Refinement steps; what the model was trained with by default.")]
Align = Annotated[
    str | None, typer.Option(help="none, center, rigid or affine before the network; what the model wants by default.")
]
Refine = Annotated[
    int, typer.Option(help="Iterations that fit this pair without labels, after the network: slower and more exact.")
]
RefineFine = Annotated[
    int, typer.Option(help="Iterations more on the fixed image's own grid: the most exact, and the slowest.")
]
RefineBy = Annotated[str, typer.Option(help="What --refine fits: lncc (one modality), mind (two) or mse.")]


@app.command()
def register(
    fixed: Annotated[Path, typer.Argument(help="The image that stays: NIfTI, NRRD, MHA or a folder of DICOM slices.")],
    moving: Annotated[Path, typer.Argument(help="The image that is brought onto it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made when missing.")],
    model: Model = "brain-mr",
    steps: Steps = None,
    device: Device = "auto",
    align: Align = None,
    refine: Refine = 0,
    refine_fine: RefineFine = 0,
    refine_by: RefineBy = "lncc",
    initial_transform: Annotated[
        Path | None, typer.Option(help="ITK transform file, fixed to moving, to start from (turns --align off).")
    ] = None,
    fixed_labels: Annotated[Path | None, typer.Option(help="Label map of the fixed image, for Dice.")] = None,
    moving_labels: Annotated[Path | None, typer.Option(help="Label map of the moving image, carried along.")] = None,
    inverse: Annotated[bool, typer.Option(help="Write inverse.h5 too.")] = True,
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="Save time: end at a step that raises the similarity by under 0.002.")
    ] = False,
) -> None:
    """Register MOVING to FIXED and write the transform, the warped image, the folding map and a report."""
    with job() as (on_event, cancelled):
        from .events import checkpoint_for
        from .geometry import covering_grid
        from .images import check_labels, read_image, read_labels
        from .registration import load_model
        from .registration import register as run
        from .results import check_writable, write_results
        from .transforms import read_transform

        begin = time.perf_counter()
        refinement = refinement_of(refine, refine_fine, refine_by)
        check_writable(output)
        on_event(Event("read", 0.0, "Reading the images"))
        images = read_image(fixed), read_image(moving)
        labels = [
            None if path is None else check_labels(read_labels(path), image, path.name)
            for path, image in zip((fixed_labels, moving_labels), images, strict=True)
        ]
        initial = None
        if initial_transform is not None:
            initial = read_transform(initial_transform, covering_grid(images[0].grid))
        read = time.perf_counter()
        on_event(Event("load", 0.01, "Loading the model"))
        loaded_model = load_model(model, device)
        loaded = time.perf_counter()
        result = run(
            *images,
            loaded_model,
            steps=steps,
            align=align,
            initial=initial,
            fixed_labels=labels[0],
            moving_labels=labels[1],
            inverse=inverse,
            refinement=refinement,
            stop_early=stop_early,
            on_event=on_event,
            cancelled=cancelled,
        )
        result.report["seconds"] |= {"read": round(read - begin, 3), "load": round(loaded - read, 3)}
        on_event(Event("write", 0.95, "Writing the results"))
        names = {"fixed": str(fixed), "moving": str(moving)}
        report = write_results(output, result, images[0], names, checkpoint_for(cancelled))
        on_event(Event("write", 1.0, "Done"))
    print_report(report)
    console.print(f"Report: {(output / 'report.html').resolve()}", soft_wrap=True)


@app.command()
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="dataset.json in Learn2Reg's style.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    split: Annotated[str, typer.Option(help="Which pairs.")] = "registration_test",
    steps: Steps = None,
    device: Device = "auto",
    align: Align = None,
    refine: Refine = 0,
    refine_fine: RefineFine = 0,
    refine_by: RefineBy = "lncc",
) -> None:
    """Register every pair of a data set; write Dice, HD95, NJD and SDlogJ per pair and their means."""
    with job() as (on_event, cancelled):
        from .datasets import load_dataset
        from .evaluation import evaluate as run
        from .registration import load_model

        refinement = refinement_of(refine, refine_fine, refine_by)
        data = load_dataset(dataset)
        loaded = load_model(model, device)
        result = run(
            data, split, loaded, out, steps=steps, align=align, refinement=refinement, on_event=on_event,
            cancelled=cancelled,
        )  # fmt: skip
    table = Table("figure", "mean", "standard deviation", title=f"{result['dataset']}, {len(result['pairs'])} pairs")
    for name, mean in result["mean"].items():
        table.add_row(name, f"{mean:.4f}", f"{result['std'][name]:.4f}")
    console.print(table)
    console.print(f"Wrote {out}", soft_wrap=True)


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="dataset.json, or a folder of images and label maps named alike.")],
    out: Annotated[Path | None, typer.Option(help="A JSON file to write the findings to.")] = None,
    labels: Annotated[bool, typer.Option(help="Whether every case needs labels (warm-up alone does not).")] = True,
) -> None:
    """Look through the cases of a training before it: grids, labels in common, counts. Exit code 2: no start."""
    with job() as (on_event, cancelled):
        from .cases import check as run
        from .cases import find_cases
        from .checkpoint import write_atomically
        from .settings import to_dict

        report = run(find_cases(dataset), labels=labels, on_event=on_event, cancelled=cancelled)
        if out is not None:
            write_atomically(out, json.dumps(to_dict(report), indent=1).encode())
    print_check(report)
    if report.problems:
        raise typer.Exit(2)


@app.command()
def warmup(
    dataset: Annotated[Path, typer.Argument(help="dataset.json, or a folder of label maps for synthetic training.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (.safetensors).")],
    config: Annotated[Path | None, typer.Option(help="Settings, TOML or JSON; see Resources/Training.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Overrides model.backbone of the settings.")] = None,
    init: Annotated[Path | None, typer.Option(help="A checkpoint of the same model to start from.")] = None,
    device: Device = "auto",
) -> None:
    """Train a backbone with its policy head. Run the same command again to resume a run that was stopped."""
    with job() as (on_event, cancelled):
        import dataclasses

        from .datasets import load_dataset
        from .devices import pick_device
        from .settings import load
        from .training import TrainingConfig
        from .training import warmup as run

        settings = load(TrainingConfig, config)
        if backbone is not None and backbone != settings.model.backbone:
            settings = dataclasses.replace(
                settings, model=dataclasses.replace(settings.model, backbone=backbone, backbone_settings={})
            )
        where = pick_device(device)
        run(load_dataset(dataset), settings, out, device=where, init=init, on_event=on_event, cancelled=cancelled)
    console.print(f"Wrote {out}; curves: tensorboard --logdir {out}.log", soft_wrap=True)


@app.command()
def finetune(
    dataset: Annotated[Path, typer.Argument(help="dataset.json with labelled training cases.")],
    init: Annotated[Path, typer.Option(help="The checkpoint to start from.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (.safetensors).")],
    config: Annotated[Path | None, typer.Option(help="Settings, TOML or JSON; see Resources/Training.")] = None,
    steps: Annotated[int | None, typer.Option(help="Refinement steps T; overrides the settings.")] = None,
    trajectories: Annotated[int | None, typer.Option(help="Trajectories J; overrides the settings.")] = None,
    labels: Annotated[int | None, typer.Option(help="Use only the first so many labelled cases.")] = None,
    device: Device = "auto",
) -> None:
    """Fine-tune a checkpoint by GRPO on labelled cases. Run the same command again to resume a run that was stopped.

    Under torchrun or SLURM all processes share the work.
    """
    with job() as (on_event, cancelled):
        from .checkpoint import find
        from .datasets import load_dataset
        from .devices import pick_device
        from .distributed import join
        from .finetuning import FinetuneConfig
        from .finetuning import finetune as run
        from .settings import load, override

        settings = load(FinetuneConfig, config)
        settings = override(settings, "training", steps=steps, labels=labels)
        settings = override(settings, "policy", trajectories=trajectories)
        world = join(device)
        where = world.device or pick_device(device)
        run(
            load_dataset(dataset), settings, find(init), out, device=where, world=world, on_event=on_event,
            cancelled=cancelled,
        )  # fmt: skip
    console.print(f"Wrote {out}; curves: tensorboard --logdir {out}.log", soft_wrap=True)


@app.command()
def spac(
    dataset: Annotated[Path, typer.Argument(help="dataset.json with labelled training cases.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (.safetensors).")],
    config: Annotated[Path | None, typer.Option(help="Settings, TOML or JSON; see Resources/Training.")] = None,
    labels: Annotated[int | None, typer.Option(help="Use only the first so many labelled cases.")] = None,
    device: Device = "auto",
) -> None:
    """Train SPAC, the reinforcement learning that MorphSeek is compared with, by soft actor-critic.

    Run the same command again to resume a run that was stopped.
    """
    with job() as (on_event, cancelled):
        from .datasets import load_dataset
        from .devices import pick_device
        from .sac import SACConfig, train_spac
        from .settings import load, override

        settings = override(load(SACConfig, config), "training", labels=labels)
        where = pick_device(device)
        train_spac(load_dataset(dataset), settings, out, device=where, on_event=on_event, cancelled=cancelled)
    console.print(f"Wrote {out}; curves: tensorboard --logdir {out}.log", soft_wrap=True)


@app.command()
def train(
    folder: Annotated[Path, typer.Argument(help="A training run: a folder with run.json, as Slicer makes it.")],
    while_open: Annotated[
        bool, typer.Option(help="Stop when standard input is closed, unless the folder then holds a file 'keep'.")
    ] = False,
) -> None:
    """Warm up, fine-tune and measure as a run's folder says. Run it again to resume; a file 'stop' there stops it."""
    with job() as (on_event, cancelled):
        from .runs import run

        stop, alone = threading.Event(), threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # what a session's end sends
        if while_open:
            threading.Thread(target=_await_end, args=(sys.stdin.fileno(), alone), daemon=True).start()
        model = run(
            folder,
            on_event,
            lambda: cancelled() or stop.is_set() or (alone.is_set() and not (folder / "keep").exists()),
        )
    console.print(f"Wrote {model}", soft_wrap=True)


@app.command()
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="A PyTorch file of an official code; read weights-only, never run.")],
    architecture: Annotated[str, typer.Option(help="Whose weights they are, such as vxm-2; a wrong name lists all.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (.safetensors).")],
    spacing: Annotated[
        tuple[float, float, float] | None, typer.Option(help="mm of the working grid; the fixed image's by default.")
    ] = None,
    shape: Annotated[
        tuple[int, int, int] | None, typer.Option(help="The least voxels of the working grid: the size of training.")
    ] = None,
    orientation: Annotated[str | None, typer.Option(help="Axis code of the working grid; RAS by default.")] = None,
    intensity: Annotated[
        str | None, typer.Option(help="percentile (the default), window or none: how intensities become 0 to 1.")
    ] = None,
    low: Annotated[float | None, typer.Option(help="The percentile or intensity that becomes 0.")] = None,
    high: Annotated[float | None, typer.Option(help="The percentile or intensity that becomes 1.")] = None,
    align: Annotated[str | None, typer.Option(help="none, center, rigid or affine (the default) before.")] = None,
    steps: Annotated[int, typer.Option(help="Refinement steps when nothing is asked for.")] = 1,
    title: Annotated[str, typer.Option(help="One line for a list of models.")] = "",
    licence: Annotated[str, typer.Option(help="Of the weights; the file does not say.")] = "",
) -> None:
    """Make a MorphSeek checkpoint of the weights of a published network; it gives what the official code gives."""
    with job():
        from .official import import_checkpoint as run
        from .preprocessing import Preprocessing
        from .settings import from_dict

        options = {
            "spacing": spacing, "shape": shape, "orientation": orientation, "intensity": intensity, "low": low,
            "high": high, "align": align, "steps": steps,
        }  # fmt: skip
        given = {name: value for name, value in options.items() if value is not None}
        preprocessing = from_dict(Preprocessing, given, "the checkpoint's preprocessing")
        run(file, architecture, out, preprocessing=preprocessing, title=title, licence=licence)
    console.print(f"Wrote {out}", soft_wrap=True)


@app.command()
def info(model: Annotated[str, typer.Argument(help="A bundled model's name, or a .safetensors file.")]) -> None:
    """Print a checkpoint's card: what it is, what it was trained on, how it was measured, its licence."""
    with job():
        from .checkpoint import find, read_card, sha256, weights_sha256
        from .settings import to_dict

        path = find(model)
        card = to_dict(read_card(path)) | {"sha256": {"file": sha256(path), "weights": weights_sha256(path)}}
    console.print_json(json.dumps(card))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo-output"),
    device: Device = "auto",
) -> None:
    """Register two real brain scans that come with installable packages, and say how well it went."""
    with job() as (on_event, cancelled):
        from .demo import run_demo

        report, sentences = run_demo(output, device, on_event, cancelled)
    print_report(report)
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)
    console.print(f"Report: {(output / 'report.html').resolve()}", soft_wrap=True)


Data = Annotated[Path, typer.Option(help="The folder that holds the data.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; made when missing. Runs in it are not done again.")]
Only = Annotated[str | None, typer.Option(help="Only these runs: TASK/METHOD/ARM, wildcards allowed, parts optional.")]
Settings = Annotated[Path | None, typer.Option("--config", help="Other settings; see Resources/Benchmarks.")]


BENCHMARKS = {
    "main-table": "The paper's main table on four data sets. The same command resumes; two of it share the runs.",
    "native-brains": "Whole brains at 1 mm, unaligned, by the bundled model, greedy and SyN.",
    "oasis": "The paper's table on the original OASIS of Learn2Reg, in the paper's sizes: for a GPU.",
    "lits": "The paper's table on the original LiTS, in the paper's sizes: for a GPU.",
    "abdomen-mrct": "The paper's table on Learn2Reg's original Abdomen MR-CT, in the paper's sizes: for a GPU.",
}


def _add_benchmark(name: str, text: str) -> None:
    """A command that does a benchmark's runs, by its own settings or by others."""

    @benchmarks.command(name, help=text)
    def command(data: Data, out: Out, only: Only = None, config: Settings = None, device: Device = "auto") -> None:
        with job() as (on_event, cancelled):
            from .benchmark.main_table import MainTableSettings, main_table, shipped_settings
            from .settings import load

            settings = shipped_settings(name) if config is None else load(MainTableSettings, config)
            main_table(settings, data, out, only=only, device=device, on_event=on_event, cancelled=cancelled)
        console.print(f"Wrote {out / 'table.md'}", soft_wrap=True)


for _name, _text in BENCHMARKS.items():
    _add_benchmark(_name, _text)


@contextmanager
def job() -> Iterator[tuple[OnEvent, Callable[[], bool]]]:
    """Progress on the terminal, Ctrl-C as cancellation, refusals as one sentence and exit code 2."""
    cancelled = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: cancelled.set()) if main else None
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn()
    code = 0
    try:
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("", total=1.0)
            shown = ""

            def on_event(event: Event) -> None:
                nonlocal shown
                progress.update(task, description=event.message, completed=event.fraction)
                # where no bar can be drawn (a log file), say each new phase
                if not errors.is_terminal and event.phase != "train" and event.message != shown:
                    errors.print(event.message)
                elif not errors.is_terminal and event.phase == "train" and event.step % 50 == 0:
                    figures = ", ".join(f"{k} {v:.4g}" for k, v in event.metrics.items())
                    errors.print(f"{event.message}: {figures}")
                shown = event.message

            yield on_event, cancelled.is_set
    except MorphSeekError as error:
        errors.print(str(error), style="red", markup=False)
        code = 2
    except Cancelled:
        errors.print("Cancelled.")
        code = 130
    except BrokenPipeError:
        code = 1
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if code:
        raise typer.Exit(code)


def refinement_of(iterations: int, fine_iterations: int, similarity: str) -> RefinementSettings:
    """The refinement that was asked for.

    Raises:
        MorphSeekError: an unknown similarity or an impossible number.
    """
    from .refinement import RefinementSettings
    from .settings import from_dict

    values = {"iterations": iterations, "fine_iterations": fine_iterations, "similarity": similarity}
    return from_dict(RefinementSettings, values, "refinement")


def print_report(report: dict) -> None:
    """The figures of one registration, as a table."""
    table = Table("figure", "value", title="Registration", show_header=False)
    if report.get("dice"):
        mean = report["dice"]["mean"]
        table.add_row("Dice, as given / aligned / registered", " / ".join(f"{mean[k]:.3f}" for k in mean))
    similarity = report["similarity"]
    table.add_row(
        "Similarity (LNCC), aligned / registered", f"{similarity['aligned']:.3f} / {similarity['warped']:.3f}"
    )
    folding = report["folding"]
    table.add_row(
        "Folding (NJD)", f"{folding['njd_percent']:.4f} % ({folding['folded_voxels']} of {folding['voxels']} voxels)"
    )
    table.add_row("SDlogJ", f"{folding['sdlogj']:.3f}")
    motion = report["displacement_mm"]
    table.add_row("Displacement, mean / 95 % / largest", " / ".join(f"{motion[k]:.1f}" for k in motion) + " mm")
    if report.get("inverse") and report["inverse"]["residual_mm"]:
        residual = report["inverse"]["residual_mm"]
        table.add_row("Inverse, residual mean / 95 %", f"{residual['mean']:.3f} / {residual['p95']:.3f} mm")
    table.add_row("Seconds", f"{report['seconds']['total']:.1f} on {report['device']}")
    console.print(table)
    for warning in report.get("warnings", []):
        errors.print(warning["message"], style="yellow", markup=False)


def _await_end(source: int, ended: threading.Event) -> None:
    """Set an event when a file descriptor has nothing more to give. Not through sys.stdin: a thread that waits in it
    cannot be left behind at the process's end."""
    while os.read(source, 4096):
        pass
    ended.set()


def print_check(report: CheckReport) -> None:
    """The findings about a data set, as a table and sentences."""
    table = Table("case", "voxels", "mm", "labels", "remarks", title="Cases")
    for case in report.cases:
        remarks = [f"[red]{escape(text)}[/red]" for text in case.problems] + [escape(text) for text in case.warnings]
        numbers = (" x ".join(f"{n:g}" for n in values) for values in (case.shape, case.spacing))
        table.add_row(escape(case.name), *numbers, str(len(case.labels)), "\n".join(remarks))
    console.print(table)
    for text in report.warnings:
        console.print(text, soft_wrap=True, markup=False)
    for text in report.problems:
        errors.print(text, style="red", markup=False)
    if not report.problems:
        left_out = f"; {len(report.unusable)} are left out" if report.unusable else ""
        console.print(
            f"{report.training} cases to train on, {report.validation_pairs} pairs to validate on, {report.test_pairs} "
            f"held-out pairs for the figures before and after; labels in common: {len(report.common)}{left_out}.",
            soft_wrap=True,
        )


def main() -> None:
    """Entry point of ``morphseek``."""
    app()


if __name__ == "__main__":
    main()
