"""Many pairs of the scene registered from a script, by the batch that the panel starts too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .batch_pairs import Exported, PairWriter, ScenePair, as_pairs, shared_settings
from .batch_results import prepare_loading
from .batch_run import BatchRow, BatchRun, Start, create_batch, discard, write_pairs
from .batch_texts import state_sentence
from .engine_client import EngineClient, EngineError
from .messages import sentence
from .scene import InputError, RegistrationNodes

_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Engine:
    """What registers: the client loads results, and the Python runs the batch."""

    client: EngineClient
    python: str | None = None
    environment: Mapping[str, str] | None = None


@dataclass
class Outcome:
    """What became of one pair of a batch.

    Attributes:
        pair: as it was asked for.
        nodes: of its results; None where it failed, or nothing was to be loaded.
        error: the reason why there is no result; "" for a pair that is done.
        folder: with its files; None where it failed before it began.
        figures: of cohort.csv.
    """

    pair: Mapping[str, object]
    nodes: RegistrationNodes | None = None
    error: str = ""
    folder: Path | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def register_batch(
    pairs: Sequence[Mapping[str, object]],
    root: Path,
    engine: Engine,
    *,
    workers: int = 1,
    load: bool = True,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    cancelled: Callable[[], bool] = lambda: False,
    **options,
) -> list[Outcome]:
    """Register many pairs by `morphseek batch` and wait for the end. A pair that fails does not stop the others.

    Args:
        pairs: the arguments of :func:`MorphSeekGui.registration.register` that differ, "fixed_node" and "moving_node"
            at least.
        root: where the batch gets a folder of its own, with all files; the panel can open it.
        engine: what registers.
        workers: how many pairs are registered at once.
        load: put the results of each pair into the scene.
        on_outcome: called after each pair, in the order in which they end.
        cancelled: True ends the batch; the pairs that were not reached have no outcome.
        options: the arguments of a registration that all pairs share.

    Returns:
        the outcomes in the order of the pairs.

    Raises:
        InputError, RunError: the folder cannot be written, or the process cannot be started.
    """
    start = Start(options.pop("device", None) or "auto", options.pop("threads", None), workers)
    batch = _Batch(list(pairs), engine, load, on_outcome)
    asked = as_pairs(batch.pairs, options)
    good: list[tuple[int, ScenePair]] = []
    for number, pair in enumerate(asked):
        if isinstance(pair, str):
            batch.end(number, error=pair)
        else:
            good.append((number, pair))
    shared = shared_settings([pair.request for _number, pair in good])
    run = create_batch(root, "script", shared, start)
    writer = PairWriter(run.folder, shared)
    for _copied in writer.write([pair for _number, pair in good]):
        if cancelled():
            discard(run)
            return batch.outcomes()
    for place, problem in writer.exported.problems.items():
        batch.end(good[place][0], error=problem)
    if not writer.exported.rows:
        discard(run)
        return batch.outcomes()
    write_pairs(run, writer.exported.rows)
    run.start(keep=False, python=engine.python, environment=engine.environment)
    places = {name: good[place][0] for name, place in writer.exported.places.items()}
    batch.follow(run, writer.exported, places, cancelled)
    return batch.outcomes()


class _Batch:
    """Collects the outcomes."""

    def __init__(
        self, pairs: list[Mapping[str, object]], engine: Engine, load: bool, on_outcome: Callable[[Outcome], None]
    ) -> None:
        self.pairs, self._engine, self._load, self._on_outcome = pairs, engine, load, on_outcome
        self._ended: dict[int, Outcome] = {}

    def outcomes(self) -> list[Outcome]:
        """Return those there are, in the order of the pairs."""
        return [self._ended[number] for number in sorted(self._ended)]

    def end(self, number: int, **values: Any) -> None:
        """Take down what became of a pair."""
        self._ended[number] = Outcome(self.pairs[number], **values)
        self._on_outcome(self._ended[number])

    def follow(
        self, run: BatchRun, exported: Exported, places: Mapping[str, int], cancelled: Callable[[], bool]
    ) -> None:
        """Wait for the end of a batch, and take each pair that ends."""
        seen, stopped = None, False
        try:
            while True:
                state = run.state()
                if (stamp := run.stamp()) != seen or not state.alive:
                    seen = stamp
                    for row in run.rows():
                        if row.state != "waiting" and places[row.name] not in self._ended:
                            self._take(places[row.name], run, row, exported)
                if not state.alive:
                    break
                if not stopped and cancelled():
                    run.stop()
                    stopped = True
                time.sleep(_POLL)
        finally:
            run.release()
        if not stopped:
            problem = state_sentence(state, run.rows())
            for number in sorted(set(places.values()) - set(self._ended)):
                self.end(number, error=problem)

    def _take(self, number: int, run: BatchRun, row: BatchRow, exported: Exported) -> None:
        folder = run.folder / row.name
        if row.state == "failed":
            self.end(number, error=row.problem, folder=folder)
            return
        nodes, error = None, ""
        if self._load:
            try:
                loading = prepare_loading(run, row, exported.sources[row.name])
                try:
                    nodes = loading.finish(self._engine.client.call("results", loading.params))
                finally:
                    loading.discard()
            except (InputError, EngineError) as problem:
                error = sentence(problem)
        self.end(number, nodes=nodes, error=error, folder=folder, figures=row.figures)
