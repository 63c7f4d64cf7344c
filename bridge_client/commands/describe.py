"""The command `bridge_client describe`: a worker, its models and how its tensors would travel."""

import inspect
import json
import textwrap
from typing import Any

from bridge_client.remote.session import RemoteSession
from bridge_client.session import ModelInfo

_INDENT = "  "


def show(session: RemoteSession, is_json: bool) -> None:
    """Print the description of a session's worker."""
    if is_json:
        print(json.dumps(as_object(session)))
        return
    about = session.worker
    print(f"lane={session.lane} memory={session.memory} x64={session.x64}")
    print(
        f"{about['framework']} {about['framework_version']}, Python {about['python_version']},"
        f" torch-jax-bridge {about['version']}, devices {', '.join(about['devices'])}"
    )
    for model in session.models.values():
        for line in _lines(model):
            print(line)


def as_object(session: RemoteSession) -> dict[str, Any]:
    """Return the description as values of JSON."""
    models = [_model(model) for model in session.models.values()]
    path = {"lane": session.lane, "memory": session.memory}
    return session.worker | path | {"models": models}


def _lines(model: ModelInfo) -> list[str]:
    lines = [f"{name}{parameters}" for name, parameters in _calls(model)]
    summary = inspect.cleandoc(model.doc).partition("\n\n")[0]
    lines[1:1] = textwrap.indent(summary, _INDENT * 2).splitlines()
    for parameter in model.parameters:
        kind = "parameter" if parameter.trainable else "buffer"
        lines.append(f"{_INDENT}{kind} {parameter.path}: {parameter.spec}")
    for arrays in model.signatures:
        lines.append(f"{_INDENT}compiled for ({', '.join(map(str, arrays))})")
    return lines


def _calls(model: ModelInfo) -> list[tuple[str, str]]:
    """Return the names under which a model can be called, each with its parameters."""
    calls = []
    for method in model.methods or ("__call__",):
        name = model.name if method == "__call__" else f"{model.name}.{method}"
        known = model.signature_of(method)
        calls.append((name, known or f"({', '.join(model.arguments_of(method))})"))
    return calls


def _model(model: ModelInfo) -> dict[str, Any]:
    return {
        "name": model.name,
        "doc": model.doc,
        "calls": dict(_calls(model)),
        "parameters": [
            {
                "path": each.path,
                "spec": str(each.spec),
                "trainable": each.trainable,
            }
            for each in model.parameters
        ],
        "compiled_for": [[str(spec) for spec in arrays] for arrays in model.signatures],
    }
