"""A batch of pairs: its rows, its folder, its workers."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from MorphSeekLib.app.batch import BatchOptions, batch
from MorphSeekLib.app.batch_status import told
from MorphSeekLib.app.cli import app
from MorphSeekLib.data.bids import NAMES, bids_rows
from MorphSeekLib.protocol.batch import (
    BatchSettings,
    BatchStatus,
    Outcome,
    globbed,
    plan,
    read_outcomes,
    read_table,
)
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Event, Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.run_folder import read_json
from MorphSeekLib.report.cohort import write_cohort
from MorphSeekLib.report.results import FILES, read_results

ROOT = Path(__file__).resolve().parents[2]
QUICK = BatchSettings("none", RegistrationOptions(align="none", search="off", fit="off", inverse=False))
FEW = ("--model", "none", "--preset", "fast", "--align", "none", "--search", "off")


def ball(path: Path, shift: int = 0) -> Path:
    """Write an image of a ball."""
    path.parent.mkdir(parents=True, exist_ok=True)
    z, y, x = np.mgrid[:20, :20, :20] - 10.0
    image = sitk.GetImageFromArray((100 * np.exp(-((x - shift) ** 2 + y**2 + z**2) / 20)).astype(np.float32))
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, str]]:
    """Three pairs of one template."""
    fixed = ball(tmp_path / "in" / "template.nii.gz")
    return [
        {"name": f"p{i}", "fixed": str(fixed), "moving": str(ball(tmp_path / "in" / f"m{i}.nii.gz", i))}
        for i in range(3)
    ]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "MorphSeekLib.app.cli", "batch", *arguments]


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_is_read_relative_to_its_folder(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("fixed\tmoving\tpreset\na.nii\tb.nii\tfast\n")
    row = read_table(path)[0]
    assert row["fixed"] == str(tmp_path / "a.nii")
    assert plan([row], QUICK)[0].settings.options.preset == "fast"


def test_a_table_without_moving_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("fixed,other\na,b\n")
    with pytest.raises(MorphSeekError, match="no column 'moving'"):
        read_table(path)


def test_a_pattern_names_pairs_by_where_they_differ(tmp_path):
    fixed = ball(tmp_path / "template.nii.gz")
    for name in ("anna", "ben"):
        ball(tmp_path / "scans" / name / "T1.nii.gz")
    rows = globbed(fixed, str(tmp_path / "scans" / "*" / "T1.nii.gz"))
    assert [row["name"] for row in rows] == ["anna", "ben"]


def test_bids_pairs_later_sessions_with_the_first(tmp_path):
    for sub, ses in (("01", "a"), ("01", "b"), ("02", "a")):
        ball(tmp_path / f"sub-{sub}" / f"ses-{ses}" / "anat" / f"sub-{sub}_ses-{ses}_T1w.nii.gz")
    rows = bids_rows(tmp_path, "T1w")
    assert [row["name"] for row in rows] == ["sub-01_ses-b_T1w"]
    assert Path(rows[0]["fixed"]).name == "sub-01_ses-a_T1w.nii.gz"
    with pytest.raises(MorphSeekError, match="second session"):
        bids_rows(tmp_path, "T1w", subjects=["02"])


def test_results_are_named_as_bids_derivatives(tmp_path):
    for ses in ("a", "b"):
        ball(tmp_path / "in" / "sub-01" / f"ses-{ses}" / "anat" / f"sub-01_ses-{ses}_acq-x_T1w.nii.gz", ses == "b")
    out, root = tmp_path / "out", tmp_path / "in"
    for _ in range(2):  # the second time nothing is left to do
        batch(bids_rows(root, "T1w"), BatchOptions(out, QUICK, threads=1, bids=root))
    place = out / "derivatives" / "sub-01" / "ses-b" / "anat"
    stem = "sub-01_ses-b_acq-x"
    assert {path.name for path in place.iterdir()} == {
        *(f"{stem}_space-sesa_desc-warped_T1w{ending}" for ending in (".nii.gz", ".json")),
        *(f"{stem}_space-sesa_desc-report_T1w{ending}" for ending in (".html", ".json")),
        f"{stem}_space-sesa_desc-jacobian_T1w.nii.gz",
        f"{stem}_space-sesa_desc-folding_mask.nii.gz",
        f"{stem}_from-sesa_to-T1w_mode-points_xfm.h5",
    }
    assert (place / f"{stem}_space-sesa_desc-warped_T1w.nii.gz").samefile(out / f"{stem}_T1w" / "warped.nii.gz")
    about = json.loads((out / "derivatives" / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative"
    from ancpbids import BIDSLayout

    found = BIDSLayout(str(out / "derivatives")).get(desc="warped", extension=".nii.gz", return_type="filename")
    assert [Path(path).parent for path in found] == [place]


def test_every_file_of_a_result_has_a_name_as_a_derivative():
    assert set(NAMES) == set(FILES)
    assert len(set(NAMES.values())) == len(FILES)


def test_a_template_gets_the_mean_and_the_spread_of_log_jacobians(pairs, tmp_path):
    """Against numpy, with a pair that the initial transform makes twice as large, which the deformable part is not."""
    twice = sitk.AffineTransform(3)
    twice.Scale(2.0)
    sitk.WriteTransform(twice, str(tmp_path / "twice.tfm"))
    pairs[2]["initial_transform"] = str(tmp_path / "twice.tfm")
    fitted = BatchSettings(
        "none", RegistrationOptions(align="none", search="off", preset="fast", fit_iterations=(4, 4))
    )
    out = tmp_path / "out"
    assert all(one.state == "done" for one in batch(pairs, BatchOptions(out, fitted, threads=1)))

    def values(path: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(float)

    log = np.log([values(out / f"p{n}" / "jacobian.nii.gz") for n in range(3)])
    assert values(out / "template" / "mean.nii.gz") == pytest.approx(
        np.mean([values(out / f"p{n}" / "warped.nii.gz") for n in range(3)], axis=0), abs=1e-3
    )
    for part, expected in (("whole-", log), ("", log - np.log([1, 1, 8])[:, None, None, None])):
        found = [values(out / "template" / f"log-jacobian-{part}{name}.nii.gz") for name in ("mean", "std")]
        assert found[0] == pytest.approx(expected.mean(axis=0), abs=1e-5)
        assert found[1] == pytest.approx(expected.std(axis=0, ddof=1), abs=1e-5)
    assert not values(out / "template" / "folded.nii.gz").any()
    written = (out / "template" / "mean.nii.gz").stat().st_mtime_ns
    batch(pairs, BatchOptions(out, fitted))
    assert (out / "template" / "mean.nii.gz").stat().st_mtime_ns == written


def test_all_problems_are_found_at_once(tmp_path):
    rows = [
        {"name": "a", "fixed": str(tmp_path / "no.nii"), "moving": str(tmp_path / "nor.nii"), "preset": "slow"},
        {"name": "A", "moving": "x.nii", "oops": "1"},
    ]
    first, second = plan(rows, QUICK)
    assert len(first.problems) == 4
    assert len(second.problems) == 4


def test_bad_rows_fail_and_the_rest_runs(pairs, tmp_path):
    bad = Path(pairs[2]["moving"])
    bad.write_bytes(b"no image")
    rows = [
        *pairs,
        {"name": "missing", "fixed": pairs[0]["fixed"], "moving": "nowhere.nii"},
        {**pairs[0], "name": "waiting", "trust": "later"},
    ]
    options = BatchOptions(tmp_path / "out", QUICK, workers=2, threads=1)
    found = {outcome.name: outcome for outcome in batch(rows, options)}
    assert {name for name, one in found.items() if one.state == "failed"} == {"p2", "missing", "waiting"}
    assert "choose on or off" in found["waiting"].problem
    assert "does not exist" in found["missing"].problem
    with (tmp_path / "out" / "cohort.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)][:4] == ["failed"] * 3 + ["done"]
    page = (tmp_path / "out" / "cohort.html").read_text()
    assert "data:image/jpeg" in page
    assert "http" not in page
    ball(bad)
    again = batch(rows, BatchOptions(tmp_path / "out", QUICK, retry=True, threads=1))
    assert [one.name for one in again if one.state == "failed"] == ["missing", "waiting"]


def test_a_disk_that_is_too_small_is_said_before_the_first_pair(pairs, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))(10**12, 10**12 - 10**7, 10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MorphSeekError, match=r"3 pairs need about 0\.0 GB.*0\.0 GB left.*--keep"):
        batch(pairs, BatchOptions(tmp_path / "out", QUICK))
    few = BatchSettings("none", QUICK.options, keep=("warped",))
    assert len(batch(pairs[:1], BatchOptions(tmp_path / "few", few, threads=1))) == 1


def test_the_worst_come_first_and_outliers_are_marked(tmp_path):
    """Where all others are equal, one that folds is an outlier; one that only took long is not put first."""
    plain = {"color": "green", "dice": 0.8, "folded_percent": 0.0, "seconds": 1.0, "verdict": ""}
    figures = {f"p{n}": plain | {"dice": 0.8 + 0.001 * n} for n in range(6)}
    figures["p3"] |= {"seconds": 99.0}
    figures["p4"] |= {"folded_percent": 0.01}
    write_cohort(tmp_path, [Outcome(name, "done", "", "", each) for name, each in figures.items()])
    with (tmp_path / "cohort.csv").open() as file:
        found = {row["name"]: row["outlier"] for row in csv.DictReader(file)}
    assert found == {"p4": "folded_percent", "p0": "", "p1": "", "p2": "", "p3": "seconds", "p5": ""}
    assert next(iter(found)) == "p4"


def test_strict_refuses_bad_rows(pairs, tmp_path):
    rows = [*pairs, {"name": "missing", "fixed": "nowhere.nii", "moving": "nowhere.nii"}]
    with pytest.raises(MorphSeekError, match="1 of 4 rows"):
        batch(rows, BatchOptions(tmp_path / "out", QUICK, strict=True))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_is_refused_and_keep_counts(pairs, tmp_path):
    kept = BatchSettings("none", QUICK.options, keep=("warped",))
    batch(pairs[:1], BatchOptions(tmp_path / "out", kept, threads=1))
    assert {p.name for p in (tmp_path / "out" / "p0").iterdir()} == {"warped.nii.gz", "report.json", "thumbnail.jpg"}
    with pytest.raises(MorphSeekError, match=r"other settings \(keep\)"):
        batch(pairs[:1], BatchOptions(tmp_path / "out", QUICK))


def until_a_pair_is_done(process: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + 300
    while not read_outcomes(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_batch_goes_on_and_leaves_no_worker(pairs, tmp_path):
    file, out = table(tmp_path / "pairs.csv", pairs), tmp_path / "out"
    arguments = command(str(file), "-o", str(out), *FEW, "--threads", "1")
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE)
    until_a_pair_is_done(process, out)
    process.kill()
    process.communicate(timeout=120)  # ends when no worker holds the error stream anymore
    first = read_outcomes(out)
    if len(first) == len(pairs):
        pytest.skip("this machine was too busy to kill the batch before it was done")
    before = {name: (out / name / "report.json").stat().st_mtime_ns for name in first}
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {one.state for one in read_outcomes(out).values()} == {"done"}
    assert {name: (out / name / "report.json").stat().st_mtime_ns for name in first} == before
    assert not list(out.rglob(".morphseek-*"))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_a_batch_and_says_how_to_go_on(pairs, tmp_path):
    file, out = table(tmp_path / "pairs.csv", pairs), tmp_path / "out"
    process = subprocess.Popen(
        command(str(file), "-o", str(out), *FEW), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (out / "batch.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130, said
    assert "run the same command again" in said
    assert "Traceback" not in said


def test_some_failed_is_exit_code_3(pairs, tmp_path):
    file = table(tmp_path / "pairs.csv", [{"name": "p1", "fixed": pairs[0]["fixed"], "moving": "nowhere.nii"}])
    ended = CliRunner().invoke(app, ["batch", str(file), "-o", str(tmp_path / "out"), *FEW])
    assert ended.exit_code == 3, ended.output
    assert ended.stdout.rstrip().splitlines()[-1].endswith("p1")


def test_dask_workers_finish_all_pairs_though_one_dies(pairs, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'morphseek[cluster]'")
    import dask

    rows = [*pairs, {**pairs[0], "name": "again"}]
    killed = []
    patient = {"distributed.comm.timeouts.connect": "120s", "distributed.comm.timeouts.tcp": "300s"}
    with (
        dask.config.set(patient),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))

        def kill(event: Event) -> None:
            if event.step == 1 and not killed:
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

        found = batch(rows, BatchOptions(tmp_path / "out", QUICK), client, Job(kill))
    assert killed
    assert [one.state for one in found] == ["done"] * len(rows)


def test_a_folder_says_how_far_its_batch_is_and_how_it_ended(tmp_path):
    with told(tmp_path, Job(), None) as job:
        job.report("step", 0.0, "4 pairs to register", 0, 4)
        job.report("step", 0.5, "2 of 4 pairs", 2, 4)
        running = BatchStatus(**read_json(tmp_path / "status.json"))
        assert (running.state, running.done, running.count) == ("running", 2, 4)
        begun = running.begun
        halfway = dataclasses.replace(running, written=begun + 10)
        assert halfway.seconds_left(begun + 13) == pytest.approx(7)
    assert read_json(tmp_path / "status.json")["state"] == "done"
    with pytest.raises(MorphSeekError), told(tmp_path, Job(), None):
        raise MorphSeekError("The disk is full.")
    assert read_json(tmp_path / "status.json")["message"] == "The disk is full."


def test_a_batch_is_stopped_by_its_folder_or_with_its_starter(tmp_path):
    (tmp_path / "stop").touch()
    with told(tmp_path, Job(), None) as job:
        job.check()  # what is left from before counts for nothing
        (tmp_path / "stop").touch()
        with pytest.raises(Cancelled):
            job.check()
    (tmp_path / "stop").unlink()
    alone = threading.Event()
    alone.set()
    with told(tmp_path, Job(), alone) as job:
        (tmp_path / "keep").touch()
        job.check()
        (tmp_path / "keep").unlink()
        with pytest.raises(Cancelled):
            job.check()
    with pytest.raises(Cancelled), told(tmp_path, Job(), alone):
        raise Cancelled
    assert read_json(tmp_path / "status.json")["state"] == "stopped"


def test_a_comma_in_the_name_of_an_image_is_no_list(tmp_path):
    path = table(tmp_path / "pairs.csv", [{"fixed": "a,b.nii", "moving": "c.nii", "initial_transform": "d.h5,e.h5"}])
    row = read_table(path)[0]
    assert row["fixed"] == str(tmp_path / "a,b.nii")
    assert row["initial_transform"] == f"{tmp_path / 'd.h5'},{tmp_path / 'e.h5'}"


def test_results_that_were_not_kept_are_named(tmp_path):
    with pytest.raises(MorphSeekError, match="holds no registration"):
        read_results(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(MorphSeekError, match=r"has no warped.nii.gz; keep warped"):
        read_results(tmp_path)
