"""First process of the GPU image: plan, model repository, then Triton in its own place.

Takes what was exported from /results (read-only) into the volume it is started in. Where a GPU
answers, the plans that do not fit this GPU, this TensorRT and these models are built by the
image's own `trtexec`, whose progress goes to the log; later starts find them in the volume. What
has no plan is served from ONNX. Not run on a GPU.

Arguments go to `tritonserver`; CHESTCT_SERVE_MODELS names the models to load (`chestct`).
"""

from __future__ import annotations

import dataclasses
import filecmp
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from export.convert.engine import (
    EngineConfig,
    Gpu,
    NoGpuError,
    find_gpu,
    plan_mismatches,
    read_record,
    trtexec_command,
    write_record,
)
from export.publish.repository import publish_variants
from export.publish.settings import ServeConfig
from training.common.config import load_config

logger = logging.getLogger("server_start")

CODE = Path(__file__).resolve().parents[1]
RESULTS = Path("/results")
ENGINE_CONFIGS = ("engine.yaml", "engine-int8.yaml")
FALL_BACKS = ("fp16", "fp32")  # in this order, where the promoted variant has no file
ADMIN_KEY = "CHESTCT_ADMIN_KEY"


def tensorrt_version() -> str:
    """Version of the image's TensorRT, such as 10.13.2, as its package or trtexec tells it.

    Raises:
        NoGpuError: There is no TensorRT.
    """
    if shutil.which("trtexec") is None:
        raise NoGpuError("no trtexec in this image")
    said = subprocess.run(["trtexec", "--help"], capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"TensorRT v(\d+)", said)
    if found is None:
        raise NoGpuError(f"trtexec does not tell its version: {said[:200]!r}")
    number = int(found[1])  # 101302 is 10.13.2
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def take_in(results: Path, folder: Path) -> None:
    """Copy exported files that are new or changed from `results` into `folder`; plans stay."""
    for source in sorted(results.glob("*/*")):
        if source.name not in ("model.onnx", "facts.json", "parity.json", "summary.json"):
            continue
        target = folder / source.relative_to(results)
        if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}")
            shutil.copyfile(source, temporary)
            temporary.rename(target)
            logger.info("took in %s, %.1f MB", target, target.stat().st_size / 1e6)


def provide_plan(config: EngineConfig, gpu: Gpu, version: str) -> None:
    """Keep the plan in `config.output` if it fits, else build it; without one if that fails."""
    onnx, plan = config.output / "model.onnx", config.output / "model.plan"
    if not onnx.is_file():
        logger.info("no plan for %s: it is not there", onnx)
        return
    try:
        mismatches = plan_mismatches(read_record(config.output), gpu, version, onnx)
    except ValueError as error:
        mismatches = [str(error)]
    if not mismatches:
        logger.info("%s fits %s and TensorRT %s", plan, gpu.name, version)
        return
    logger.info("building %s for %s, minutes: %s", plan, gpu.name, "; ".join(mismatches))
    plan.unlink(missing_ok=True)
    config.timing_cache.parent.mkdir(parents=True, exist_ok=True)
    unfinished = dataclasses.replace(config, output=config.output / "building")
    unfinished.output.mkdir(exist_ok=True)
    shutil.copyfile(onnx, unfinished.output / "model.onnx")
    try:
        subprocess.run(trtexec_command(unfinished), check=True)
        (unfinished.output / "model.plan").rename(plan)
        logger.info("built: %s", write_record(config, gpu, version))
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("no TensorRT plan (%s); the ONNX model is served instead", error)
    finally:
        shutil.rmtree(unfinished.output, ignore_errors=True)


def publish() -> bool:
    """Write the model repository, with the promoted variant or what stands in for it.

    Returns:
        Whether there is a `chestct` to serve.
    """
    config = load_config(ServeConfig, CODE / "configs" / "serve-gpu.yaml")
    models = config.models()
    for variant in (config.promoted, *FALL_BACKS):
        if variant in models and models[variant].served_file.is_file():
            break
    else:
        sys.stderr.write(
            f"server_start: {RESULTS} holds none of {[config.promoted, *FALL_BACKS]} with "
            "model.onnx, facts.json and parity.json; mount the folder `results` of an export\n"
        )
        return False
    if variant != config.promoted:
        logger.warning("%s has no file; %s is served as chestct", config.promoted, variant)
    for failure in publish_variants(dataclasses.replace(config, promoted=variant)):
        logger.warning("%s", failure)
    return (config.repository / "chestct" / "config.pbtxt").is_file()


def triton_command(arguments: list[str], has_gpu: bool) -> list[str]:
    """The command line of `tritonserver`; the admin APIs want a key, or are closed without one."""
    key = os.environ.get(ADMIN_KEY) or os.urandom(16).hex()
    restricted = f"model-repository,trace,logging:admin-key={key}"
    models = os.environ.get("CHESTCT_SERVE_MODELS", "chestct").split()
    return [
        "tritonserver",
        f"--model-repository={Path('model_repository').absolute()}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        "--disable-auto-complete-config",
        *([] if has_gpu else ["--model-config-name=cpu"]),
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        "--exit-timeout-secs=15",
        *arguments,
    ]


def main(arguments: list[str]) -> int:
    """Prepare and become Triton; 1 where there is nothing to serve."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    take_in(RESULTS, Path("results"))
    has_gpu = True
    try:
        gpu = find_gpu()
    except NoGpuError as error:
        has_gpu = False
        logger.warning("no TensorRT plan: %s; ONNX is served on the CPU", error)
    else:
        try:
            version = tensorrt_version()
            for name in ENGINE_CONFIGS:
                provide_plan(load_config(EngineConfig, CODE / "configs" / name), gpu, version)
        except NoGpuError as error:
            logger.warning("no TensorRT plan: %s; ONNX is served instead", error)
    if not publish():
        return 1
    command = triton_command(arguments, has_gpu)
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
