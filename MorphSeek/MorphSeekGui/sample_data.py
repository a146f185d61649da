"""Sample data in Slicer's Sample Data module: a pair of scans to register, from the server of Slicer's own samples."""

from __future__ import annotations

from pathlib import Path

SERVER = "https://github.com/Slicer/SlicerTestingData/releases/download/SHA256/"
# the first case of Slicer's registration library: one patient's head at two times
PAIR = {
    "MorphSeekFixed": ("RegLib_C01_1.nrrd", "998cb522173839c78657f4bc0ea907cea09fd04e44601f17c82ea27927937b95"),
    "MorphSeekMoving": ("RegLib_C01_2.nrrd", "1a64f3f422eb3d1c9b093d1a18da354b13bcf307907c66317e2463ee530b7a97"),
}


def register_sample_data() -> None:
    """Add MorphSeek's entry; called when Slicer has started. Nothing is downloaded before the user clicks on it."""
    import SampleData

    icons = Path(__file__).resolve().parents[1] / "Resources" / "Icons"
    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="MorphSeek",
        sampleName="MorphSeekPair",
        uris=[SERVER + digest for _file, digest in PAIR.values()],
        fileNames=[file for file, _digest in PAIR.values()],
        nodeNames=list(PAIR),
        thumbnailFileName=str(icons / "MorphSeek.png"),
        checksums=[f"SHA256:{digest}" for _file, digest in PAIR.values()],
    )
