"""`fourmill doctor` on stages with a Python or an image of their own: whether actors can live there."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator

from fourmill.pipelines.doctor_finding import Finding
from fourmill.pseudolabel.config import VitDetConfig
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import RayConfig
from fourmill.runtime.stage_python import ACTOR_NEEDS, PythonReport, ask_python

_NEEDS = (*ACTOR_NEEDS, "torch")
_DETECTRON2_NEEDS = ("fourmill.pseudolabel.vitdet:require_detectron2", "detectron2")
_DET = "labels/det"
_PODMAN_TIMEOUT_S = 60
_IMAGE_STEP = "build it (infra/detectron2/Dockerfile), or name another in ray.runtime_env or that of ray.stages"
_STEP = "infra/detectron2/README.md builds detectron2's; or name another in ray.runtime_env or that of ray.stages"


def stage_pythons(project: Project) -> Iterator[Finding]:
    """A finding for each Python and image that stages name, with the stages; and one for detectron2 where none is named."""
    is_vitdet = isinstance(project.labellers["det"], VitDetConfig)
    names: dict[str, list[str]] = {}
    for name in ("", *project.ray.stages, *([_DET] if is_vitdet else [])):
        key = json.dumps(project.ray.for_stage(name).runtime_env, sort_keys=True)
        if (name or "all stages") not in names.setdefault(key, []):
            names[key].append(name or "all stages")
    for key, stages in names.items():
        environment = json.loads(key)
        needs = (*_NEEDS, *(_DETECTRON2_NEEDS if is_vitdet and _DET in stages else ()))
        if "image_uri" in environment:
            yield _image(f"image of {', '.join(stages)}", environment["image_uri"], project.ray, needs)
        elif "py_executable" in environment:
            yield _python(f"Python of {', '.join(stages)}", environment["py_executable"], project.ray, needs)
        elif is_vitdet and _DET in stages:
            yield _detectron2_here()


def _detectron2_here() -> Finding:
    from fourmill.pseudolabel.vitdet import require_detectron2

    try:
        return Finding("detectron2", "ok", f"{require_detectron2()}")
    except ImportError as error:
        return Finding("detectron2", "missing", str(error))


def _python(what: str, python: str, ray: RayConfig, needs: tuple[str, ...]) -> Finding:
    command = shlex.split(python)
    if shutil.which(command[0]) is None:
        if _is_elsewhere(ray):
            return Finding(what, "note", f"no {command[0]} on this machine; the nodes of the cluster need it")
        return Finding(what, "missing", f"no {command[0]} on this machine; {_STEP}")
    return _judged(what, python, ask_python(command, needs), _STEP)


def _image(what: str, image: str, ray: RayConfig, needs: tuple[str, ...]) -> Finding:
    if _is_elsewhere(ray):
        return Finding(
            what, "note", f"{image}: the nodes of the cluster pull it, with podman, when its first actor starts"
        )
    if shutil.which("podman") is None:
        step = "install it, or name a Python of this machine as py_executable"
        return Finding(what, "missing", f"{image}: Ray runs images with podman, which is not on this machine; {step}")
    try:
        there = subprocess.run(["podman", "image", "exists", image], capture_output=True, timeout=_PODMAN_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(what, "missing", f"{image}: podman does not run: {error}")
    if there.returncode:
        detail = f"{image} is not on this machine, and is pulled when its first actor starts; `podman pull {image}` proves it"
        return Finding(what, "note", detail)
    return _judged(what, image, ask_python(["podman", "run", "--rm", image, "python"], needs), _IMAGE_STEP)


def _judged(what: str, name: str, report: PythonReport, step: str) -> Finding:
    if report.lacks:
        return Finding(what, "missing", f"{name} {'; '.join(report.lacks)} ({step})")
    return Finding(what, "ok", f"{name}: {report.has}")


def _is_elsewhere(ray: RayConfig) -> bool:
    return ray.address not in (None, "local")
