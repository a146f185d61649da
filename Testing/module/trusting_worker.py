"""A worker without a network: it trusts the initial transform and answers with it.

So a registration's way through Slicer can be checked in full against a known truth: what goes in as initial transform
must come out as the transform node, and MRML's resampling under it must give the warped volume.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space import fields, geometry


def load(reference: dict) -> geometry.Volume:
    data = torch.from_numpy(np.ascontiguousarray(np.load(reference["path"], mmap_mode="r")))
    return geometry.Volume(data, geometry.Grid(data.shape, reference["affine"]))


def initial_transform(initial: dict | None, nodes: geometry.Grid) -> geometry.DenseTransform:
    if initial is not None and "displacement" in initial:
        reference = initial["displacement"]
        given = torch.from_numpy(np.ascontiguousarray(np.load(reference["path"])))
        given = geometry.DenseTransform(given, geometry.Grid(given.shape[1:], reference["affine"]))
        return geometry.DenseTransform(given.displacement_at(nodes), nodes)
    matrix = np.array(initial["matrix"]) if initial is not None else np.eye(4)
    return geometry.dense_from_voxels(torch.zeros(1, 3, *nodes.shape), nodes, matrix)


def register(params: dict, progress) -> dict:
    progress(phase="read", fraction=0.1)
    if params["model"] != "trusting":
        raise MorphSeekError(f"There is no model '{params['model']}'; choose another one.")
    fixed, moving = load(params["fixed"]), load(params["moving"])
    # nodes on the fixed voxels, so that a sampled initial transform is taken over as it is
    transform = initial_transform(params["initial"], fixed.grid)
    folder = Path(params["output"])

    def save(name: str, data: torch.Tensor, affine: np.ndarray) -> dict:
        np.save(folder / f"{name}.npy", data.numpy())
        return {"path": str(folder / f"{name}.npy"), "affine": affine.tolist()}

    jacobian = fields.jacobian_determinant(geometry.voxel_displacement(transform, fixed.grid))[0, 0]
    labels = params["moving_labels"] and geometry.resample(
        load(params["moving_labels"]), fixed.grid, transform, mode="nearest"
    )
    back = transform.inverse(moving.grid) if params["options"]["inverse"] else None
    progress(phase="write", fraction=0.9)
    return {
        "warped": save("warped", geometry.resample(moving, fixed.grid, transform).data, fixed.grid.affine),
        "displacement": save("displacement", transform.displacement, transform.grid.affine),
        "inverse": back and save("inverse", back.displacement, back.grid.affine),
        "jacobian": save("jacobian", jacobian, fixed.grid.affine),
        "folding": save("folding", (jacobian <= 0).to(torch.uint8), fixed.grid.affine),
        "warped_labels": labels and save("labels", labels.data, fixed.grid.affine),
        "report": {
            "folder": str(folder.parent),
            "labels": None if params["fixed_labels"] is None else np.unique(load(params["fixed_labels"]).data).tolist(),
            **{key: params["options"][key] for key in ("steps", "align")},
            "device": params["device"],
        },
    }


def main() -> None:
    def send(**message) -> None:
        print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        number = request.get("id")
        if request["method"] != "register":
            continue
        try:
            result = register(
                request["params"], lambda number=number, **p: send(method="progress", params={"id": number, **p})
            )
        except MorphSeekError as problem:
            send(id=number, error={"code": -32000, "message": str(problem)})
        else:
            send(id=number, result=result)


if __name__ == "__main__":
    main()
