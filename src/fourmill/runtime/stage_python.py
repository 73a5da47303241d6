"""The Python of a stage's own (`py_executable`), asked whether fourmill's actors can live under it.

`fourmill doctor` asks it on this machine, the pool on nodes where actors do not come up. Nothing else is done about it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

ACTOR_NEEDS = ("ray", "fourmill.runtime.actors")
_MATCH_LEVEL = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"  # Ray's own
_TIMEOUT_S = 180.0  # torch from a cold disk
_PROGRAM = """
import importlib, importlib.metadata, json, sys
found = {"python": "%d.%d.%d" % sys.version_info[:3]}
lacking = {}
for wanted in sys.argv[1:]:
    module, _, function = wanted.partition(":")
    top = module.partition(".")[0]
    try:
        loaded = importlib.import_module(module)
        if function:
            getattr(loaded, function)()
    except Exception as error:
        lacking[wanted] = str(error) or type(error).__name__
        continue
    try:
        found[top] = importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        found[top] = getattr(sys.modules[top], "__version__", "")
print(json.dumps([found, lacking]))
"""


@dataclass(frozen=True)
class PythonReport:
    """What a Python has, and what it lacks with the next step; no word of lacks: it is fit."""

    has: str
    lacks: tuple[str, ...] = ()


def ask_python(command: Sequence[str], wanted: Sequence[str] = ACTOR_NEEDS) -> PythonReport:
    """Run a Python and compare it with this one: a worker of another Python or Ray than its node's does not serve.

    Args:
        command: of the Python, with its arguments.
        wanted: modules that it must import, and `module:function` that must not raise.
    """
    asked = [*command, "-W", "ignore", "-c", _PROGRAM, *wanted]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except OSError as error:
        return _silent(str(error.strerror))
    except subprocess.TimeoutExpired:
        return _silent(f"no answer within {_TIMEOUT_S:.0f} s")
    lines = [line for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    if done.returncode or not lines:
        last = lines[-1].strip() if lines else "it says nothing"
        return _silent(f"exit code {done.returncode}: {last}")
    found, lacking = json.loads(lines[-1])
    return PythonReport(", ".join(f"{name} {number}".strip() for name, number in found.items()), _lacks(found, lacking))


def _silent(reason: str) -> PythonReport:
    return PythonReport("", (f"does not run ({reason}): build that environment there, or name another",))


def _lacks(found: Mapping[str, str], lacking: Mapping[str, str]) -> tuple[str, ...]:
    here, ray = "{}.{}.{}".format(*sys.version_info[:3]), version("ray")
    said: list[str] = []
    is_lax = os.environ.get(_MATCH_LEVEL) == "minor"  # else the last number counts for Ray too
    if found["python"].split(".")[: 2 if is_lax else 3] != here.split(".")[: 2 if is_lax else 3]:
        said.append(f"is Python {found['python']} and must be {here}, as here: build that environment with it")
    if "ray" in found and found["ray"] != ray:
        said.append(f"has ray {found['ray']} and must have that of here: install ray=={ray} in it")
    for wanted, reason in lacking.items():
        name = wanted.partition(":")[0]
        top = name.partition(".")[0]
        step = {"ray": f"ray=={ray}", "fourmill": "fourmill as infra/detectron2/README.md does"}.get(top, top)
        said.append(f"cannot import {name} ({reason}): install {step} in it" if ":" not in wanted else reason)
    return tuple(said)
