"""Files that appear whole or not at all, leftovers of killed processes, inputs as outputs, names that are bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from MorphSeekLib.io import images, transforms
from MorphSeekLib.io.files import library_name, output_folder, python_name, shown, whole_file, write_atomically
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.startup import refuse_overwriting

WRITERS = {
    "folder": "with files.output_folder(path) as part:\n    (part / 'a.txt').write_text('half')\n    wait()",
    "file": "with files.whole_file(path / 'a.nii.gz') as part:\n    part.write_text('half')\n    wait()",
    "bytes": "files.os.fsync = lambda number: wait()\nfiles.write_atomically(path / 'a.json', b'half')",
}


def start(kind: str, folder: Path) -> subprocess.Popen:
    """A process that is in the middle of writing into a folder."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom MorphSeekLib.io import files\npath = Path(sys.argv[1])\n"
        f"def wait():\n    print('writing', flush=True)\n    time.sleep(600)\n{WRITERS[kind]}"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_what_a_killed_process_was_writing_is_removed_by_the_next_start(tmp_path, kind):
    end(start(kind, tmp_path))
    assert [name for name in os.listdir(tmp_path) if name.startswith(".morphseek-")]
    with output_folder(tmp_path) as part:
        assert set(os.listdir(tmp_path)) == {part.name, f"{part.name}.lock"}
        (part / "b.txt").touch()
    assert os.listdir(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_what_a_living_process_writes_is_left_alone(tmp_path, kind):
    """Two runs into one folder at once."""
    process = start(kind, tmp_path)
    try:
        before = set(os.listdir(tmp_path))
        assert any(not name.endswith(".lock") for name in before)
        with output_folder(tmp_path) as part:
            (part / "b.txt").touch()
        write_atomically(tmp_path / "c.txt", b"")
        assert set(os.listdir(tmp_path)) == before | {"b.txt", "c.txt"}
    finally:
        end(process)


def test_what_only_has_the_name_of_a_leftover_is_kept(tmp_path):
    (tmp_path / ".morphseek-mine").mkdir()
    (tmp_path / ".morphseek-mine" / "a.txt").touch()
    with output_folder(tmp_path) as part:
        (part / "b.txt").touch()
    assert sorted(os.listdir(tmp_path)) == [".morphseek-mine", "b.txt"]


def test_the_file_that_stands_for_the_others_comes_last(tmp_path, monkeypatch):
    """Killed between two moves, a folder has no report that lists files which are not of it."""
    for content in ("old", "new"):
        moves = []
        monkeypatch.setattr(
            "MorphSeekLib.io.files.os.replace",
            lambda source, target, moves=moves: moves.append((target.name, (tmp_path / "r.json").exists())),
        )
        with output_folder(tmp_path, seal="r.json") as part:
            for name in ("a.txt", "r.json", "z.txt"):
                (part / name).write_text(content)
        assert moves == [("a.txt", False), ("z.txt", False), ("r.json", False)]
        monkeypatch.undo()
        (tmp_path / "r.json").write_text("there")


def test_an_input_is_never_an_output(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "a.nii.gz")
    refuse_overwriting([tmp_path / "b.nii.gz"], [tmp_path / "a.nii.gz", None, tmp_path / "none"])
    for output in (tmp_path / "a.nii.gz", tmp_path / "x" / ".." / "a.nii.gz", tmp_path / "link.nii.gz"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(MorphSeekError, match=r"a\.nii\.gz is an input and would be overwritten"):
            refuse_overwriting([output], [None, tmp_path / "a.nii.gz"])


def bad_name(folder: Path, ending: str) -> Path:
    """A path that is not UTF-8."""
    return folder / os.fsdecode(b"n\xff" + ending.encode())


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="needs file names that are bytes")
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".dcm", ".tfm", ".h5", ""])
def test_a_name_that_is_not_utf8_is_refused_in_a_sentence(tmp_path, ending):
    """SimpleITK would end the process."""
    path = bad_name(tmp_path, ending)
    if ending:
        path.write_bytes(b"x" * 400)
    else:
        path.mkdir()
    grid = images.Grid((4, 4, 4), np.eye(4))
    reads = [images.read_image, images.read_labels, lambda path: transforms.read_transform(path, grid)]
    for read in reads:
        with pytest.raises(MorphSeekError, match=r"n\\xff.* is not valid UTF-8.* rename") as caught:
            read(path)
        str(caught.value).encode("utf-8")


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="needs file names that are bytes")
def test_nothing_is_written_to_a_name_that_is_not_utf8(tmp_path):
    image = images.Volume(images.torch.rand(4, 4, 4), images.Grid((4, 4, 4), np.eye(4)))
    with pytest.raises(MorphSeekError, match="is not valid UTF-8"):
        images.write_image(image, bad_name(tmp_path, ".nii"))
    with pytest.raises(MorphSeekError, match="is not valid UTF-8"), output_folder(bad_name(tmp_path, "")):
        pass
    assert os.listdir(tmp_path) == []


def test_a_name_in_utf8_is_opened_in_the_c_locale(tmp_path):
    """Where Python takes the two bytes of an e with an accent for two strange ones."""
    folder = tmp_path / "caf\u00e9"
    folder.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(60).reshape(3, 4, 5)), str(folder / "\u00e9.nii"))
    program = (
        "import os, sys\nfrom MorphSeekLib.io import images\npath = sys.argv[1]\n"
        "image = images.read_image(path)\nimages.write_image(image, path[:-4] + '2.nii.gz')\n"
        "print(image.grid.shape)"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, os.fsencode(folder / "\u00e9.nii")]
    found = subprocess.run(command, env=environment, capture_output=True)
    assert found.stdout.strip() == b"(5, 4, 3)", found.stderr
    assert sorted(os.listdir(folder)) == ["\u00e9.nii", "\u00e92.nii.gz"]


def test_names_go_to_the_library_and_back():
    for raw in (b"/a/b.nii", "/\u00e9/\u4e2d.nii".encode()):
        assert python_name(library_name(os.fsdecode(raw))) == os.fsdecode(raw)
    assert shown("/a/\u00e9.nii") == "/a/\u00e9.nii"


def test_nothing_is_left_of_a_failed_write(tmp_path):
    target = tmp_path / "x.nii"
    target.write_text("before")

    def fail() -> None:
        with whole_file(target) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["x.nii"]


def test_output_folder_is_all_or_nothing(tmp_path):
    folder = tmp_path / "deep" / "out"

    def fail() -> None:
        with output_folder(folder) as part:
            (part / "a.txt").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == []
    with output_folder(folder, owns=["a.txt", "b.txt"]) as part:
        (part / "a.txt").write_text("1")
        (part / "b.txt").write_text("1")
        assert not (folder / "a.txt").exists()
    (folder / "mine.txt").write_text("kept")
    with output_folder(folder, owns=["a.txt", "b.txt"]) as part:
        (part / "a.txt").write_text("2")
    # b.txt belonged to the earlier run, whose result is gone
    assert sorted(os.listdir(folder)) == ["a.txt", "mine.txt"]
    assert (folder / "a.txt").read_text() == "2"
    with pytest.raises(KeyError):
        fail()
    assert sorted(os.listdir(folder)) == ["a.txt", "mine.txt"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/morphseek")):
        with (
            pytest.raises(MorphSeekError, match=r"cannot be written \(.*\); choose a folder"),
            output_folder(path),
        ):
            pass
