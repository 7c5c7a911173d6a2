"""What the three commands share: how they refuse bad input, log, and take common options."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from scaling.common.logs import configure_logging, log_warnings
from scaling.common.redact import redact_passwords
from scaling.common.suggest import did_you_mean
from scaling.common.validation import explain_errors, list_mistakes

Uri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow store; default $MLFLOW_TRACKING_URI or ./mlflow.db")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what it would cost, and start nothing")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="log warnings and errors only")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="log details, too")]


def make_app(description: str | None) -> typer.Typer:
    """Return an empty command whose sub-commands log to stderr and take --quiet and --verbose.

    Args:
        description: The first lines of `--help`.
    """
    return _App(
        cls=Commands, no_args_is_help=True, add_completion=False, help=description, pretty_exceptions_enable=False
    )


class _App(typer.Typer):
    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        register = super().command(*args, **options)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_verbosity(function))
            return function

        return decorate


def _with_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the same options and two more, which set the level of the log before it is called."""

    @functools.wraps(function)
    def command(*args: Any, quiet: bool, verbose: bool, **options: Any) -> Any:
        configure_logging(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
        with log_warnings():
            return function(*args, **options)

    # Typer reads the signature, whose annotations are strings in modules with deferred evaluation: they are resolved
    # here.
    hints = get_type_hints(function, include_extras=True)
    parameters = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@contextmanager
def refusing() -> Iterator[None]:
    """End the command with exit code 2 and the message of an error that bad input causes.

    Such errors are ValueError and those of a file that is missing, is of the wrong kind or cannot be opened.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        say(f"error: {_explain(error)}")
        raise typer.Exit(2) from error


def _explain_option(error: typer.BadParameter) -> str:
    """Return what was needed of an option and what was given, instead of pydantic's words for it."""
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not isinstance(error.__cause__, pydantic.ValidationError):
        return str(error.message)
    problem = "; ".join(explain_errors(error.__cause__))
    if choice := re.fullmatch(r"'(.*)' is not one of (.*)\.", problem):
        known = choice[2].replace("'", "").split(", ")
        return f"needed one of {', '.join(known)}, got {choice[1]}{did_you_mean(choice[1], known, before='; ')}"
    return problem


def _explain(error: Exception) -> str:
    """Return the message of an error; that of a wrong value of a model in one sentence per field."""
    # No error can be pydantic's if nothing has imported it.
    if (pydantic := sys.modules.get("pydantic")) and isinstance(error, pydantic.ValidationError):
        return list_mistakes(explain_errors(error))
    return str(error)


class Commands(TyperGroup):
    """A command group that explains wrong options in plain words, and redacts tracebacks.

    Tracebacks of databases and servers quote URLs with passwords.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _explain_option(error)
            raise
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            if redact_passwords(text) == text:
                raise
            say(text.rstrip())
            raise SystemExit(1) from None


def say(text: str) -> None:
    """Print a line of a command to stderr, without passwords. Stdout is for data; libraries log instead."""
    print(redact_passwords(text), file=sys.stderr, flush=True)
