"""The options of the commands that train, made from the declarations in `training.settings`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

import typer

from igpt_cli.errors import InputError
from igpt_cli.training.settings import Execution, LearningSettings, Setting, declared


def with_settings(kind: type[LearningSettings], **completions: Callable) -> Callable[[Callable], Callable]:
    """Give a command the options of `kind` and of `Execution`, in the place of its parameter `settings`.

    Args:
        completions: what completes the options of some settings, by name, as for `typer.Option(autocompletion=)`.

    The command is called with `settings`: those given, by name, parsed; the library checks their ranges.
    """

    def decorate(command: Callable) -> Callable:
        options = _settings(kind)
        signature = inspect.signature(command, eval_str=True)
        own = list(signature.parameters.values())
        at = next(i for i, p in enumerate(own) if p.name == "settings")
        own[at : at + 1] = [_parameter(kind, name, s, completions.get(name)) for name, s in options.items()]

        @wraps(command)
        def run(**given: Any) -> None:
            of_settings = {k: given.pop(k) for k in options}
            parsed = {k: _parsed(k, options[k], v) for k, v in of_settings.items() if v is not None}
            command(settings=parsed, **given)

        run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _settings(kind: type[LearningSettings]) -> dict[str, Setting]:
    """Those with an option: the task's own first, then those that other tasks have, too, then those of execution."""
    known = {f.name: s for k in (kind, Execution) for f, s in declared(k) if s.option}
    names = dict.fromkeys(name for cls in (*kind.__mro__, Execution) for name in vars(cls).get("__annotations__", ()))
    return {name: known[name] for name in names if name in known}


def _parameter(
    kind: type[LearningSettings], name: str, setting: Setting, completion: Callable | None
) -> inspect.Parameter:
    """The option of a setting; not given it is None."""
    holder = kind if hasattr(kind, name) else Execution
    default = getattr(holder, name)
    unset = kind.unset.get(name, setting.unset) if default is None else f"{default}"
    declared_type = get_type_hints(holder)[name]
    types = [t for t in get_args(declared_type) or (declared_type,) if t is not type(None)]
    hint = types[0] if len(types) == 1 and setting.parse is None else str
    allowed = setting.allowed if hint is int else None
    option = typer.Option(
        *(setting.names or ("--" + name.replace("_", "-"),)),
        metavar=setting.metavar,
        min=allowed.least if allowed else None,
        max=allowed.most if allowed else None,
        autocompletion=completion,
        help=setting.help + (f"  [default: {unset}]" if unset and default is not False else ""),
        show_default=False,
    )
    where = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, where, default=None, annotation=Annotated[hint | None, option])


def _parsed(name: str, setting: Setting, value: Any) -> Any:
    """What the library takes for the text of an option."""
    if setting.parse is None:
        return value
    try:
        return setting.parse(value)
    except InputError as e:
        raise typer.BadParameter(str(e), param_hint=(setting.names or ("--" + name.replace("_", "-"),))[0]) from None
