"""The command line: arguments, exit statuses and one-line errors.

Parsing imports only argparse. The modules of a command (qemu.qmp takes 95 ms) are imported when the
command runs: serve.py for the server, control.py for nearly all commands over QMP.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

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
from nbdmirror.limits import (
    CONNECTIONS_MAX,
    KEEPALIVE_S_MAX,
    OPEN_TIMEOUT_S_MAX,
    PORT_MAX,
    RECONNECT_DELAY_S_MAX,
    TARGET_TIMEOUT_S_MAX,
    THREADS_MAX,
    whole_number,
)

_EPILOG = """\
exit status: 0 done; 1 the job failed or was cancelled, or the command was refused; 2 usage;
3 no server found; 4 timed out; 130 interrupted (jobs continue).
The server is named by --qmp or NBDMIRROR_QMP. Sizes take K, M, G, T (powers of 1024)."""
_ANSWERS = ("status", "explain", "list", "points", "events", "plugin-path")
"""Commands whose only purpose is their output."""
_POLICIES = ("report", "ignore", "enospc", "stop", "auto")
_SYNC_MODES = ("full", "top", "none", "incremental", "bitmap")
SLOW_BYTES_PER_S = 64 << 10


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say(f"nbdmirror: {message} (see: {self.prog} --help)")
        sys.exit(USAGE)


def parse_size(text: str) -> int:
    """A size in bytes: a number with an optional K, M, G or T, powers of 1024. KB and the like are
    refused, since some people read them as powers of 1000."""
    match = re.fullmatch(
        r"([0-9]+)(?:\.([0-9]+))?([KMGT]?)(?:(?<=[KMGTkmgt])iB)?", text, re.IGNORECASE
    )
    if not match:
        text = f"{text!r} is not a size (examples: 65536, 64K, 1.5G, 10MiB, 2T; powers of 1024)"
        raise argparse.ArgumentTypeError(text)
    whole, part, unit = match.groups(default="")
    scale: int = 1024 ** " KMGT".index(unit.upper() or " ")
    size, rest = divmod(int(whole + part) * scale, int("1" + "0" * len(part)))
    if rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes")
    if size >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 8 EiB")
    return size


def _rate(text: str) -> int:
    """Bytes per second; a rate that is implausibly low gets a warning."""
    rate = parse_size(text)
    if 0 < rate < SLOW_BYTES_PER_S:
        word = f"{text} means {rate} bytes per second; 1M is one MiB per second"
        say(f"nbdmirror: warning: {word}")
    return rate


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,9})?", text):
        text = f"{text!r} is not a number of seconds (0 or more; examples: 30, 0.5)"
        raise argparse.ArgumentTypeError(text)
    return float(text)


def _number(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if (number := whole_number(text, least, most)) is None:
            text = f"{text!r} is not a whole number from {least} to {most}"
            raise argparse.ArgumentTypeError(text)
        return number

    return parse


def _migration_uri(text: str) -> str:
    kind, colon, where = text.partition(":")
    if not (re.fullmatch("[a-z]+", kind) and colon and where):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address (example: tcp:HOST:4444)")
    address = where.partition(",")[0]
    port = address.rpartition(":")[2]
    if kind == "tcp" and whole_number(port, 1, PORT_MAX) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: the port is not a number from 1 to {PORT_MAX}")
    return f"{kind}:{os.path.abspath(where)}" if kind in ("unix", "file") else text


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
    _add_mirror(add("mirror", "start to mirror a disk to an NBD target"))
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
        _add_timeout(command)
    speed = add("set-speed", "limit the copying of a job")
    speed.add_argument("rate", type=_rate, metavar="RATE", help="bytes per second; 0: no limit")
    pause, resume = add("pause", "pause a job"), add("resume", "resume a paused job")
    more = cli_parsers.add_commands(add, parse_size=parse_size, add_timeout=_add_timeout)
    for command in (wait, complete, cancel, pause, resume, speed, *more):
        which = command.add_mutually_exclusive_group()
        disk = "choose the job of this disk"
        which.add_argument("--device", metavar="NAME", help=disk)
        which.add_argument("--job", metavar="ID", help="the job (default: the only one)")


def _add_timeout(command: argparse.ArgumentParser) -> None:
    text = "stop waiting after S seconds; the job continues (default: no limit)"
    command.add_argument("--timeout", type=_seconds, metavar="S", help=text)


def _add_mirror(mirror: argparse.ArgumentParser) -> None:
    add = mirror.add_argument
    add("target", metavar="TARGET_URI", help="NBD URI of the target, of the disk's size")
    add("--device", metavar="NAME", help="the disk to mirror (default: the only one)")
    add("--sync", choices=_SYNC_MODES, default="full", help="what to copy (default: %(default)s)")
    mode = "write-blocking: the guest's writes wait for the target (default: background)"
    add("--copy-mode", choices=cli_parsers.COPY_MODES, help=mode)
    cli_parsers.add_points_of_mirror(add)
    add("--granularity", type=parse_size, metavar="SIZE", help="unit of the dirty bitmap")
    add("--buf-size", type=parse_size, metavar="SIZE", help="bytes in flight at most")
    add("--speed", type=_rate, metavar="RATE", help="bytes per second; 0: no limit")
    text = "seconds for the target's server to answer, at each connect (default: 10)"
    add("--open-timeout", type=_number(1, TARGET_TIMEOUT_S_MAX), metavar="S", help=text)
    delay = "seconds to wait for a lost target before an error is reported"
    add("--reconnect-delay", type=_number(0, RECONNECT_DELAY_S_MAX), metavar="S", help=delay)
    for side in ("source", "target"):
        policy = f"what to do if the {side} fails (default: report, which ends the job)"
        add(f"--on-{side}-error", choices=_POLICIES, help=policy)
    add("--bitmap", metavar="NAME", help="for --sync bitmap or incremental")
    cluster = "cluster size of a target whose backing file is attached later"
    add("--target-cluster-size", type=parse_size, metavar="SIZE", help=cluster)
    add("--no-unmap", action="store_true", help="write zeroes rather than trim the target")
    zero = "assume that the target reads as zeroes (not checked)"
    add("--target-is-zero", action="store_true", help=zero)
    larger = "allow a larger target; what lies past the disk's end is not written"
    add("--allow-larger-target", action="store_true", help=larger)
    add("--job", metavar="ID", help="a name for the job (default: the disk's)")
    cli_parsers.add_promises(add)
    wait = "wait until then; completed: complete the job when it is ready"
    add("--wait", choices=("ready", "completed"), help=wait)
    add("--json", action="store_true", help="with --wait: print JSON lines")
    _add_timeout(mirror)


def _add_handover(handover: argparse.ArgumentParser) -> None:
    add = handover.add_argument
    add("target", metavar="TARGET_URI", help="NBD URI of the disk at the other host")
    add("--qemu", metavar="PATH", required=True, help="QMP socket of the QEMU that runs the guest")
    add(
        "--to",
        type=_migration_uri,
        metavar="URI",
        required=True,
        help="where a QEMU waits for the guest, as for QEMU's migrate: tcp:HOST:PORT",
    )
    add("--device", metavar="NAME", help="the guest's disk (default: the only one)")
    text = "undo the handover if the guest is not stopped for the pivot after S seconds"
    add("--timeout", type=_seconds, metavar="S", help=text)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.usage = "nbdmirror serve DISK|NAME=DISK ... [options] [-- NBDKIT ARGS]"
    add = serve.add_argument
    disk = "raw file, block device or NBD URI; write a file name with a '=' as ./a=b.img"
    add("disks", metavar="[NAME=]DISK", nargs="+", help=disk)
    where = serve.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="serve on a Unix socket")
    where.add_argument("--address", metavar="HOST", help="listen there (default: 127.0.0.1)")
    add("--port", type=_number(1, PORT_MAX), metavar="N", help="TCP port (default: 10809)")
    add("--tls", choices=("off", "on", "require"), help="default: require with keys, else off")
    add("--tls-certificates", metavar="DIR", help="X.509 certificates and the server's key")
    add("--tls-psk", metavar="FILE", help="pre-shared keys")
    add("--tls-verify-peer", action="store_true", help="require a certificate from guests")
    text = "repeat attempts to connect to disks' NBD servers for S seconds (default: 0)"
    add("--open-timeout", type=_number(0, OPEN_TIMEOUT_S_MAX), metavar="S", help=text)
    text = "disconnect TCP guests that are silent for S seconds (default: 300; 0: never)"
    add("--keepalive", type=_number(0, KEEPALIVE_S_MAX), metavar="S", help=text)
    add("--read-only", action="store_true", help="refuse writes of guests")
    cli_parsers.add_point(serve)
    threads = f"requests of one connection at once (default: {THREADS_DEFAULT}; with --cache none "
    threads += f"{THREADS_DIRECT_DEFAULT}; with several disks and nbdkit before 1.34 1)"
    add("--threads", type=_number(1, THREADS_MAX), metavar="N", help=threads)
    add("--cache", choices=("writeback", "none"), default="writeback", help="none: O_DIRECT")
    connections = "most connections to an NBD server (default: 9)"
    add("--connections", type=_number(1, CONNECTIONS_MAX), metavar="N", help=connections)
    add("--state-dir", metavar="DIR", help="keep mirrors and bitmaps there across restarts")
    accept = "serve the old side of a pivot; the refusal shows the ID of that pivot"
    add("--accept-old-side", action="append", default=[], metavar="ID", help=accept)
    add("--mirror-to", metavar="URI", help="start to mirror at once (one disk only)")
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
    if hasattr(args, "target"):
        args.target = absolute_uri(args.target)
    if args.command in ("mirror", "copy-mode") and args.journal:
        args.journal = absolute_uri(args.journal, "--journal: ")
    if args.command == "handover":
        from nbdmirror.cli import handover as cli_handover

        return cli_handover.run(args)
    if args.command == "list" or getattr(args, "all", False):
        from nbdmirror.cli import list as cli_list

        return cli_list.run(args)
    if args.command == "web":
        return _web(args)
    if args.command in ("points", "recover"):
        return _points(args)
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
        from nbdmirror.cli import points as cli_points
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
    words = {"disks": "DISK", "target": "TARGET_URI", "names": "NAME", "sockets": "SOCKET"}
    words["journal_uri"] = "JOURNAL"
    return words.get(name, option)


def _parse(argv: list[str]) -> argparse.Namespace:
    extra: list[str] = []
    if argv[:1] == ["serve"] and "--" in argv:
        cut = argv.index("--")
        argv, extra = argv[:cut], argv[cut + 1 :]
    parser = build_parser()
    args = parser.parse_args(argv)
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
    except OSError as error:
        if finish(DONE, failed=FAILED) == DONE and not isinstance(error, BrokenPipeError):
            is_homeless = isinstance(error, FileNotFoundError) and error.filename is None
            gone = "the current directory does not exist any more: write absolute paths"
            say(f"nbdmirror: {gone if is_homeless else output_error(error)}")
        status = FAILED
    is_answer = args.command in _ANSWERS and getattr(args, "exec", None) is None
    return finish(status, failed=FAILED if is_answer else None)
