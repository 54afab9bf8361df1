"""The entry point: commands are imported when they are called, errors become exit codes here."""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from looptx_cli.console import is_plain, know_flags, show_reasons, with_flags
from looptx_cli.imports import large_imports
from looptx_cli.panels import PanelledCommand
from looptx_cli.synonyms import command_hint, flag_hint
from looptx_core import __version__
from looptx_core.documents import has_half, printable
from looptx_core.errors import Interrupted, LooptxError, UsageError, remedy

# A command is a function of the module of the same name, with '_' for '-', but for `_MODULES`.
COMMANDS = {
    "tokenize": "Turn text into tokens.",
    "train": "Train a looped model.",
    "sweep": "Train a grid of settings, with several seeds.",
    "finetune": "Teach a trained model a task.",
    "convert": "Make a model smaller, or one for other tools.",
    "generate": "Write text, each token as deep as it needs.",
    "chat": "Talk with a model.",
    "serve": "Answer over HTTP, as OpenAI does.",
    "inspect-loops": "See what each loop brings, and when to stop.",
    "evaluate": "Measure a model on tasks, by depth.",
    "push": "Put a model on the Hugging Face hub.",
    "runs": "List the runs, and how far they came.",
    "compare": "Compare runs side by side.",
    "doctor": "See what this machine has, and what is missing.",
}

_MODULES = {"runs": "list_runs"}

# Typer may bring its own copy of Click, so take the base class from a public subclass.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def command_function(name: str) -> Any:
    """The function of a command, whose module is imported for it."""
    function_name = name.replace("-", "_")
    module = importlib.import_module(f"looptx_cli.{_MODULES.get(name, function_name)}")
    return getattr(module, function_name)


def load_command(name: str) -> Any:
    """Import a command's module and make it a command of Click's."""
    alone = typer.Typer(add_completion=False)
    epilog = "--debug shows the traceback of an error, and the reasons of choices."
    alone.command(name, cls=PanelledCommand, epilog=epilog)(command_function(name))
    return typer.main.get_command(alone)


class LazyGroup(TyperGroup):
    """Lists commands by name and summary only, and imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and (hint := command_hint(args[0], COMMANDS)):
            raise UsageError(f"no command '{args[0]}'; use {hint}")
        name, _, rest = super().resolve_command(ctx, args)
        command = load_command(str(name))
        options = [p for p in command.params if p.opts[0].startswith("--")]
        know_flags({option.name: option.opts[0] for option in options})
        return name, command, rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with large_imports():  # Rich's, for the help's boxes
            super().format_help(ctx, formatter)


app = typer.Typer(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"looptx {__version__}")
        raise typer.Exit


@app.callback(epilog="Each command has its own --help, with examples.")
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Looped language models: more thinking, no more parameters.

    \b
    looptx tokenize corpus/*.txt --out data      text to tokens
    looptx train --data data --out runs/a        tokens to a looped model
    looptx generate "Call me" --model runs/a     a model to text, with its loops
    looptx inspect-loops --model runs/a          what each loop brings

    Each of these runs without any argument, too.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; nothing is raised.

    argv: the arguments without the program's name; absent: this process's.
    """
    _open_streams()
    know_flags({})
    args, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    if debug:
        show_reasons()
    if is_plain(sys.stdout):
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    try:
        _stop_like_ctrl_c()
        if wrong := next((arg for arg in args if has_half(arg)), None):
            raise UsageError(f"the argument {printable(wrong)} is not UTF-8; rename or convert it")
        code = typer.main.get_command(app).main(
            args or ["--help"], prog_name="looptx", standalone_mode=False
        )
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    except SystemExit as error:  # Click's own end for a closed pipe
        return _closed_pipe() if error.code == 1 else int(error.code or 0)
    except BaseException as error:
        code, line = _explain(error)
        if debug:
            traceback.print_exc()
        # Who stops a command has made no error.
        kind = "" if code == Interrupted.exit_code else "error: "
        typer.echo(f"looptx: {kind}{printable(' '.join(line.split()))}", err=True)
        return code
    if code == Interrupted.exit_code:  # Click turned a KeyboardInterrupt into a code
        typer.echo("looptx: interrupted", err=True)
    return code if isinstance(code, int) else 0


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, wherever it stands before a '--', and whether it did."""
    end = args.index("--") if "--" in args else len(args)
    head = [arg for arg in args[:end] if arg != "--debug"]
    wanted = len(head) < end or os.environ.get("LOOPTX_DEBUG", "") not in ("", "0")
    return head + args[end:], wanted


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message for whatever ended a command."""
    match error:
        case LooptxError():
            return error.exit_code, with_flags(str(error))
        case _ClickException():
            line = _unknown_flag(error) or error.format_message()  # type: ignore[attr-defined]
            return 2, f"{line} (--help shows all options)"
        case KeyboardInterrupt() | typer.Abort():
            return Interrupted.exit_code, "interrupted"
        case ModuleNotFoundError(name=str(name)) if not name.startswith("looptx"):
            return 3, f"the package {name} is not installed; pip install looptx again, or {name}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            return 1, f"the disk is full{where}; free some space or write to another disk"
        case OSError(strerror=str(reason), filename=filename) if filename:
            return 1, f"{filename}: {reason}; {remedy(error, 'check the path')}"
        case OSError(strerror=str(reason)) if remedy(error, ""):
            return 1, f"{reason}; {remedy(error)}"
        case MemoryError():
            return 1, f"no memory left; {remedy(errno.ENOMEM)}"
        case RuntimeError() if _MEMORY.search(str(error)):
            return 1, f"no memory left; {remedy(errno.ENOMEM)}, or give less at once"
        case RuntimeError() if "can't start new thread" in str(error):
            return 1, f"no thread can be started; {remedy(errno.EAGAIN)}"
    what = f"{type(error).__name__}: {error}"
    return 1, f"internal error, {what}; run again with --debug and report it"


def _unknown_flag(error: Any) -> str | None:
    """What to type in place of a flag that a command does not have, where it is known."""
    if not hasattr(error, "possibilities"):  # as Click's NoSuchOption has, and no other
        return None
    flag = error.option_name
    command = str(error.ctx.command.name) if error.ctx else ""
    all_flags = {
        name: [own for p in load_command(name).params for own in (*p.opts, *p.secondary_opts)]
        for name in COMMANDS
    }
    hint = flag_hint(flag, command, all_flags)
    here = f"looptx {command}" if command in COMMANDS else "looptx"
    return hint and f"{here} has no {flag}; {hint}"


_MEMORY = re.compile("can't allocate memory|out of memory|not enough memory|Cannot allocate")


def _open_streams() -> None:
    """A closed standard stream is the null device: what is opened next must not take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)
                if null != number:
                    os.dup2(null, number)
                    os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of another encoding gets escapes
            stream.reconfigure(errors="backslashreplace")


def _stop_like_ctrl_c() -> None:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes what is temporary."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _closed_pipe() -> int:
    """The reader of our output left, as `head` does: end quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    sys.exit(main())
