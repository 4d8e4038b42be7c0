"""The door: registers the verbs, turns errors into one line, and gives exit codes.

0 done; 1 failure; 2 usage; 130 interrupted. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import re
import sys
import warnings
from typing import Annotated, TextIO

import typer
from typer.main import get_command

from burnish.cli import claims
from burnish.cli.align import align
from burnish.cli.demo import demo
from burnish.cli.densify import densify
from burnish.cli.distill import distill
from burnish.cli.evaluate import evaluate
from burnish.cli.inspect import inspect
from burnish.cli.prune import prune
from burnish.cli.replay import replay
from burnish.cli.report import report
from burnish.cli.run import run_recipe
from burnish.cli.sweep import sweep
from burnish.cli.tune import tune
from burnish.errors import BurnishError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("inspect")(inspect)
app.command("densify")(densify)
app.command("distill")(distill)
app.command("prune")(prune)
app.command("tune")(tune)
app.command("align")(align)
app.command("replay")(replay)
app.command("evaluate")(evaluate)
app.command("report")(report)
app.command("run")(run_recipe)
app.command("sweep")(sweep)
app.command("demo")(demo)
app.add_typer(claims.app, name="claims")

INTERRUPTED = 130
# typer's class of a mistyped command line, which lives in click or in typer itself depending on the version.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


def _print_version(value: bool) -> None:
    if value:
        from burnish.runs import environment

        versions = environment()["versions"]
        assert isinstance(versions, dict)
        typer.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
        raise typer.Exit


@app.callback()
def burnish(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """burnish finishes trained models.

    Example: burnish densify Qwen/Qwen3-30B-A3B --out qwen3-dense
    """


def run(arguments: list[str] | None = None) -> None:
    """Run the command and exit; `--debug` anywhere shows the traceback of an error."""
    words = [_with_hyphens(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    warnings.showwarning = _show_warning
    try:
        code = get_command(app)(args=words, prog_name="burnish", standalone_mode=not words)
        _leave_ranks()
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else "burnish"
        _fail(f"{error.format_message().rstrip('.')}; see {path} --help", 2, debug)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ValueError as error:
        _fail(str(error), 2, debug)
    except (BurnishError, OSError, MemoryError) as error:
        _fail(str(error) or type(error).__name__, 1, debug)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        sys.stderr.write("burnish: interrupted; run the same command again to go on where it stopped\n")
    raise SystemExit(code or 0)


def _leave_ranks() -> None:
    """Without it a process of torchrun may abort when it ends."""
    if "torch" in sys.modules:
        from burnish.runs import ranks

        ranks.leave_ranks()


def _with_hyphens(word: str) -> str:
    """`--num_samples=4` -> `--num-samples=4`: both spellings are accepted."""
    match = re.match(r"--[a-z][a-z_]*(?==|$)", word)
    return match[0].replace("_", "-") + word[match.end() :] if match else word


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line a warning of ours, without the source line; other libraries' deprecations are theirs to read."""
    if category is UserWarning:
        sys.stderr.write(f"warning: {message}\n")


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        raise
    sys.stderr.write(f"burnish: {' '.join(message.split())}\n")
    raise SystemExit(code)
