"""The command line: ``morphseek register | batch | correct | apply | evaluate | check | warmup | finetune | spac |
train | import-checkpoint | info | doctor | demo``.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..protocol.batch import FILES, KEPT, BatchSettings, globbed, input_paths, read_table
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import Event, Job, Notice
from ..protocol.options import RegistrationOptions, TrainingOptions
from ..protocol.report import CorrectedSection, LandmarksSection, Report, TrustSection
from ..protocol.run_folder import KEEP, SETTINGS, STATUS, HeldOut, read_json, run_beside
from ..protocol.settings import from_dict
from ..protocol.settings_file import (
    RegistrationSettings,
    check_settings_name,
    read_settings,
    read_values,
    settings_text,
)
from ..protocol.startup import (
    AUTO,
    check_device,
    check_interpolation,
    check_iterations,
    check_model,
    check_model_choice,
    check_output_file,
    check_output_folder,
    check_readable,
    check_run,
    check_threads,
    find,
    shown,
    transform_paths,
    wait_passively,
)

if TYPE_CHECKING:
    from ..data.cases import CheckReport
    from ..networks.model_file import Card

OLD_NAMES = {"refine-by": "similarity"}
"""Options of before -> of now; the old ones still work, hidden, for one release."""
FORMER = "--model brain-mr --search off --fit off"
"""What gives the answer that a command without options gave before."""

MINUTES = TrainingOptions.minutes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: OLD_NAMES.get(name, name)},
    help="MorphSeek: learned deformable registration, with a map of where it folds. For research, not for diagnosis.",
)
# no markup: a file may be named scan[1].nii
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)

Model = Annotated[
    str,
    typer.Option(help="A bundled model, a .safetensors file, none (any anatomy), or auto: what suits the images."),
]
Device = Annotated[str, typer.Option(help="auto (the first GPU, else the processor), cpu or cuda:N.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of the processor to compute with.", show_default="all", metavar="N")
]
Steps = Annotated[
    int | None, typer.Option(help="Steps of the network, 1 to 20.", show_default="what the model was trained with")
]
Align = Annotated[
    str,
    typer.Option(help="Alignment: none, center, rigid, affine, or auto: the model's own, else what fits best."),
]
PresetOption = Annotated[str, typer.Option(help="best, or fast: about a third of the time.")]
SearchOption = Annotated[str, typer.Option(help="Search for large motion: on, off, or auto, where it helps.")]
FitOption = Annotated[
    str,
    typer.Option(help="Fit this pair, without labels: on, off, or auto: unless the model was better without."),
]
SimilarityOption = Annotated[
    str,
    typer.Option(help="What fit and figures compare by: lncc (also auto), mind (across modalities) or mse."),
]
TrustOption = Annotated[
    str,
    typer.Option(help="Estimate the error at each place, in up to twice the time of search and fit: on or off."),
]
FitIterations = Annotated[
    str | None,
    typer.Option(help="Iterations of the fit, coarse to fine, such as 60/60/30.", show_default="the preset's"),
]
NiftiForm = Annotated[
    str | None,
    typer.Option(help="qform or sform: which one places NIfTI files that have both; the one ITK takes by default."),
]
InitialTransform = Annotated[
    str | None,
    typer.Option(
        help="ITK transform, fixed to moving, to start from (turns --align off); several as in apply.",
        metavar="FILE[,FILE...]",
    ),
]
FixedLabels = Annotated[Path | None, typer.Option(help="Label map of the fixed image, for Dice.")]
MovingLabels = Annotated[Path | None, typer.Option(help="Label map of the moving image, carried along.")]
FixedLandmarks = Annotated[
    Path | None, typer.Option(help="Points of the fixed image (.mrk.json, .fcsv, .csv), to measure by.")
]
MovingLandmarks = Annotated[Path | None, typer.Option(help="The same points in the moving image.")]
FixedMask = Annotated[
    Path | None, typer.Option(help="Only what it marks in the fixed image counts; a label map on any grid.")
]
MovingMask = Annotated[Path | None, typer.Option(help="The same of the moving image.")]
Ignore = Annotated[
    Path | None, typer.Option(help="What it marks in the fixed image does not count: a lesion, an electrode.")
]
IgnoreMoving = Annotated[Path | None, typer.Option(help="The same of the moving image.")]
OptionsFile = Annotated[
    Path | None,
    typer.Option("--options", help="Saved settings (TOML or JSON); an option that is given here too counts more."),
]
SaveOptions = Annotated[
    Path | None, typer.Option("--save-options", help="Save the settings of this registration (.toml or .json).")
]
StopEarly = Annotated[
    bool, typer.Option("--stop-early", help="Save time: end at a step that raises the similarity by under 0.002.")
]
AsFloat = Annotated[
    bool, typer.Option("--float", help="Write warped.nii.gz as float; in the moving image's type by default.")
]
OldIterations = Annotated[int, typer.Option("--refine", hidden=True)]
OldFine = Annotated[int, typer.Option("--refine-fine", hidden=True)]
Config = Annotated[
    str | None,
    typer.Option(
        help="Settings: a recipe's name (a wrong one lists all), or a TOML or JSON file.",
        show_default="built-in settings",
    ),
]
FirstLabels = Annotated[
    int | None, typer.Option(help="Use only the first N labeled cases.", show_default="all", metavar="N")
]
Iterations = Annotated[
    int | None, typer.Option(help="Iterations of the training.", show_default="the settings'", metavar="N")
]
Workers = Annotated[int, typer.Option(help="Local processes, each with its share of the threads.", metavar="N")]
Cluster = Annotated[str | None, typer.Option(help="Dask scheduler, tls://HOST:8786; tcp:// for private networks only.")]
ClusterSecurity = Annotated[
    Path | None, typer.Option(help="JSON for tls://: tls_ca_file, tls_client_cert, tls_client_key.")
]
SchedulerFile = Annotated[Path | None, typer.Option(help="Scheduler file of a Dask cluster.")]
WhileOpen = Annotated[
    bool,
    typer.Option(
        "--while-open", help="Stop when standard input is closed, unless the folder then holds a file 'keep'."
    ),
]
NewModel = Annotated[Path, typer.Option(help="The model file to write (.safetensors).")]


@dataclass(frozen=True)
class Choices:
    """The options that every command that registers has. :func:`chosen_settings` makes the engine's of them."""

    preset: PresetOption = "best"
    device: Device = "auto"
    threads: Threads = None
    align: Align = "auto"
    search: SearchOption = "auto"
    steps: Steps = None
    fit: FitOption = "auto"
    similarity: SimilarityOption = "auto"
    fit_iterations: FitIterations = None
    trust: TrustOption = "off"
    refine: OldIterations = 0
    refine_fine: OldFine = 0


def with_choices(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command each field of :class:`Choices` as an option; it takes them as ``choices``."""
    shared = inspect.signature(Choices, eval_str=True).parameters

    def run(**values: Any) -> None:
        command(choices=Choices(**{name: values.pop(name) for name in shared}), **values)

    own = inspect.signature(command, eval_str=True).parameters.values()
    each = [p for one in own for p in (shared.values() if one.name == "choices" else [one])]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {p.name: p.annotation for p in each}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in each]
    )
    return run


@app.command()
@with_choices
def register(
    ctx: typer.Context,
    fixed: Annotated[Path, typer.Argument(help="The image that stays: NIfTI, NRRD, MHA or a folder of DICOM slices.")],
    moving: Annotated[Path, typer.Argument(help="The image that is registered to FIXED.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made when missing.")],
    *,
    model: Model = AUTO,
    choices: Choices,
    initial_transform: InitialTransform = None,
    fixed_labels: FixedLabels = None,
    moving_labels: MovingLabels = None,
    fixed_landmarks: FixedLandmarks = None,
    moving_landmarks: MovingLandmarks = None,
    fixed_mask: FixedMask = None,
    moving_mask: MovingMask = None,
    ignore: Ignore = None,
    ignore_moving: IgnoreMoving = None,
    inverse: Annotated[bool, typer.Option(help="Write inverse.h5 too.")] = True,
    stop_early: StopEarly = False,
    nifti_form: NiftiForm = None,
    as_float: AsFloat = False,
    options_file: OptionsFile = None,
    save_options: SaveOptions = None,
) -> None:
    """Register MOVING to FIXED and write the transform, the warped image, the folding map and a report."""
    with terminal_job() as job:
        files = {name: str(value) for name in FILES if (value := ctx.params[name]) is not None}
        check_files(input_paths(files), options_file, save_options)
        settings = chosen_settings(ctx, options_file)  # all that a registration can be told
        check_choices(model=settings.model, device=choices.device, threads=choices.threads)
        check_output_folder(output)

        from .pair_files import Around, PairFiles, register_files

        def tell_model(words: str) -> None:
            tell(f"{words} (The answer of earlier versions: {FORMER}.)" if settings.model == AUTO else words)

        begin_to_compute(choices.threads)
        pair = PairFiles(files, nifti_form, as_float)
        report, *_ = register_files(pair, settings, output, choices.device, job, around=Around(tell=tell_model))
        save_settings(settings, save_options)
        job.report("write", 1.0, "Done")
    print_report(report)
    console.print(f"Report: {shown((output / 'report.html').resolve())}", soft_wrap=True)


@app.command(name="batch")
@with_choices
def batch_command(
    ctx: typer.Context,
    pairs: Annotated[
        Path | None, typer.Argument(help="CSV or TSV: fixed, moving, and any of name, fixed_labels, an option ...")
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the batch; made when missing.")],
    fixed: Annotated[Path | None, typer.Option(help="A template that all images are registered to.")] = None,
    moving: Annotated[str | None, typer.Option(help="Pattern of the moving images, in quotation marks.")] = None,
    bids: Annotated[Path | None, typer.Option(help="A BIDS data set; with --fixed or --longitudinal.")] = None,
    suffix: Annotated[str, typer.Option(help="Of the BIDS images.")] = "T1w",
    longitudinal: Annotated[
        bool, typer.Option("--longitudinal", help="Register later sessions of a subject to its first.")
    ] = False,
    subject: Annotated[list[str] | None, typer.Option(help="Only this subject; may be repeated.")] = None,
    session: Annotated[list[str] | None, typer.Option(help="Only this session; may be repeated.")] = None,
    model: Model = AUTO,
    choices: Choices,
    inverse: Annotated[bool, typer.Option(help="Write inverse.h5 too.")] = True,
    stop_early: StopEarly = False,
    nifti_form: NiftiForm = None,
    options_file: OptionsFile = None,
    keep: Annotated[
        str | None, typer.Option(help="Results to keep of each pair, such as warped,transform.", show_default="all")
    ] = None,
    workers: Workers = 1,
    cluster: Cluster = None,
    cluster_security: ClusterSecurity = None,
    scheduler_file: SchedulerFile = None,
    retry: Annotated[bool, typer.Option("--retry", help="Register pairs again that failed before.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to begin if a row has a problem.")] = False,
    while_open: WhileOpen = False,
) -> None:
    """Register many pairs, in processes or on a cluster. The same command goes on where it was stopped.

    Exit code: 0 all done, 3 some failed, 2 refused, 130 canceled.
    """
    with terminal_job() as job:
        settings = chosen_settings(ctx, options_file)
        check_choices(model=settings.model, device=choices.device, threads=choices.threads)
        rows = _rows(pairs, fixed, moving, bids, suffix, longitudinal, (subject or [], session or []))
        kept = tuple(part.strip() for part in keep.split(",") if part.strip()) if keep is not None else tuple(KEPT)
        shared = BatchSettings(settings.model, settings.options, kept, nifti_form)

        from .batch import BatchOptions, batch
        from .batch_status import told
        from .crew import cluster_client

        options = BatchOptions(output, shared, workers, choices.threads, choices.device, retry, strict, bids)
        with (
            told(output, job, _alone() if while_open else None) as watched,
            cluster_client(cluster, cluster_security, scheduler_file) as client,
        ):
            try:
                outcomes = batch(rows, options, client, watched)
            except Cancelled:
                tell(f"{output} keeps the pairs that are done. To go on, run the same command again.")
                raise
    console.print(f"Cohort: {shown((output / 'cohort.html').resolve())}", soft_wrap=True)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        errors.print(f"{outcome.name}: {outcome.problem}", style="red", soft_wrap=True)
    if failed:
        names = ", ".join(outcome.name for outcome in failed)
        console.print(f"{len(failed)} of {len(outcomes)} pairs failed: {names}", soft_wrap=True)
        raise typer.Exit(3)
    console.print(f"All {len(outcomes)} pairs are done.")


def _rows(
    pairs: Path | None,
    fixed: Path | None,
    moving: str | None,
    bids: Path | None,
    suffix: str,
    longitudinal: bool,
    only: tuple[list[str], list[str]],
) -> list[dict[str, str]]:
    """Return the rows of a batch, however they were named.

    Raises:
        MorphSeekError: none or several ways were used, or no pair was found.
    """
    if sum(way is not None for way in (pairs, moving, bids)) != 1:
        raise MorphSeekError("Give the pairs in one way: a CSV or TSV file, --fixed with --moving, or --bids.")
    if fixed is not None:
        check_readable(fixed)
    if pairs is not None:
        return read_table(pairs)
    if bids is not None:
        if (fixed is None) is not longitudinal:
            raise MorphSeekError("--bids needs either --fixed TEMPLATE or --longitudinal.")
        from ..data.bids import bids_rows

        return bids_rows(bids, suffix, fixed, *only)
    if fixed is None or moving is None:
        raise MorphSeekError("--moving needs --fixed, the image that all others are registered to.")
    return globbed(fixed, moving)


@app.command()
def correct(
    ctx: typer.Context,
    fixed: Annotated[Path, typer.Argument(help="The image that stays, as it was registered.")],
    moving: Annotated[Path, typer.Argument(help="The image that was registered to FIXED.")],
    transform: Annotated[
        Path,
        typer.Argument(help="What is to be corrected: transform.h5 of the registration, or another ITK transform."),
    ],
    fixed_points: Annotated[Path, typer.Option(help="Points of the fixed image (.mrk.json, .fcsv, .csv) ...")],
    moving_points: Annotated[Path, typer.Option(help="... and where these lie in the moving image.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made when missing.")],
    error: Annotated[float, typer.Option(help="How far off a point may be, mm, one standard deviation.")] = 1.0,
    fit: Annotated[bool, typer.Option(help="Go on with the fit around the points.")] = True,
    fixed_labels: FixedLabels = None,
    moving_labels: MovingLabels = None,
    fixed_mask: FixedMask = None,
    moving_mask: MovingMask = None,
    ignore: Ignore = None,
    ignore_moving: IgnoreMoving = None,
    device: Device = "auto",
    threads: Threads = None,
    nifti_form: NiftiForm = None,
) -> None:
    """Correct a registration of MOVING to FIXED where it is wrong, by points that belong together."""
    with terminal_job() as job:
        given = {**ctx.params, "fixed_landmarks": fixed_points, "moving_landmarks": moving_points}
        files = {name: str(value) for name in FILES if (value := given.get(name)) is not None}
        check_files([*(inputs := input_paths(files)), transform], None, None)
        check_choices(device=device, threads=threads)
        check_output_folder(output)

        import numpy as np

        from ..io.transforms import read_transform
        from ..networks.devices import pick_device
        from ..registration.correction import Correction
        from ..registration.pipeline import register as run
        from ..report.results import check_outputs, write_results
        from ..space.geometry import covering_grid
        from .pair_files import PairFiles

        begin_to_compute(threads)
        where = pick_device(device)
        check_outputs(output, [*inputs, transform])
        job.report("read", 0.0, "Reading the images")
        pair = PairFiles(files, nifti_form)
        images = pair.images()
        labels, points = pair.labels(images), pair.landmarks(images)
        assert points is not None  # both files were given
        start = Correction(
            read_transform(transform, covering_grid(images[0].grid)), points, np.full(len(points.labels), error)
        )
        images = pair.masked(images)
        options = RegistrationOptions(fit="on" if fit else "off")
        result = run(*images, None, options, job.part(0.01, 0.95), labels=labels, start=start, device=where)
        job.report("write", 0.95, "Writing the results")
        report = write_results(output, result, images[0], pair.names, job)
        job.report("write", 1.0, "Done")
    print_report(report)
    console.print(f"Report: {shown((output / 'report.html').resolve())}", soft_wrap=True)


@app.command()
def apply(
    transform: Annotated[
        str,
        typer.Argument(
            help="ITK transform files, such as transform.h5; a point of the reference goes through them in this order.",
            metavar="TRANSFORM[,TRANSFORM...]",
        ),
    ],
    image: Annotated[Path, typer.Argument(help="The image to resample, or with --labels a label map.")],
    reference: Annotated[Path, typer.Option(help="The image whose grid the result gets: FIXED of the registration.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The image to write; with --points this may be a file of points instead."),
    ],
    labels: Annotated[
        bool, typer.Option("--labels", help="IMAGE is a label map: nearest neighbor, 0 outside.")
    ] = False,
    interpolation: Annotated[str, typer.Option(help="linear, nearest, or bspline (cubic).")] = "linear",
    inverse: Annotated[bool, typer.Option("--inverse", help="Apply the transforms backward.")] = False,
    points: Annotated[
        Path | None,
        typer.Option(help="Points of the reference (.mrk.json, .fcsv, .csv); written is where they lie in IMAGE."),
    ] = None,
    nifti_form: NiftiForm = None,
    threads: Threads = None,
) -> None:
    """Apply transforms to an image, a label map or points of any kind: one interpolation, as ITK does it.

    With an image as OUTPUT the points go beside it, into OUTPUT-points with the ending of their own file.
    """
    with terminal_job() as job:
        check_choices(threads=threads)
        check_interpolation(interpolation)
        read = [image, reference, *([points] if points is not None else [])]
        for path in read:
            check_readable(path)

        from ..io.apply import apply_transforms, map_points
        from ..io.images import check_image_name, read_grid, read_image, read_labels, write_image
        from ..io.points import read_points, write_points

        files = transform_paths(transform)
        image_out, points_out = output_names(output, points)
        for path in filter(None, (image_out, points_out)):
            check_output_file(path, inputs=[*read, *files])
        begin_to_compute(threads)
        grid = read_grid(reference, nifti_form)
        notices: tuple[Notice, ...] = ()
        if points is not None and points_out is not None:
            given = read_points(points, grid)
            moved = dataclasses.replace(given, positions=map_points(given.positions, files, inverse=inverse))
        if image_out is not None:
            check_image_name(image_out)
            source = (read_labels if labels else read_image)(image, nifti_form)
            found = apply_transforms(source, files, grid, interpolation=interpolation, inverse=inverse, job=job)
            write_image(found, image_out)
            notices = found.notices
        if points_out is not None:
            write_points(moved, points_out, read_grid(image, nifti_form))
    for notice in notices:
        errors.print(notice.message, style="yellow")
    for path in filter(None, (image_out, points_out)):
        console.print(f"Wrote {shown(path)}", soft_wrap=True)


def output_names(output: Path, points: Path | None) -> tuple[Path | None, Path | None]:
    """Return the image and the points that ``apply`` writes; None for what it does not write.

    Raises:
        MorphSeekError: an output for points, and no points.
    """
    from ..io.points import ENDINGS

    ending = next((end for end in ENDINGS if output.name.lower().endswith(end)), None)
    if ending is not None and points is None:
        raise MorphSeekError(f"{shown(output)} is a name for points, but none were given; add --points FILE.")
    if points is None or ending is not None:
        return (output, None) if ending is None else (None, output)
    own = next((end for end in ENDINGS if points.name.lower().endswith(end)), points.suffix)
    stem = output.name.removesuffix(".gz").rpartition(".")[0] or output.name
    return output, output.with_name(f"{stem}-points{own}")


@app.command()
@with_choices
def evaluate(
    ctx: typer.Context,
    dataset: Annotated[Path, typer.Argument(help="dataset.json in Learn2Reg's style.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    *,
    split: Annotated[str, typer.Option(help="Which pairs of the data set.")] = "registration_test",
    choices: Choices,
    workers: Workers = 1,
    cluster: Cluster = None,
    cluster_security: ClusterSecurity = None,
    scheduler_file: SchedulerFile = None,
) -> None:
    """Register every pair of a data set; write Dice, HD95, NJD and SDlogJ of each pair, and their means.

    The same command goes on where it was stopped.
    """
    with terminal_job() as job:
        check_readable(dataset)
        settings = chosen_settings(ctx, None)
        check_choices(model=model, device=choices.device, threads=choices.threads)
        check_output_file(out, inputs=[dataset, model])
        if model == AUTO:
            raise MorphSeekError("An evaluation is of one model: give its name or file, or none.")

        from ..data.datasets import load_dataset
        from ..evaluation.evaluate import evaluate as run
        from ..registration.choice import chosen_model
        from .crew import Crew, cluster_client
        from .evaluate import by_crew

        begin_to_compute(choices.threads)
        data = load_dataset(dataset)
        loaded, where, _ = chosen_model(model, (), choices.device, job)
        with cluster_client(cluster, cluster_security, scheduler_file) as client:
            work = None
            if client is not None or workers != 1:
                crew = Crew(workers, choices.threads, client)
                work = by_crew(crew, data, split, model, settings.options, choices.device, job)
            result = run(data, split, loaded, out, settings.options, job, where, work)
    table = Table("figure", "mean", "standard deviation", title=f"{result['dataset']}, {len(result['pairs'])} pairs")
    for name in result["mean"]:
        values = (result[key][name] for key in ("mean", "std"))
        table.add_row(name, *("none" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    if result["lost_labels"]:
        lost = ", ".join(f"{name} in {count} pairs" for name, count in result["lost_labels"].items())
        errors.print(
            f"Labels that warping lost (Dice 0, no HD95): {lost}.", style="yellow", markup=False, soft_wrap=True
        )
    console.print(f"Wrote {out}", soft_wrap=True)


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="dataset.json, or a folder of images and label maps named alike.")],
    out: Annotated[Path | None, typer.Option(help="A JSON file to write the findings to.", show_default="none")] = None,
    labels: Annotated[bool, typer.Option(help="Whether every case needs labels (warm-up alone does not).")] = True,
) -> None:
    """Check the cases of a training before it starts: grids, common labels, counts. Exit code 2: it cannot start."""
    with terminal_job() as job:
        check_readable(dataset)
        if out is not None:
            check_output_file(out, inputs=[dataset])

        from ..data.cases import check as run
        from ..data.cases import find_cases

        report = run(find_cases(dataset), labels=labels, out=out, job=job)
    print_check(report)
    if report.problems:
        raise typer.Exit(2)


@app.command()
def warmup(
    dataset: Annotated[Path, typer.Argument(help="dataset.json, or a folder of label maps for synthetic training.")],
    out: NewModel,
    config: Config = None,
    backbone: Annotated[
        str | None, typer.Option(help="Overrides model.backbone of the settings.", show_default="the settings'")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="A model of the same kind to start from: a name or a file.", show_default="random weights"),
    ] = None,
    iterations: Iterations = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a backbone with its policy head. Run the same command again to resume a run that was stopped."""
    with terminal_job() as job:
        file, start = check_training(dataset, out, config, init, device=device, threads=threads, iterations=iterations)

        from ..data.datasets import load_dataset
        from ..networks.devices import pick_device
        from ..protocol.settings import override
        from ..training.warmup import TrainingConfig
        from ..training.warmup import warmup as run
        from .settings_file import load

        settings = override(load(TrainingConfig, file), "training", iterations=iterations)
        if backbone is not None and backbone != settings.model.backbone:
            settings = dataclasses.replace(
                settings, model=dataclasses.replace(settings.model, backbone=backbone, backbone_settings={})
            )
        begin_to_compute(threads)
        where = pick_device(device)
        run(load_dataset(dataset), settings, out, device=where, init=start, job=job)
    print_written(out)


@app.command()
def finetune(
    dataset: Annotated[Path, typer.Argument(help="dataset.json with labeled training cases.")],
    init: Annotated[str, typer.Option(help="The model to start from: a bundled model's name, or a .safetensors file.")],
    out: NewModel,
    config: Config = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps T of the network in training.", show_default="the settings'")
    ] = None,
    trajectories: Annotated[
        int | None, typer.Option(help="Trajectories J of each group.", show_default="the settings'")
    ] = None,
    labels: FirstLabels = None,
    iterations: Iterations = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Fine-tune a model by GRPO on labeled cases. Run the same command again to resume a run that was stopped.

    Under torchrun or SLURM all processes share the work.
    """
    with terminal_job() as job:
        file, start = check_training(dataset, out, config, init, device=device, threads=threads, iterations=iterations)

        from ..data.datasets import load_dataset
        from ..networks.devices import pick_device
        from ..protocol.settings import override
        from ..training.distributed import join
        from ..training.finetuning import FinetuneConfig
        from ..training.finetuning import finetune as run
        from .settings_file import load

        settings = load(FinetuneConfig, file)
        settings = override(settings, "training", steps=steps, labels=labels, iterations=iterations)
        settings = override(settings, "policy", trajectories=trajectories)
        begin_to_compute(threads)
        with join(device) as world:
            where = world.device or pick_device(device)
            run(load_dataset(dataset), settings, start or init, out, device=where, world=world, job=job)
    print_written(out)


@app.command()
def spac(
    dataset: Annotated[Path, typer.Argument(help="dataset.json with labeled training cases.")],
    out: NewModel,
    config: Config = None,
    labels: FirstLabels = None,
    iterations: Iterations = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train SPAC, the reinforcement learning that MorphSeek is compared with, by soft actor-critic.

    Run the same command again to resume a run that was stopped.
    """
    with terminal_job() as job:
        file, _ = check_training(dataset, out, config, device=device, threads=threads, iterations=iterations)

        from ..data.datasets import load_dataset
        from ..networks.devices import pick_device
        from ..protocol.settings import override
        from ..training.sac import SACConfig, train_spac
        from .settings_file import load

        begin_to_compute(threads)
        settings = override(load(SACConfig, file), "training", labels=labels, iterations=iterations)
        where = pick_device(device)
        train_spac(load_dataset(dataset), settings, out, device=where, job=job)
    print_written(out)


@app.command()
def train(
    ctx: typer.Context,
    cases: Annotated[Path, typer.Argument(help="Cases, as check takes them; or the folder of a training to resume.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The new model (.safetensors); the training's folder is made beside it.", show_default="none"
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="The model to start from: a bundled model's name or a file.", show_default="from scratch"),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes that the whole training may take, about.")] = MINUTES,
    final: Annotated[
        bool, typer.Option(help="Train on all cases in the end, also on those held out for the figures.")
    ] = False,
    options: Annotated[
        Path | None,
        typer.Option(help="Other choices (TOML or JSON) by their names in TrainingOptions.", show_default="none"),
    ] = None,
    while_open: WhileOpen = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a model on your cases: checked, trained with their labels, measured on cases held out.

    Ctrl-C stops it; the same command, or `morphseek train FOLDER`, goes on.
    """
    with terminal_job() as job:
        check_choices(threads=threads)
        stop, alone = threading.Event(), _alone() if while_open else threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # what a session's end sends
        if out is None:
            check_resumed(ctx, cases)
            folder, choices = cases, None
        else:
            folder, choices = run_beside(out), training_options(ctx)
        job = job.until(lambda: stop.is_set() or (alone.is_set() and not (folder / KEEP).exists()))

        from .runs import run
        from .train import train as begin

        begin_to_compute(threads)
        try:
            model = run(folder, job) if choices is None else begin(choices, job)
        except Cancelled:
            if (folder / SETTINGS).is_file():
                tell(f"{folder} keeps what was trained. To go on: morphseek train {folder}")
            raise
    print_trained(model, folder)


@app.command()
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="A PyTorch file of an official code; read weights-only, never run.")],
    architecture: Annotated[str, typer.Option(help="Whose weights they are, such as vxm-2; a wrong name lists all.")],
    out: NewModel,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Voxel size of the working grid, in mm.", show_default="the fixed image's"),
    ] = None,
    shape: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Smallest size of the working grid, in voxels.", show_default="what the image needs"),
    ] = None,
    orientation: Annotated[str | None, typer.Option(help="Axis code of the working grid.", show_default="RAS")] = None,
    intensity: Annotated[
        str | None,
        typer.Option(help="How intensities become 0 to 1: percentile, window or none.", show_default="percentile"),
    ] = None,
    low: Annotated[
        float | None, typer.Option(help="The percentile or intensity that becomes 0.", show_default="0.5")
    ] = None,
    high: Annotated[
        float | None, typer.Option(help="The percentile or intensity that becomes 1.", show_default="99.5")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(help="Alignment before the network: none, center, rigid or affine.", show_default="affine"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the network when a registration does not say.")] = 1,
    title: Annotated[str, typer.Option(help="One line for a list of models.", show_default="made from the file")] = "",
    license_: Annotated[
        str, typer.Option("--license", help="License of the weights, which the file does not say.", show_default="none")
    ] = "",
) -> None:
    """Make a MorphSeek model of a published network's weights; its results are those of the official code."""
    with terminal_job():
        check_readable(file)
        check_output_file(out, ".safetensors", [file])

        from ..networks.official import import_checkpoint as run
        from ..protocol.settings import from_dict
        from ..space.preprocessing import Preprocessing

        options = {
            "spacing": spacing, "shape": shape, "orientation": orientation, "intensity": intensity, "low": low,
            "high": high, "align": align, "steps": steps,
        }  # fmt: skip
        given = {name: value for name, value in options.items() if value is not None}
        preprocessing = from_dict(Preprocessing, given, "the model's preprocessing")
        run(file, architecture, out, preprocessing=preprocessing, title=title, license=license_)
    console.print(f"Wrote {out}", soft_wrap=True)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A bundled model's name, or a .safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole card as JSON, for programs.")] = False,
) -> None:
    """Print a model's card: what it is, what it was trained on, how it was measured, its license."""
    with terminal_job():
        file = check_model(model)

        from ..networks.model_file import read_card
        from ..protocol.settings import to_dict

        card = read_card(file)
    if as_json:
        console.print_json(json.dumps(to_dict(card) | {"sha256": check_sums(file)}))
    else:
        print_card(card, file)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for programs.")] = False,
) -> None:
    """Print what a bug report needs: versions, devices, folders, models, the log. Names of patients are taken out."""
    from .doctor import as_json as to_json
    from .doctor import as_text, examine

    found = examine()
    print(to_json(found) if as_json else as_text(found), end="")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo-output"),
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Register two brains from installable packages and a phantom of an abdomen, and say how well it went."""
    with terminal_job() as job:
        check_choices(device=device, threads=threads)
        check_output_folder(output)

        from .demo import run_demo

        begin_to_compute(threads)
        results = run_demo(output, device, job)
    for folder, report, sentences in results:
        print_report(report)
        for sentence in sentences:
            console.print(sentence, soft_wrap=True)
        console.print(f"Report: {(folder / 'report.html').resolve()}", soft_wrap=True)


@contextmanager
def terminal_job() -> Iterator[Job]:
    """Show progress on the terminal, cancel on Ctrl-C, and print an error as one sentence with exit code 2."""
    cancelled = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: cancelled.set()) if main else None
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    code = 0
    try:
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("", total=1.0)

            def draw(event: Event) -> None:
                progress.update(task, description=event.message, completed=event.fraction)

            yield Job(draw if errors.is_terminal else LogLines(errors.print).tell, cancelled.is_set)
    except MorphSeekError as error:
        errors.print(str(error).encode(errors="backslashreplace").decode(), style="red")  # names need not be UTF-8
        code = 2
    except Cancelled:
        errors.print("Canceled.")
        code = 130
    except BrokenPipeError:
        code = 1
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if code:
        raise typer.Exit(code)


class LogLines:
    """Says how far a job is where no bar can be drawn, as in a log file: a line for each stage, for each validation of
    a training, and of what is counted meanwhile one line every few seconds.

    Args:
        write: takes each line.
        seconds: between lines of what is counted.
    """

    def __init__(self, write: Callable[[str], object], seconds: float = 10.0) -> None:
        self._write, self._seconds = write, seconds
        self._phase, self._message, self._written = "", "", 0.0

    def tell(self, event: Event) -> None:
        """Write an event, if it is due."""
        counted = event.steps > 0 and event.phase == self._phase
        validated = any(name.startswith("validation/") for name in event.metrics)
        if event.message == self._message or (
            counted and not validated and time.monotonic() < self._written + self._seconds
        ):
            return
        self._phase, self._message, self._written = event.phase, event.message, time.monotonic()
        figures = ", ".join(f"{k} {v:.4g}" for k, v in event.metrics.items()) if event.phase == "train" else ""
        self._write(f"{event.message}: {figures}" if figures else event.message)


def check_choices(
    *,
    model: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    iterations: int | None = None,
) -> None:
    """Refuse an impossible name or number before anything is imported or read for it; None was not given.

    Raises:
        MorphSeekError: which of them, and what there is.
    """
    if model is not None:
        check_model_choice(model)
    if device is not None:
        check_device(device)
    if threads is not None:
        check_threads(threads)
    if iterations is not None:
        check_iterations(iterations)


def check_training(
    dataset: Path,
    out: Path,
    config: str | None,
    init: str | None = None,
    *,
    device: str,
    threads: int | None,
    iterations: int | None,
) -> tuple[Path | None, Path | None]:
    """Refuse what a training could not begin with; return the files of its settings and of the model it starts from.

    Raises:
        MorphSeekError: a path, a name or a number that cannot be used.
    """
    check_choices(device=device, threads=threads, iterations=iterations)
    file = check_config(config)
    check_readable(dataset)
    start = None if init is None else check_model(init)
    check_output_file(out, ".safetensors", [dataset, file, start])
    return file, start


def check_config(config: str | None) -> Path | None:
    """Return the settings file that a name or a path stands for; None where none was given.

    Raises:
        MorphSeekError: there is none, or it cannot be read.
    """
    if config is None:
        return None
    file = find(config, "recipe")
    read_values(file)
    return file


def begin_to_compute(threads: int | None) -> None:
    """Set the number of threads, None for all, and look for garbage again, though not among what was imported."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    if threads is not None:
        from ..networks.devices import use_threads as use

        use(threads)


def chosen_settings(ctx: typer.Context, file: Path | None) -> RegistrationSettings:
    """Return the model and the options of a command; those that it does not name are the file's, if there is one.

    Raises:
        MorphSeekError: the file cannot be read, or there is no such option.
    """
    given = ctx.params
    values = {field.name: given[field.name] for field in dataclasses.fields(RegistrationOptions) if field.name in given}
    values["fit"] = fit_or_old(given["fit"], given["refine"], given["refine_fine"])
    values["fit_iterations"] = counts_of(given["fit_iterations"])
    if file is None:
        return RegistrationSettings("", given["model"], from_dict(RegistrationOptions, values, "the options"))
    saved = read_settings(file)
    named = named_options(ctx)
    if named & {"refine", "refine_fine"}:
        named.add("fit")
    changed = {name: value for name, value in values.items() if name in named}
    options = from_dict(RegistrationOptions, changed, "the options", saved.options)
    return RegistrationSettings(saved.name, given["model"] if "model" in named else saved.model, options)


def training_options(ctx: typer.Context) -> TrainingOptions:
    """Return the options of a new training; those that the command does not name are the file's, if there is one.

    Raises:
        MorphSeekError: the file cannot be read, or there is no such option.
    """
    given, file = ctx.params, ctx.params["options"]
    values: dict[str, Any] = {} if file is None else read_values(file)
    if not isinstance(values, dict):
        raise MorphSeekError(f"{file} must be a table of options, not {type(values).__name__}.")
    named = named_options(ctx)
    if "iterations" in values and "minutes" not in named:
        values = {"minutes": None, **values}
    chosen = {name: given[name] for name in ("init", "minutes", "device") if name in named or name not in values}
    paths = {"dataset": str(given["cases"]), "model": str(given["out"])}
    options = from_dict(TrainingOptions, {"name": given["out"].stem, **values, **chosen, **paths}, "the options")
    if given["final"]:
        options = dataclasses.replace(options, stages=tuple(dict.fromkeys([*options.stages, "final"])))
    return options


def named_options(ctx: typer.Context) -> set[str]:
    """Return the names of the parameters that were given on the command line."""
    return {name for name in ctx.params if (source := ctx.get_parameter_source(name)) and source.name != "DEFAULT"}


def check_resumed(ctx: typer.Context, folder: Path) -> None:
    """Refuse to resume what is no training, or with choices that were made when it began.

    Raises:
        MorphSeekError: with what to do.
    """
    check_run(folder)
    fixed = sorted(named_options(ctx) & {"init", "minutes", "final", "options", "device"})
    if fixed:
        raise MorphSeekError(
            f"{folder} is a training that has begun, and --{fixed[0]} cannot be changed any more; leave it out, or "
            "begin another training with --out."
        )


def check_files(inputs: Iterable[Path | None], options_file: Path | None, save_options: Path | None) -> None:
    """Refuse a file that cannot be read, or one for settings that could not be written, before the work.

    Raises:
        MorphSeekError: which of them.
    """
    given = [path for path in inputs if path is not None]
    for path in given:
        check_readable(path)
    if save_options is not None:
        check_settings_name(save_options)
        check_output_file(save_options, inputs=[*given, options_file])


def save_settings(settings: RegistrationSettings, file: Path | None) -> None:
    """Write settings into a file, if there is one."""
    if file is not None:
        from ..io.files import write_atomically

        write_atomically(file, settings_text(settings, file).encode("utf-8"))


def counts_of(text: str | None) -> list[int] | None:
    """Return the numbers of a text such as 60/60/30.

    Raises:
        MorphSeekError: it is not made of whole numbers.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split("/")]
    except ValueError as error:
        raise MorphSeekError(
            f"--fit-iterations is '{text}'; give whole numbers, coarse to fine, such as 60/60/30."
        ) from error


def fit_or_old(fit: str, refine: int, refine_fine: int) -> str:
    """Return whether to fit; the options of before ask for it with a note."""
    if not refine and not refine_fine:
        return fit
    errors.print(
        "--refine and --refine-fine are --fit on now, and go with the next release; their numbers were of another fit "
        "and are not used (--fit-iterations sets those of today's).",
        style="yellow",
        markup=False,
        soft_wrap=True,
    )
    return "on"


def tell(words: str) -> None:
    """Print a line about the work, on the error stream, where progress is shown too."""
    errors.print(words, markup=False, soft_wrap=True)


def print_written(out: Path) -> None:
    """Say where the model of a training is, and how to look at its curves."""
    console.print(f"Wrote {out}; curves: tensorboard --logdir {out}.log", soft_wrap=True)


def print_trained(model: Path, folder: Path) -> None:
    """Print the figures of a finished training before and after as a table, and where its files are."""
    held_out: HeldOut = read_json(folder / STATUS).get("held_out", {})
    if held_out:
        start, mean = held_out.get("start", {}), held_out["mean"]
        table = Table("figure", "before", "after", title=f"{held_out['pairs']} held-out pairs")
        for name, value in mean.items():
            table.add_row(name, *("none" if v is None else f"{v:.4f}" for v in (start.get(name), value)))
        console.print(table)
    console.print(f"Wrote {model}; its training, with curves and figures, is in {folder}", soft_wrap=True)


def print_report(report: Report) -> None:
    """Print the figures of one registration as a table."""
    table = Table("figure", "value", title="Registration", show_header=False)
    if (dice := report["dice"]) is not None:
        mean = dice["mean"]
        table.add_row("Dice, as given / aligned / registered", " / ".join(f"{mean[k]:.3f}" for k in mean))
    landmarks = report.get("landmarks")
    if landmarks is not None:
        mean = landmarks["mean"]
        values = " / ".join(f"{mean[stage]:.2f}" for stage in ("input", "aligned", "warped"))
        table.add_row("Landmark error, as given / aligned / registered", f"{values} mm")
    similarity = report["similarity"]
    table.add_row("Similarity, aligned / registered", f"{similarity['aligned']:.3f} / {similarity['warped']:.3f}")
    folding = report["folding"]
    cells = folding["cells"]
    table.add_row("Folded cells", f"{cells['folded_percent']:.4f} % ({cells['folded']:,} of {cells['cells']:,})")
    if cells["no_fold_proven"]:
        table.add_row("No fold", f"proven (determinant above {cells['smallest_proven']:.2g} in every cell)")
    else:
        beyond = cells["folded_outside"] + cells["undecided_outside"]
        table.add_row("Undecided cells / not proven beyond the image", f"{cells['undecided']:,} / {beyond:,}")
    table.add_row("NJD, by central differences", f"{folding['njd_percent']:.4f} %")
    table.add_row("SDlogJ", f"{folding['sdlogj']:.3f}")
    inside = folding["inside"]
    folded = f"{inside['folded_voxels']:,} of {inside['voxels']:,}"
    values = f"{folded} / {inside['njd_percent']:.4f} % / {inside['sdlogj']:.3f}"
    table.add_row(f"Inside the {inside['of']}: folded voxels / NJD / SDlogJ", values)
    if any(report["masks"].values()):
        left = ("all" if n is None else f"{n:,}" for n in (report["masks"]["fixed"], report["masks"]["moving"]))
        table.add_row("Voxels that masks leave, fixed / moving", " / ".join(left))
    if any(report["beside_body"].values()):
        left = ("nothing" if ml is None else f"{ml:,.0f} ml" for ml in report["beside_body"].values())
        table.add_row("Beside the body and not compared, fixed / moving", " / ".join(left))
    motion = report["displacement_mm"]
    table.add_row("Displacement, mean / 95 % / largest", " / ".join(f"{motion[k]:.1f}" for k in motion) + " mm")
    if (inverse := report["inverse"]) is not None and (residual := inverse["residual_mm"]) is not None:
        table.add_row("Inverse, residual mean / 95 %", f"{residual['mean']:.3f} / {residual['p95']:.3f} mm")
    if (trust := report.get("trust")) is not None:
        for name, value in trust_rows(trust):
            table.add_row(name, value)
    table.add_row("Seconds", f"{report['seconds']['total']:.1f} on {report['device']}")
    console.print(table)
    if landmarks is not None:
        print_landmarks(landmarks)
    if (corrections := report.get("corrections")) is not None:
        print_corrections(corrections)
    for warning in report["warnings"]:
        errors.print(warning["message"], style="yellow")


def trust_rows(trust: TrustSection) -> list[tuple[str, str]]:
    """Return what is said of the estimated error, name and value."""
    near, error = trust["near_mm"], trust["error_mm"]
    if near is None or error is None:
        return [("Estimated error", "colors only: the estimate was not tuned on such images")]
    return [
        ("Estimated error: half of places / four of five", f"below {error['median']:.1f} / {error['p80']:.1f} mm"),
        (f"Tissue that is likely within {near:.3g} mm", f"{trust['near_percent']:.0f} %"),
        (f"Tissue not to be relied on, over {trust['far_mm']:.3g} mm", f"{trust['far_percent']:.0f} %"),
    ]


def print_landmarks(landmarks: LandmarksSection) -> None:
    """Print the error of each pair of landmarks as a table."""
    table = Table("landmark", "as given", "aligned", "registered", title="Landmarks: error, mm")
    for point in landmarks["points"]:
        values = (point["input"], point["aligned"], point["warped"])
        table.add_row(point["label"], *(f"{value:.2f}" for value in values))
    console.print(table)


def print_corrections(corrections: CorrectedSection) -> None:
    """Print how far each point of a correction was and is from where it should lie as a table."""
    table = Table("point", "before", "after", "stated error", title="Corrected: distance, mm")
    for point in corrections["points"]:
        table.add_row(point["label"], *(f"{point[k]:.2f}" for k in ("before", "after", "error_mm")))  # type: ignore[literal-required]
    console.print(table)


def print_card(card: Card, file: Path) -> None:
    """Print a model's card as a table, with its file and checksums."""
    preprocessing, trained, counts = card.preprocessing, card.provenance, card.parameters
    data: object = trained.get("data")
    data = data if isinstance(data, dict) else {"name": data}
    told = [data.get("name"), data.get("description"), f"{trained['cases']} cases" if "cases" in trained else None]
    told += ["images synthesized from labels" if trained.get("synthetic") else None, trained.get("stage")]
    sizes = f", {counts['backbone']:,} weights" if "backbone" in counts else ""
    share = f", {counts['policy_head']:,} weights" if "policy_head" in counts else ""
    found = f"{counts['finder']:,} weights; {card.share:.0%} of the answer" if "finder" in counts else ""
    spacing = "the fixed image's voxels" if preprocessing.spacing is None else f"{_by(preprocessing.spacing)} mm"
    least = "" if preprocessing.shape is None else f", at least {_by(preprocessing.shape)} voxels"
    intensities = {
        "percentile": f"percentiles {preprocessing.low:g} to {preprocessing.high:g} become 0 to 1",
        "window": f"{preprocessing.low:g} to {preprocessing.high:g} become 0 to 1",
        "none": "as given",
    }
    rows = [
        ("Title", card.title or "none"),
        ("Trained on", ", ".join(str(text) for text in told if text) or "not stated"),
        ("Backbone", f"{card.model.backbone}{sizes}; its output is read as a {card.model.output}"),
        ("Policy head", f"mean {card.model.policy.mean}{share}"),
        *([("Finds labels", found)] if found else []),
        ("Working grid", f"{preprocessing.orientation}, {spacing}{least}"),
        ("Intensities", intensities[preprocessing.intensity]),
        ("Alignment", "as without a model" if card.model.backbone == "segmenter" else preprocessing.align),
        ("Steps", str(preprocessing.steps)),
        *(("Measured", text) for text in _figures(card.results)),
        ("License", card.license or "not stated"),
    ]
    table = Table(show_header=False, title="Model")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    # whole lines, to be copied
    console.print(f"File: {file}", soft_wrap=True)
    for what, value in check_sums(file).items():
        console.print(f"SHA-256 of the {what}: {value}", soft_wrap=True)


def check_sums(file: Path) -> dict[str, str]:
    """Return the checksums of a model file, by what they are of."""
    from ..networks.model_file import sha256, weights_sha256

    return {"file": sha256(file), "weights": weights_sha256(file)}


_FIGURE_NAMES = {
    "dice_before": "Dice before {:.3f}",
    "dice_aligned": "aligned {:.3f}",
    "dice": "registered {:.3f}",
    "hd95": "HD95 {:.2f} mm",
    "njd_percent": "NJD {:.3f} %",
    "sdlogj": "SDlogJ {:.3f}",
    "tre_mm": "landmarks {:.2f} mm",
}


def _figures(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each data set whose means a card holds."""
    lines = []
    for name, value in results.items():
        means = value.get("mean", value) if isinstance(value, dict) else {}
        found = [words.format(means[key]) for key, words in _FIGURE_NAMES.items() if isinstance(means.get(key), float)]
        if found:
            pairs = f" ({value['pairs']} pairs)" if "pairs" in value else ""
            lines.append(f"{value.get('dataset', name)}{pairs}: {', '.join(found)}")
    return lines


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _alone() -> threading.Event:
    """Return an event that is set when standard input is closed, as it is when the one who started this ends."""
    alone = threading.Event()
    threading.Thread(target=_await_end, args=(sys.stdin.fileno(), alone), daemon=True).start()
    return alone


def _await_end(source: int, ended: threading.Event) -> None:
    """Set an event when a file descriptor reaches its end. It is not read through sys.stdin: a thread that waits in it
    cannot be left behind at the process's end."""
    while os.read(source, 4096):
        pass
    ended.set()


def print_check(report: CheckReport) -> None:
    """Print the findings about a data set as a table and sentences."""
    table = Table("case", "voxels", "mm", "labels", "remarks", title="Cases")
    for case in report.cases:
        remarks = [Text(text, "red") for text in case.problems] + [Text(text) for text in case.warnings]
        numbers = (_by(values) for values in (case.shape, case.spacing))
        table.add_row(case.name, *numbers, str(len(case.labels)), Text("\n").join(remarks))
    console.print(table)
    for text in report.warnings:
        console.print(text, soft_wrap=True)
    for text in report.problems:
        errors.print(text, style="red")
    if not report.problems:
        left_out = f"; {len(report.unusable)} are left out" if report.unusable else ""
        bare = f"{report.unlabeled} without labels besides, " if report.unlabeled else ""
        console.print(
            f"{report.training} cases to train on, {bare}{report.validation_pairs} pairs to validate on, "
            f"{report.test_pairs} held-out pairs for the figures before and after; labels in common: "
            f"{len(report.common)}{left_out}.",
            soft_wrap=True,
        )


def main() -> None:
    """Run ``morphseek`` or ``python -m MorphSeekLib.app.cli``."""
    wait_passively()
    gc.disable()  # looking for garbage takes a third of the time of importing torch
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not fit the terminal's locale
    try:
        app()
    finally:
        gc.freeze()  # what is left goes with the process


if __name__ == "__main__":
    main()
