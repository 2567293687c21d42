"""The command line: arguments, exit statuses and one-line errors.

Parsing imports only argparse. The modules of a command (qemu.qmp takes 95 ms) are imported when the
command runs: serve.py for the server, control.py for nearly all commands over QMP.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from nbdmirror import __version__
from nbdmirror.cli import parsers as cli_parsers
from nbdmirror.cli.common import (
    DONE,
    FAILED,
    INTERRUPTED,
    THREADS_DEFAULT,
    THREADS_DIRECT_DEFAULT,
    USAGE,
    CliError,
    absolute_uri,
)
from nbdmirror.cli.streams import finish, open_streams, output_error, say
from nbdmirror.cli.values import migration_uri, rate, seconds, whole
from nbdmirror.limits import (
    CONNECTIONS_MAX,
    KEEPALIVE_S_MAX,
    OPEN_TIMEOUT_S_MAX,
    PORT_MAX,
    THREADS_MAX,
)
from nbdmirror.process_limits import limit_of

_EPILOG = """\
exit status: 0 done; 1 the job failed or was cancelled, or the command was refused; 2 usage;
3 no server found; 4 timed out; 130 interrupted (jobs continue).
The server is named by --qmp or NBDMIRROR_QMP. Sizes take K, M, G, T (powers of 1024)."""
_ANSWERS = ("status", "explain", "list", "points", "events", "plugin-path")
"""Commands whose only purpose is their output."""


class _Once(argparse.Action):
    """Stores a value, and refuses a second one: which of the two is meant is not known."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, _Parser)
        if option_string and self in parser.given:
            raise argparse.ArgumentError(self, "is given twice")
        parser.given.append(self)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Takes each option once, unless the option's action is to append."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[argparse.Action] = []
        for name in (None, "store"):
            self.register("action", name, _Once)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        self.given = []
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        say(f"nbdmirror: {message} (see: {self.prog} --help)")
        sys.exit(USAGE)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nbdmirror",
        description="An NBD server with built-in live mirroring.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"nbdmirror {__version__}"
    parser.add_argument("-V", "--version", action="version", version=version, help="print it")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, *, qmp: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if qmp:
            command.add_argument("--qmp", metavar="PATH", help="the server's control socket")
        return command

    _add_serve(add("serve", "serve disks over NBD (runs nbdkit)"))
    cli_parsers.add_mirror(add("mirror", "start to mirror disks to NBD targets"))
    _add_handover(add("handover", "move a running QEMU guest to another host, memory and disk"))
    status = add("status", "show disks and jobs")
    status.add_argument("--json", action="store_true", help="print JSON")
    more = status.add_mutually_exclusive_group()
    more.add_argument("--watch", action="store_true", help="continue until interrupted")
    more.add_argument("--all", action="store_true", help="show every server of this host")
    _add_job_commands(add)
    add("events", "print events as they come").add_argument(
        "--json", action="store_true", help="print JSON lines"
    )
    add("plugin-path", "print the path of the nbdkit plugin", qmp=False)
    return parser


def _add_job_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    wait = add("wait", "wait for a job")
    until = wait.add_mutually_exclusive_group(required=True)
    until.add_argument("--ready", action="store_true", help="until source and target are in sync")
    until.add_argument("--concluded", action="store_true", help="until the job has ended")
    wait.add_argument("--json", action="store_true", help="print JSON lines")
    complete = add("complete", "end a ready job and serve the guest from the target")
    cancel = add("cancel", "end a job and keep the source (after READY: target consistent)")
    cancel.add_argument("--force", action="store_true", help="end now; the target is left unusable")
    for command in (wait, complete, cancel):
        cli_parsers.add_timeout(command)
    speed = add("set-speed", "limit the copying of a job")
    speed.add_argument("rate", type=rate, metavar="RATE", help="bytes per second; 0: no limit")
    pause, resume = add("pause", "pause a job"), add("resume", "resume a paused job")
    for command in (wait, complete, cancel):
        cli_parsers.add_job(command, is_several=True)
    for command in (pause, resume, speed, *cli_parsers.add_commands(add)):
        cli_parsers.add_job(command)


def _add_handover(handover: argparse.ArgumentParser) -> None:
    add = handover.add_argument
    add("target", metavar="TARGET_URI", help="NBD URI of the disk at the other host")
    add("--qemu", metavar="PATH", required=True, help="QMP socket of the QEMU that runs the guest")
    add(
        "--to",
        type=migration_uri,
        metavar="URI",
        required=True,
        help="where a QEMU waits for the guest, as for QEMU's migrate: tcp:HOST:PORT",
    )
    add("--device", metavar="NAME", help="the guest's disk (default: the only one)")
    text = "undo the handover if the guest is not stopped for the pivot after S seconds"
    add("--timeout", type=seconds, metavar="S", help=text)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.usage = "nbdmirror serve DISK|NAME=DISK ... [options] [-- NBDKIT ARGS]"
    add = serve.add_argument
    disk = "raw file, block device or NBD URI; write a file name with a '=' as ./a=b.img"
    add("disks", metavar="[NAME=]DISK", nargs="+", help=disk)
    where = serve.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="serve on a Unix socket")
    where.add_argument("--address", metavar="HOST", help="listen there (default: 127.0.0.1)")
    add("--port", type=whole(1, PORT_MAX), metavar="N", help="TCP port (default: 10809)")
    add("--tls", choices=("off", "on", "require"), help="default: require with keys, else off")
    add("--tls-certificates", metavar="DIR", help="X.509 certificates and the server's key")
    add("--tls-psk", metavar="FILE", help="pre-shared keys")
    add("--tls-verify-peer", action="store_true", help="require a certificate from guests")
    text = "repeat attempts to connect to disks' NBD servers for S seconds (default: 0)"
    add("--open-timeout", type=whole(0, OPEN_TIMEOUT_S_MAX), metavar="S", help=text)
    text = "disconnect TCP guests that are silent for S seconds (default: 300; 0: never)"
    add("--keepalive", type=whole(0, KEEPALIVE_S_MAX), metavar="S", help=text)
    add("--read-only", action="store_true", help="refuse writes of guests")
    cli_parsers.add_point(serve)
    threads = f"requests of one connection at once (default: {THREADS_DEFAULT}; with --cache none "
    threads += f"{THREADS_DIRECT_DEFAULT}; with several disks and nbdkit before 1.34 1)"
    add("--threads", type=whole(1, THREADS_MAX), metavar="N", help=threads)
    add("--cache", choices=("writeback", "none"), default="writeback", help="none: O_DIRECT")
    connections = "most connections to an NBD server (default: 9)"
    add("--connections", type=whole(1, CONNECTIONS_MAX), metavar="N", help=connections)
    add("--state-dir", metavar="DIR", help="keep mirrors and bitmaps there across restarts")
    accept = "serve the old side of a pivot; the refusal shows the ID of that pivot"
    add("--accept-old-side", action="append", default=[], metavar="ID", help=accept)
    add("--mirror-to", metavar="URI", help="start to mirror the first disk at once")
    text = "json: each line of the log is a JSON object (default: plain)"
    add("--log-format", choices=("plain", "json"), default="plain", help=text)
    add("--daemonize", action="store_true", help="go into the background")
    add("--pidfile", metavar="PATH", help="write the process ID there")
    add("--user", metavar="NAME", help="run as this user once the disks are open (needs root)")
    add("--group", metavar="NAME", help="run as this group (default: the user's group)")


def _run(args: argparse.Namespace) -> int:
    if args.command in ("serve", "plugin-path"):
        from nbdmirror.cli import serve as cli_serve

        if args.command == "serve":
            return cli_serve.serve(args)
        print(cli_serve.plugin_path())
        return DONE
    if args.command == "copy-mode" and args.journal:
        args.journal = absolute_uri(args.journal, "--journal: ")
    if args.command == "handover":
        from nbdmirror.cli import handover as cli_handover

        args.target = absolute_uri(args.target)
        return cli_handover.run(args)
    if args.command == "list" or getattr(args, "all", False):
        from nbdmirror.cli import list as cli_list

        return cli_list.run(args)
    if args.command == "web":
        return _web(args)
    if args.command in ("apply", "points", "recover"):
        return _points(args)
    if args.command == "mirror":
        from nbdmirror.cli import mirror as cli_mirror

        cli_mirror.check(args)
    from nbdmirror.cli import control as cli_control

    return cli_control.run(args)


def _web(args: argparse.Namespace) -> int:
    with _needs("web", "pip install 'nbdmirror[web]'"):
        from nbdmirror.cli import web as cli_web
    return cli_web.run(args)


def _points(args: argparse.Namespace) -> int:
    if args.command == "points" and args.exec is not None:
        from nbdmirror.cli import snapshots

        return snapshots.run(args)
    with _needs(args.command, "install what docs/install.md names"):
        from nbdmirror.cli import apply as cli_apply
        from nbdmirror.cli import points as cli_points
    if args.command == "apply":
        return cli_apply.run_command(args)
    return cli_points.run_command(args)


@contextmanager
def _needs(command: str, advice: str) -> Iterator[None]:
    """Imports inside may need packages that other commands do not. Raises CliError."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "nbdmirror":
            raise
        text = f"{command}: the Python package {package} is not installed: {advice}"
        raise CliError(text) from error


def _check_texts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse empty values, which mostly come from unset shell variables, and values that nbdkit
    cannot pass to its Python, or that would break a log line."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if text == "":
                parser.error(f"{_called(name)}: is empty")
            if name == "exec":
                continue  # for the shell, which reads any text
            if isinstance(text, str) and re.search("[\0-\x1f\x7f\ud800-\udfff]", text):
                what = f"{text!r} has control characters, or is not UTF-8"
                help_ = "; use a symbolic link to the file" if name not in ("point", "name") else ""
                parser.error(f"{_called(name)}: {what}{help_}")


def _called(name: str) -> str:
    """The name of an argument as the user types it."""
    option = f"--{name.replace('_', '-')}"
    words = {"disks": "DISK", "names": "NAME", "sockets": "SOCKET"}
    words |= dict.fromkeys(("target", "targets"), "TARGET_URI")
    words["journal_uri"] = "JOURNAL"
    return words.get(name, option)


def _parse(argv: list[str]) -> argparse.Namespace:
    extra: list[str] = []
    if argv[:1] == ["serve"] and "--" in argv:
        cut = argv.index("--")
        argv, extra = argv[:cut], argv[cut + 1 :]
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "mirror" and not any(word.startswith("-") for word in rest):
        args.targets += rest  # of several, each may have its journal behind it
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for option in ("timeout", "json") if args.command == "mirror" and not args.wait else ():
        if getattr(args, option) not in (None, False):
            parser.error(f"--{option}: needs --wait")
    if args.command == "status" and args.all and args.qmp:
        parser.error("--all: not allowed with argument --qmp")
    if args.command == "points":
        cli_parsers.check_points(args, parser.error)
    _check_texts(parser, args)
    args.nbdkit_args = extra
    return args


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Usage errors and --help raise SystemExit."""
    args = argparse.Namespace(command="")
    try:
        open_streams()
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        status = _run(args)
    except SystemExit as left:
        left.code = finish(int(left.code or 0), failed=FAILED)
        raise
    except CliError as error:
        if args.command == "serve":  # may be a service
            from nbdmirror.logs import print_startup_error

            print_startup_error(str(error))
        else:
            say(f"nbdmirror: {error}")
        status = error.status
    except KeyboardInterrupt:
        is_endless = args.command in ("events", "web") or getattr(args, "watch", False)
        status = DONE if is_endless else INTERRUPTED
        if not is_endless:
            say("nbdmirror: interrupted; nothing was undone")
    except (MemoryError, RuntimeError, ImportError) as error:
        if not (text := limit_of(error)):
            raise
        say(f"nbdmirror: {text}")
        status = FAILED
    except OSError as error:
        if finish(DONE, failed=FAILED) == DONE and not isinstance(error, BrokenPipeError):
            is_homeless = isinstance(error, FileNotFoundError) and error.filename is None
            gone = "the current directory does not exist any more: write absolute paths"
            text = gone if is_homeless else limit_of(error) or output_error(error)
            say(f"nbdmirror: {text}")
        status = FAILED
    is_answer = args.command in _ANSWERS and getattr(args, "exec", None) is None
    return finish(status, failed=FAILED if is_answer else None)
