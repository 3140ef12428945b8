"""Ways to serve a variant: instances, threads and batching of the same model file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import cores
from benchmarks.variants import THREADS, Variant


@dataclass(frozen=True)
class Layout:
    """How a variant is served: `instances` of `threads` each, with or without dynamic batching."""

    variant: str
    instances: int
    threads: int
    batching: bool

    @property
    def model(self) -> str:
        """Name of the model in the temporary repository."""
        return f"{self.variant}_{self.instances}x{self.threads}_{self.batching_in_words}"

    @property
    def batching_in_words(self) -> str:
        """`batching` or `single`."""
        return "batching" if self.batching else "single"


def layouts_of(variants: list[Variant], instances: tuple[int, ...]) -> list[Layout]:
    """Every variant in every layout, with and without dynamic batching."""
    return [
        Layout(variant.name, count, max(1, cores() // count), batching)
        for variant in variants
        for count in instances
        for batching in (True, False)
    ]


def write_layouts(folder: Path, variants: Mapping[str, Variant], layouts: Iterable[Layout]) -> None:
    """Write a repository with one model for each layout, made from the published ones.

    The model files are linked, not copied; instances, threads and batching of the configs are
    replaced. Where batching is on, the published delay is kept.
    """
    from google.protobuf import text_format

    for layout in layouts:
        variant = variants[layout.variant]
        config = type(variant.config)()
        config.CopyFrom(variant.config)
        config.name = layout.model
        for group in config.instance_group:
            group.count = layout.instances
        config.parameters[THREADS].string_value = str(layout.threads)
        if not layout.batching:
            config.ClearField("dynamic_batching")
        elif not config.HasField("dynamic_batching"):
            config.dynamic_batching.SetInParent()
        target = folder / layout.model
        target.mkdir(parents=True)
        (target / "config.pbtxt").write_text(text_format.MessageToString(config))
        version = str(config.version_policy.specific.versions[0])
        source = variant.repository / variant.served_as / version
        (target / version).symlink_to(source.absolute(), target_is_directory=True)
