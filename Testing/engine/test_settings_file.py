"""The settings of a registration in a file: saved, read, named, refused."""

from __future__ import annotations

import json

import pytest
from test_cli import files, registering, run  # noqa: F401 - a fixture

from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings_file import RegistrationSettings, read_settings, settings_text

OPTIONS = RegistrationOptions(steps=3, align="rigid", preset="fast", search="off", fit_iterations=(4, 0, 2))


@pytest.mark.parametrize("ending", ["toml", "json"])
@pytest.mark.parametrize("options", [OPTIONS, RegistrationOptions()])
def test_what_is_saved_is_read_again(tmp_path, ending, options):
    path = tmp_path / f"a.{ending}"
    settings = RegistrationSettings('knees, "fast" \u2713', "none", options)
    path.write_text(settings_text(settings, path), encoding="utf-8")
    assert read_settings(path) == settings


def test_what_a_file_leaves_out_is_as_by_default(tmp_path):
    (tmp_path / "few.toml").write_text('align = "center"\n')
    assert read_settings(tmp_path / "few.toml") == RegistrationSettings(
        "few", "auto", RegistrationOptions(align="center")
    )


def test_a_model_beside_the_file_goes_along_with_it(tmp_path):
    for folder in ("mine", "colleague"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.safetensors").write_bytes(b"")
    settings = RegistrationSettings("", str(tmp_path / "mine" / "m.safetensors"))
    text = settings_text(settings, tmp_path / "mine" / "s.toml")
    (tmp_path / "colleague" / "s.toml").write_text(text)
    assert read_settings(tmp_path / "colleague" / "s.toml").model == str(tmp_path / "colleague" / "m.safetensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("algin = 'rigid'", "has no setting 'algin'; known settings: name, model, align, fit"),
        ("align = 'rigit'", "There is no alignment 'rigit'"),
        ("steps = '3'", "steps must be of type int"),
        ("fit = 'yes'", "choose one of auto, on, off"),
        ("align =", "is not valid TOML"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(MorphSeekError, match=words):
        read_settings(tmp_path / "s.toml")


def test_a_command_takes_a_file_and_what_it_names_counts_more(files, tmp_path):  # noqa: F811
    (tmp_path / "in.toml").write_text(
        'name = "thorough"\nmodel = "none"\nalign = "rigid"\nsearch = "off"\nfit = "off"\ninverse = false\n'
    )
    command = registering(files, tmp_path / "out", options=tmp_path / "in.toml", save_options=tmp_path / "out.json")
    at = command.index("--model")
    run(*command[:at], *command[at + 2 :], "--align", "center")
    saved = json.loads((tmp_path / "out.json").read_text())
    assert (saved["name"], saved["model"], saved["align"], saved["fit"]) == ("thorough", "none", "center", "off")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["align"], report["model"], report["fit"], report["inverse"]) == ("center", None, None, None)


def test_files_that_cannot_be_used_are_refused_before_the_work(files, tmp_path):  # noqa: F811
    wrong = run(*registering(files, tmp_path / "out", save_options=tmp_path / "s.txt"), code=2)
    assert "end its name with .toml or .json" in " ".join(wrong.split())
    none = run(*registering(files, tmp_path / "out", options=tmp_path / "none.toml"), code=2)
    assert "cannot be read" in " ".join(none.split())
    assert list(tmp_path.iterdir()) == []
