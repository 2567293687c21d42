"""`nbdmirror serve`: checks the arguments, then becomes nbdkit with the plugin.

`serve_command` depends only on its arguments and environment; `serve` does the rest.
"""

from __future__ import annotations

import argparse
import grp
import itertools
import logging
import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from nbdmirror.cli.common import (
    THREADS_DEFAULT,
    THREADS_DIRECT_DEFAULT,
    USAGE,
    CliError,
    absolute_uri,
    default_qmp_paths,
)
from nbdmirror.cli.places import (
    check_directory,
    check_disk,
    check_journal,
    check_port,
    make_for_user,
    may,
    warn_of_target,
)
from nbdmirror.errors import ConfigError
from nbdmirror.identity import Same, same_place
from nbdmirror.limits import whole_number
from nbdmirror.logs import print_startup_error, use_format
from nbdmirror.names import name_disk
from nbdmirror.nbd_uri import DEFAULT_PORT, is_uri
from nbdmirror.paths import absolute_path
from nbdmirror.process_limits import environment as limits_environment
from nbdmirror.process_limits import limit_in, text_of, too_little

PACKAGE = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
"""Not "localhost": if that names ::1 too and IPv6 is off, nbdkit refuses to start."""
DUMP_PLUGIN_S_MAX = 30

ID_MAX = 2**32 - 2
"""Largest ID of a user or a group: the next number means "no change" (chown(2))."""

ORDERLY_NBDKIT = (1, 34)
"""Before this version an assertion fails, and the process ends, when a guest hangs up while replies
of several threads wait for it: 28 of 30 guests that were killed with 16 reads of 64 KiB in flight
ended the server. With one thread for each connection none did. So several disks, which belong to
several guests, are served with one thread: the end of one guest must not cost another its disk."""

_PLUGIN_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*=")


def serve(args: argparse.Namespace) -> int:
    """Serve. Without an error this does not return, since the process becomes nbdkit. With
    --daemonize it returns when the server serves."""
    use_format(args.log_format)
    argv, env = serve_command(args)
    if text := too_little():
        raise CliError(text)
    try:
        if _check_nbdkit(env) < ORDERLY_NBDKIT and len(args.disks) > 1 and args.threads is None:
            args.threads = 1
            argv, env = serve_command(args)
        _check_tls(args)
        _check_places(args)
    except ConfigError as error:
        raise CliError(text_of(error)) from error
    sys.stdout.flush()
    if args.daemonize:
        from nbdmirror.cli import daemon as cli_daemon

        return cli_daemon.run(argv, env)
    os.execvpe(argv[0], argv, env)


def plugin_path() -> str:
    """The path of the nbdkit script: beside the package in a checkout, inside an installed
    package."""
    for folder in (PACKAGE.parent / "plugin", PACKAGE / "_plugin"):
        if (folder / "nbdmirror-plugin.py").exists():
            return str(folder / "nbdmirror-plugin.py")
    raise CliError("the plugin nbdmirror-plugin.py is missing: install nbdmirror again")


def serve_command(
    args: argparse.Namespace, environ: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """nbdkit's arguments and environment. Raises CliError. Reads only the plugin and the names of
    users.

    Of the user's arguments after `--`, KEY=VALUE goes after the plugin (parameters of filters) and
    the rest before it.
    """
    argv = ["nbdkit", *_listen_options(args), *_tls_options(args)]
    argv.append("--log=stderr" if args.daemonize else "-f")  # goes through nbdmirror's log
    threads = THREADS_DIRECT_DEFAULT if args.cache == "none" else THREADS_DEFAULT
    argv += ["-t", str(args.threads or threads)]
    if args.pidfile:
        argv += ["-P", absolute_path(args.pidfile)]
    if args.read_only:
        argv.append("-r")
    argv += _identity_options(args)
    parameters = [extra for extra in args.nbdkit_args if _PLUGIN_PARAMETER.match(extra)]
    argv += [extra for extra in args.nbdkit_args if extra not in parameters]
    files = [f"file={name}={disk}" if name else f"file={disk}" for name, disk in _disks(args)]
    # First: errors of later parameters have this format.
    form = [] if args.log_format == "plain" else [f"log-format={args.log_format}"]
    argv += ["python", plugin_path(), *form, *files]
    argv.append(f"qmp={_qmp_path(args)}")
    if args.cache != "writeback":
        argv.append(f"cache={args.cache}")
    if args.state_dir:
        argv.append(f"state-dir={absolute_path(args.state_dir)}")
    if args.pidfile:
        argv.append(f"pidfile={absolute_path(args.pidfile)}")
    if args.open_timeout:
        argv.append(f"open-timeout={args.open_timeout}")
    if args.keepalive is not None:
        argv.append(f"keepalive={args.keepalive}")
    if args.connections is not None:
        argv.append(f"connections={args.connections}")
    argv += [f"accept-old-side={record}" for record in args.accept_old_side]
    if args.mirror_to:
        argv.append(f"mirror-to={absolute_uri(args.mirror_to, '--mirror-to ')}")
    argv += _read_only_parameters(args)
    environ = os.environ if environ is None else environ
    # nbdkit's interpreter uses the first python3 in PATH as its home: that must be this one.
    path = os.pathsep.join([os.path.dirname(sys.executable), environ.get("PATH", os.defpath)])
    ours = {"PATH": path, "PYTHONPATH": _python_path(environ)}
    # In a script with LC_ALL=C that interpreter could not open a file called disk-ü.img: unlike
    # python3, it takes the locale's encoding for that of names. nbdkit hands it UTF-8.
    return argv + parameters, {**limits_environment(), **environ, **ours, "LC_ALL": "C.UTF-8"}


def _read_only_parameters(args: argparse.Namespace) -> list[str]:
    """The plugin's parameters for a disk that does not change, and for a point of a journal."""
    # nbdkit's -r is for guests, this is for opening the disks.
    read_only = ["read-only=true"] if args.read_only else []
    if not args.journal:
        if args.point:
            raise CliError("--point: needs --journal", USAGE)
        return read_only
    if len(args.disks) > 1:
        raise CliError("--journal: belongs to one disk, and more are served", USAGE)
    journal = args.journal
    journal = absolute_uri(journal, "--journal: ") if is_uri(journal) else absolute_path(journal)
    if args.state_dir:
        raise CliError("--journal: not allowed with --state-dir: a point has no state", USAGE)
    return [*read_only, f"journal={journal}", *([f"point={args.point}"] if args.point else [])]


def _listen_options(args: argparse.Namespace) -> list[str]:
    if args.socket:
        if args.port is not None:
            raise CliError("--port: not allowed with --socket", USAGE)
        return ["-U", absolute_path(args.socket)]
    port = DEFAULT_PORT if args.port is None else args.port
    return ["-i", _address(args), "-p", str(port)]


def _address(args: argparse.Namespace) -> str:
    """The address; an IPv6 address may be in brackets, as in a URI."""
    address = LOOPBACK if args.address is None else str(args.address)
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    if not address:
        text = "--address: is empty; to listen on all addresses use 0.0.0.0 (IPv4) or :: (IPv6)"
        raise CliError(text, USAGE)
    return address


def _identity_options(args: argparse.Namespace) -> list[str]:
    uid, gid = _identity(args)
    user = [] if uid is None else ["-u", str(uid)]
    return user if gid is None else [*user, "-g", str(gid)]


def _identity(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """The user and group to become. A user comes with a group: nbdkit's -u alone keeps root's."""
    if args.user is None and args.group is None:
        return None, None
    if os.geteuid() != 0:
        raise CliError("--user and --group: only root can run as another user", USAGE)
    uid = _id(args.user, "user", lambda name: pwd.getpwnam(name).pw_uid)
    gid = _id(args.group, "group", lambda name: grp.getgrnam(name).gr_gid)
    if uid is not None and gid is None:
        try:
            gid = pwd.getpwuid(uid).pw_gid
        except KeyError:
            text = f"--user {args.user}: this user has no group: name one with --group"
            raise CliError(text, USAGE) from None
    return uid, gid


def _id(text: str | None, kind: str, look_up: Callable[[str], int]) -> int | None:
    if text is None:
        return None
    try:
        return look_up(text)
    except KeyError:
        number = whole_number(text, 0, ID_MAX)
    if number is None:
        raise CliError(f"--{kind} {text}: no such {kind} on this host", USAGE)
    return number


def _tls_options(args: argparse.Namespace) -> list[str]:
    """nbdkit's TLS options. With keys TLS is required by default; nbdkit alone would allow plain
    text."""
    options: list[str] = []
    if mode := args.tls or ("require" if args.tls_certificates or args.tls_psk else None):
        options.append(f"--tls={mode}")
    if args.tls_certificates:
        options.append(f"--tls-certificates={absolute_path(args.tls_certificates)}")
    if args.tls_psk:
        options.append(f"--tls-psk={absolute_path(args.tls_psk)}")
    if args.tls_verify_peer:
        options.append("--tls-verify-peer")
    return options


def _check_tls(args: argparse.Namespace) -> None:
    """Refuse keys that nbdkit cannot use: with --tls=on it would continue in plain text."""
    if args.tls_certificates and args.tls_psk:
        raise CliError("--tls-psk: not allowed with --tls-certificates", USAGE)
    if args.tls in ("on", "require") and not (args.tls_certificates or args.tls_psk):
        raise CliError(f"--tls {args.tls} needs --tls-certificates or --tls-psk", USAGE)
    if args.tls_verify_peer and not args.tls_certificates:
        raise CliError("--tls-verify-peer needs --tls-certificates", USAGE)
    for option, path in (("certificates", args.tls_certificates), ("psk", args.tls_psk)):
        if path and args.tls != "off":
            from nbdmirror.nbdclient import tls  # and with it ssl, which only keys need

            try:
                found = tls.check_server_keys(**{option: absolute_path(path)})
            except ConfigError as error:
                raise ConfigError(f"--tls-{option}: {error}") from error
            for warning in found:
                print_startup_error(f"warning: {warning}", logging.WARNING)


def _disks(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(name or "", absolute path or URI) of each disk; names are unique, including defaults."""
    found: list[tuple[str, str]] = []
    names: set[str] = set()
    for index, text in enumerate(args.disks):
        try:
            name, disk = name_disk(text, index)
        except ConfigError as error:
            raise CliError(str(error), USAGE) from error
        if name in names:
            raise CliError(f"{text}: the name {name} is taken; give each disk its own NAME=")
        names.add(name)
        given = "" if disk == text else name
        found.append((given, absolute_uri(disk) if is_uri(disk) else absolute_path(disk)))
    return found


def _qmp_path(args: argparse.Namespace) -> str:
    path = args.qmp or os.environ.get("NBDMIRROR_QMP") or default_qmp_paths()[0]
    return absolute_path(path)


def _python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH for nbdkit's interpreter, which does not know this virtual environment."""
    ours = [str(PACKAGE.parent), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    users = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join(dict.fromkeys([*ours, *users]))


def _check_nbdkit(env: Mapping[str, str]) -> tuple[int, ...]:
    """nbdkit's version. Raises ConfigError if nbdkit is missing, or for another Python."""
    nbdkit = shutil.which("nbdkit", path=env.get("PATH"))
    if not nbdkit:
        raise ConfigError(
            "nbdkit is not installed (packages: nbdkit and nbdkit-plugin-python, on Fedora"
            " nbdkit and nbdkit-python-plugin)"
        )
    try:
        dump = subprocess.run(
            [nbdkit, "python", "--dump-plugin"],
            env=dict(env),
            capture_output=True,
            text=True,
            timeout=DUMP_PLUGIN_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"nbdkit python --dump-plugin did not end: {error}") from error
    if dump.returncode:
        if text := limit_in(dump.stderr):
            raise ConfigError(f"nbdkit cannot be started: {text}")
        raise ConfigError(
            "nbdkit's Python plugin is missing or broken (package nbdkit-plugin-python, on Fedora"
            " nbdkit-python-plugin); see: nbdkit python --dump-plugin"
        )
    match = re.search(r"^python_version=(\d+\.\d+)", dump.stdout, re.MULTILINE)
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if match and match.group(1) != running:
        raise ConfigError(
            f"nbdkit's Python is {match.group(1)}, this one is {running}: install nbdmirror for"
            f" Python {match.group(1)} (/usr/bin/python3 -m venv --system-site-packages DIR)"
        )
    version = re.search(r"^version=(\d+)\.(\d+)", dump.stdout, re.MULTILINE)
    return tuple(int(number) for number in version.groups()) if version else ORDERLY_NBDKIT


def _check_places(args: argparse.Namespace) -> None:
    from nbdmirror.unix_sockets import check_pidfile, check_socket

    for _, disk in _disks(args):
        if not is_uri(disk):
            check_disk(disk)
    if args.journal and not is_uri(args.journal):
        check_journal(args.journal)
    places = {"--qmp": _qmp_path(args)}
    for option, place in (("--socket", args.socket), ("--pidfile", args.pidfile)):
        if place:
            places[option] = absolute_path(place)
    for (one, path), (other, second) in itertools.combinations(places.items(), 2):
        if same_place(path, second) is Same.YES:
            raise ConfigError(f"{other} and {one} are the same path: {path}")
    pidfile = places.pop("--pidfile", None)
    for parameter, path in places.items():
        if not os.path.isdir(os.path.dirname(path)):
            raise ConfigError(f"{parameter}: {path}: its directory does not exist")
        if len(os.fsencode(path)) > 107:
            raise ConfigError(f"{parameter}: {path}: is longer than a Unix socket's 107 bytes")
        check_socket(path, parameter, remove=parameter == "--socket")  # nbdkit would refuse it
        check_directory(parameter, path)
    _check_places_of_user(args)
    if not args.socket:
        check_port(_address(args), args.port or DEFAULT_PORT)
    if args.mirror_to and args.daemonize:
        warn_of_target(absolute_uri(args.mirror_to, "--mirror-to "))
    if pidfile:
        check_pidfile(pidfile, "--pidfile")
        if not os.path.exists(pidfile):
            check_directory("--pidfile", pidfile)
    uid, gid = _identity(args)
    if args.state_dir and uid is not None and gid is not None:
        make_for_user("--state-dir", absolute_path(args.state_dir), uid, gid)


def _check_places_of_user(args: argparse.Namespace) -> None:
    """Check the files that nbdkit reads and writes after it has changed its user. In the background
    no user sees such errors, and some modules are imported late."""
    uid, gid = _identity(args)
    if uid is None or gid is None:
        return
    if not may("-r", str(PACKAGE), uid, gid):
        raise ConfigError(
            f"--user: user {args.user} cannot read {PACKAGE}, where nbdmirror is installed"
        )
    if args.state_dir:
        path = absolute_path(args.state_dir)
        is_there, folder = os.path.exists(path), os.path.dirname(path)
        may_use = may("-w", path, uid, gid) if is_there else may("-x", folder, uid, gid)
        if not may_use and os.path.isdir(folder):
            raise ConfigError(f"--state-dir: {path}: user {args.user} cannot write there")
    if args.pidfile:
        path = absolute_path(args.pidfile)
        if not may("-w", path if os.path.exists(path) else os.path.dirname(path), uid, gid):
            raise ConfigError(f"--pidfile: {path}: user {args.user} cannot write there")
