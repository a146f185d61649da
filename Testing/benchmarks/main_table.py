"""Train and measure what a paper's table compares; hours to days.

    python Testing/benchmarks/main_table.py BENCHMARK --data FOLDER --out FOLDER [--only TASK/METHOD/ARM]
        [--config FILE] [--seed N] [--device auto]

BENCHMARK is one of those below. Runs that OUT holds already are not done again, so that the same command resumes, and
two of it share the runs. Settings: Testing/benchmarks/settings.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import typer
from comparison.main_table import MainTableSettings, main_table, shipped_settings

from MorphSeekLib.app.cli import check_choices, terminal_job
from MorphSeekLib.app.settings_file import load
from MorphSeekLib.protocol.startup import check_output_folder, check_readable

BENCHMARKS = {
    "main-table": "The paper's main table on four data sets.",
    "claims": "What MorphSeek adds to one step and to three, with more minutes; claims.py judges it.",
    "native-brains": "Whole brains at 1 mm, unaligned, by the bundled model, greedy and SyN.",
    "oasis": "The paper's table on the original OASIS of Learn2Reg, in the paper's sizes: for a GPU.",
    "lits": "The paper's table on the original LiTS, in the paper's sizes: for a GPU.",
    "abdomen-mrct": "The paper's table on Learn2Reg's original Abdomen MR-CT, in the paper's sizes: for a GPU.",
}


def main(arguments: list[str] | None = None) -> None:
    """Do the runs of a benchmark."""
    listed = "\n".join(f"  {name}: {text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds the data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; made when missing")
    parser.add_argument("--only", help="only these runs: TASK/METHOD/ARM, wildcards allowed, parts optional")
    parser.add_argument("--config", type=Path, help="other settings, TOML or JSON")
    parser.add_argument("--seed", type=int, help="another one than the settings', for another --out")
    parser.add_argument("--device", default="auto", help="auto (the first GPU, else the processor), cpu or cuda:N")
    options = parser.parse_args(arguments)
    with terminal_job() as job:
        check_readable(options.data)
        check_choices(device=options.device)
        check_output_folder(options.out)
        own = options.config is None
        settings = shipped_settings(options.benchmark) if own else load(MainTableSettings, options.config)
        if options.seed is not None:
            settings = dataclasses.replace(settings, seed=options.seed)
        main_table(settings, options.data, options.out, only=options.only, device=options.device, job=job)
    print(f"Wrote {options.out / 'table.md'}")


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as ended:
        raise SystemExit(ended.exit_code) from None
