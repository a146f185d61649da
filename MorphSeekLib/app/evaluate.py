"""Let local processes or a cluster register the pairs of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ..data.datasets import Dataset
from ..evaluation.evaluate import Measured, Work
from ..protocol.job import Job
from ..protocol.options import RegistrationOptions
from ..protocol.settings import to_dict
from .crew import Crew
from .pair_worker import Request


def by_crew(
    crew: Crew, dataset: Dataset, split: str, model: str, options: RegistrationOptions, device: str, job: Job
) -> Work:
    """Return what :func:`MorphSeekLib.evaluate` takes as ``work``, done by others.

    Args:
        crew: who works.
        dataset: as :func:`MorphSeekLib.load_dataset` reads it from its file, which each worker must see.
        split, options: as for the evaluation.
        model: a name, a file, or none.
        device: auto, cpu or cuda:N.
        job: asked whether it was cancelled.
    """
    wanted = to_dict(dataclasses.replace(options, inverse=False))

    def work(numbers: Sequence[int]) -> Iterator[Measured]:
        requests: list[Request] = [
            {
                "name": str(number),
                "model": model,
                "options": wanted,
                "device": device,
                "paths": [str(dataset.path.resolve())],
                "files": None,
                "scored": {"dataset": str(dataset.path.resolve()), "split": split, "index": number},
            }
            for number in numbers
        ]
        for request, answer in crew.answers(requests, job):
            yield int(request["name"]), answer["figures"], answer["problem"]

    return work
