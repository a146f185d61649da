"""The Slicer module's own rooms: engine_client (the worker process), scene (nodes in and out), views, registration.

Nothing here imports torch, nor of MorphSeekLib more than its protocol, which needs the standard library alone: the
engine runs in its own process.
"""

import sys
from pathlib import Path


def engine_root() -> Path | None:
    """Return the folder that holds MorphSeekLib: beside the module in the extension, above it in a checkout.

    None when the engine is only installed as a package.
    """
    return next((p for p in Path(__file__).resolve().parents[1:4] if (p / "MorphSeekLib").is_dir()), None)


_root = engine_root()
if _root is not None and str(_root) not in sys.path:
    sys.path.append(str(_root))
