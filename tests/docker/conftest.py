"""Scripts of docker/, which is no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

for name in ("images_check", "server_start"):
    specification = importlib.util.spec_from_file_location(
        f"docker_{name}", CHECKOUT / "docker" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(specification)
    sys.modules[f"docker_{name}"] = module
    specification.loader.exec_module(module)
