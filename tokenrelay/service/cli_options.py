"""Settings as options of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from tokenrelay.service.settings import Settings


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per named setting, and pass it the resulting ``Settings``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]

        def run(**options: Any) -> None:
            given = {name: options.pop(name) for name in names}
            command(settings=_settings({k: v for k, v in given.items() if v is not None}), **options)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__signature__ = inspect.Signature([*own, *map(_option, names)])  # type: ignore[attr-defined]
        return run

    return decorate


def _option(name: str) -> inspect.Parameter:
    """A typer option for a setting; its default stays with the setting, so that the environment can speak."""
    setting = Settings.model_fields[name]
    kind = setting.annotation if setting.annotation in (int, float, bool) else str
    default = f" [default: {setting.default}]" if setting.default != "" else ""
    option = typer.Option(help=f"{setting.description}{default}", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _settings(options: dict[str, Any]) -> Settings:
    try:
        return Settings(**options)
    except ValidationError as error:
        for problem in error.errors():
            field = "--" + "-".join(map(str, problem["loc"])).replace("_", "-") if problem["loc"] else "settings"
            Console(stderr=True).print(f"[red]{field}[/red]: {problem['msg']}")
        raise typer.Exit(2) from error
