"""A service that takes the ``aws-chunked`` encoding of a body for the body: what it keeps is longer than what was sent.

Some do, with the checksums that an SDK sends as a trailer. The store sends none that way; here the service does it all the same, once or
from some request on, and says so by its ``ETag``, or says nothing that could be compared. It is noticed: nothing is acknowledged that is
not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

import evidence
import pytest
from botocore.exceptions import ClientError
from faulty_http import Answer, Exchange, FaultyProxy, Request, answer
from s3_rig import Service
from test_every_request import no_waiting  # noqa: F401  # a fixture
from wire_life import OPERATIONS, Operation, Side, World, judge, prepare, requests_of

from ckptstore import Store
from ckptstore.errors import CkptStoreError, StoreWarning

pytest_plugins = ("s3_fixtures",)

CHANGING = [name for name in OPERATIONS if name not in ("load", "open", "verify")]


@pytest.fixture
def side(server: Service) -> Iterator[Side]:
    with FaultyProxy(server.server.endpoint_url) as proxy:
        yield Side(proxy, server.url, server.server.endpoint_url)


def is_put(request: Request) -> bool:
    return request.method == "PUT"


@dataclass
class Framing:
    """What becomes of a PUT: its body is stored with the framing around it."""

    client: Any
    """Signs again, as the signature was for the body as it should be."""
    told: bool
    """Whether the answer's ETag is that of what was stored, rather than of no meaning to a client, as with encryption."""

    def __call__(self, x: Exchange) -> None:
        place, _, query = x.request.path.partition("?")
        bucket, _, key = unquote(place[1:]).partition("/")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(x.request.body), x.request.body)
        given = {"Bucket": bucket, "Key": key, "Body": body}
        about = parse_qs(query)
        try:
            if "uploadId" in about:
                number = int(about["partNumber"][0])
                done = self.client.upload_part(**given, UploadId=about["uploadId"][0], PartNumber=number)
            else:
                conditional = any(name.lower() == "if-none-match" for name, _ in x.request.headers)
                done = self.client.put_object(**given, **({"IfNoneMatch": "*"} if conditional else {}))
        except ClientError:
            answer(412, "PreconditionFailed")(x)
        else:
            named = self.told or "uploadId" in about  # the completion has to name a part as it is
            x.reply(Answer(200, [("ETag", done["ETag"] if named else '"of-no-meaning"')]))


def strike(world: World, operation: Operation, nth: int, framing: Framing, *, on: bool) -> tuple[bool, list[str]]:
    """Have the `nth` PUT of an operation stored with its framing, or (`on`) all from that one on. Return whether, and what is wrong."""
    prepare(world, operation)
    seen = 0

    def strikes(request: Request) -> bool:
        nonlocal seen
        seen += is_put(request)
        return is_put(request) and (seen >= nth if on else seen == nth)

    for _ in range(100 if on else 1):
        world.proxy.inject(framing, strikes)
    error: BaseException | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # a record that cannot be read is passed over; no checksum is answered
        try:
            operation.run(world)
        except Exception as exc:  # judged below
            error = exc
        world.settle()
        world.proxy.heal()
        found = list(judge(world, error))
        if isinstance(error, CkptStoreError) and "\n" not in str(error):
            found = found[1:]  # that there is an error is right
        with Store(world.url, acquire=False) as store:
            # Of records, only those that are not shrunk yet can be damaged: the one that was not acknowledged, or is not needed any more.
            found += [str(damage) for damage in store.verify() if damage.id]
        if error is not None:
            world.renew()
        world.overtake()  # the next job saves and collects
        world.renew()
    return seen >= nth, found


WAYS = [(on, told) for on in (False, True) for told in (True, False)]


def puts_of(world: World, name: str) -> int:
    return sum(map(is_put, requests_of(world, OPERATIONS[name])))


def test_framing_is_noticed(side: Side, server: Service) -> None:
    """A sample: every second PUT of some operations, in one of the ways, by turns."""
    points = 0
    with closing(World(side)) as world:
        for name in ("save large", "tag"):
            for nth in range(1, puts_of(world, name) + 1, 2):
                on, told = WAYS[points % len(WAYS)]
                assert strike(world, OPERATIONS[name], nth, Framing(server.client, told), on=on) == (True, []), (name, nth)
                points += 1
    assert points > 3


@pytest.mark.soak
@pytest.mark.parametrize(("on", "told"), WAYS)
@pytest.mark.parametrize("name", CHANGING)
def test_framing_is_noticed_at_every_request(side: Side, server: Service, name: str, on: bool, told: bool) -> None:
    violations = []
    with (
        evidence.experiment("S3: the framing of chunks is stored, at every request with data") as tally,
        closing(World(side)) as world,
    ):
        tally.points = puts_of(world, name)
        for nth in range(1, tally.points + 1):
            fired, wrong = strike(world, OPERATIONS[name], nth, Framing(server.client, told), on=on)
            tally.fired += fired
            if wrong:
                violations.append((name, nth, wrong))
                tally.violations += fired
    assert violations == []
    assert tally.fired == tally.points
