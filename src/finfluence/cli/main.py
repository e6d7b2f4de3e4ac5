"""Entry point of `finfluence`: errors become one line and exit status 2, warnings one line on standard error."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from finfluence.errors import FinfluenceError

app = typer.Typer(
    name="finfluence",
    help="Which training data made the model behave as it does, with error bars that survive a rerun.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors (anywhere on the line).")] = False,
) -> None:
    del debug  # read in `main`, so that it works behind the command too


def register() -> None:
    """Adds the commands to the application, once; their modules load here and not with this one."""
    if app.registered_commands:
        return
    from finfluence.cli.clean import clean
    from finfluence.cli.compare_runs import compare_runs
    from finfluence.cli.demo import demo
    from finfluence.cli.doctor import doctor
    from finfluence.cli.report import report
    from finfluence.cli.score import score
    from finfluence.cli.train import train
    from finfluence.cli.verify import verify

    for command in (demo, train, score, report, clean, verify, compare_runs, doctor):
        app.command(no_args_is_help=False)(command)


def _one_line(message: Any, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: the words behind the program's name; the process's own by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    register()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line
            app(words, standalone_mode=True)
    except FinfluenceError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was recorded so far is kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output (head, less) went away
        sys.stderr.close()
        sys.exit(0)
