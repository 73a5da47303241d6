"""What people change in `project.json` by hand outlives the next command; and `--set KEY=VALUE` changes it by command."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from fourmill.runtime.project import Project, ProjectError, problems_of


def with_edits(commanded: Project, edited: Project, commanded_before: Project) -> Project:
    """The project that a command makes, with what was edited since the last command.

    Value by value: what this command says differently from the last one counts, else what the file says.

    Args:
        commanded: what the command makes by itself.
        edited: what the project's file says.
        commanded_before: what the last command made by itself.

    Raises:
        ProjectError: the two do not go together.
    """
    values = _merged(*(json.loads(one.model_dump_json()) for one in (commanded, edited, commanded_before)))
    try:
        return Project.model_validate(values)
    except ValidationError as error:
        said = "; ".join(problems_of(error))
        raise ProjectError(f"what was edited in project.json does not go with this command: {said}") from error


def with_settings(project: Project, settings: Sequence[str]) -> Project:
    """The project with values set by `a.b.c=VALUE`; VALUE is JSON, or text where it is none.

    Raises:
        ProjectError: there is no such key, or the value is none for it.
    """
    values = json.loads(project.model_dump_json())
    hints: list[str] = []
    for setting in settings:
        path, equals, given = setting.partition("=")
        keys = path.split(".")
        place: Any = values
        for key in keys[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict):
            raise ProjectError(
                f"{setting!r} sets nothing: give a key of project.json and a value, as in `ingest.per_host=4`"
            )
        hints += _meant(keys, place)
        place[keys[-1]] = _value(given)
    try:
        return Project.model_validate(values)
    except ValidationError as error:
        raise ProjectError(f"--set {' '.join(settings)}: {'; '.join([*problems_of(error), *hints])}") from error


def _meant(keys: Sequence[str], place: Mapping[str, Any]) -> list[str]:
    """Existing keys beside one that is new there, if it looks like them: for an error, since new keys are right in some maps."""
    alike = [] if keys[-1] in place else get_close_matches(keys[-1], place)
    return [f"is {' or '.join('.'.join([*keys[:-1], key]) for key in alike)} meant?"] if alike else []


def _value(given: str) -> Any:
    try:
        return json.loads(given)
    except json.JSONDecodeError:
        return given


def _merged(new: Any, edited: Any, before: Any) -> Any:
    if not (isinstance(new, dict) and isinstance(edited, dict) and isinstance(before, dict)):
        return edited if new == before else new
    merged = {key: _merged(new[key], edited.get(key), before[key]) if key in before else new[key] for key in new}
    return {**merged, **{key: edited[key] for key in edited if key not in new and key not in before}}
