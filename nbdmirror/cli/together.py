"""Commands about several jobs at once, such as the jobs of a group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from nbdmirror.cli.common import CliError
from nbdmirror.cli.session import Session
from nbdmirror.cli.streams import say

Sessions = Mapping[str, Session]
Follow = Callable[[Session, str], Awaitable[int]]


def apart(session: Session, names: Sequence[str]) -> Sessions:
    """The conversation, for the job of each of `names` with the events from now on."""
    if len(names) == 1:
        return {names[0]: session}
    session.events.ignore_all()
    return {name: session.beside() for name in names}


async def each(sessions: Sessions, follow: Follow) -> int:
    """Follow all at the same time. Returns the exit status: of several the greatest. Of several
    each error is told when it comes; that of one is raised."""
    if len(sessions) == 1:
        ((name, session),) = sessions.items()
        return await follow(session, name)

    async def tell_errors(session: Session, name: str) -> int:
        try:
            return await follow(session, name)
        except CliError as error:
            say(f"nbdmirror: {error}")
            return error.status

    return max(await asyncio.gather(*(tell_errors(one, name) for name, one in sessions.items())))
