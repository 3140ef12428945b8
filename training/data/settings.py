"""Settings of `training ingest`."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from training.common.config import (
    config_class,
)

PHANTOM = "phantom"  # the source that is drawn
FolderName = Annotated[str, Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$")]


@config_class
class IngestConfig:
    """Where scans come from and what is refused.

    Attributes:
        source: Used when neither `--source`, DATA nor an earlier `table` names one: `phantom`, a
            folder, a .zip, an https address of one, or a Google Drive link.
        sha256: Expected hash of the archive; only for sources that are one file.
        labels: Folder name to label, for names that the rule of `label_from_folder` does not fit.
        scans: Folder to write.
        table: JSON to write.
        phantom_config: Config of `training phantom`.
        max_download_bytes: 8 GiB: chest CT sets of PNG are below 1 GiB, of DICOM a few.
        max_unpacked_bytes: 32 GiB on disk.
        max_files: A folder of slices has thousands, a bomb has millions.
        max_compression_ratio: PNG and JPEG hardly shrink, DICOM two to four times, a bomb 1000.
        timeout_s: Longest silence of a server.
    """

    source: str = PHANTOM
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    labels: dict[str, FolderName] = field(default_factory=dict)
    scans: Path = Path("data/scans")
    table: Path = Path("data/ingest.json")
    phantom_config: Path = Path("configs/phantom.yaml")
    max_download_bytes: PositiveInt = 8 * 2**30
    max_unpacked_bytes: PositiveInt = 32 * 2**30
    max_files: PositiveInt = 500_000
    max_compression_ratio: Annotated[float, Field(ge=1)] = 100.0
    timeout_s: PositiveFloat = 30.0

    @property
    def overrides(self) -> Path:
        """YAML to write beside `table` for the later stages; see `training.common.config`."""
        return self.table.with_name("overrides.yaml")
