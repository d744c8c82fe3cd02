"""The running coordinator's side of the exchange of heads: what a site is told, and what it offers in return."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.log_heads import AnchorNews, HeadOffer
from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope
from server.layout import ServerLayout
from server.log_anchor.act_log import CoordinatorLog
from server.log_anchor.anchors import AnchorBook, AnchorRefusedError


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class HeadDesk:
    """Tells sites what is anchored of them and takes their newer heads. Heads that are anchored cost a glance."""

    def __init__(self, layout: ServerLayout, say: Callable[[str], None] = _to_stderr) -> None:
        self._book, self._log = AnchorBook(layout), CoordinatorLog(layout)
        self._say = say
        self._taken: dict[str, Envelope] = {}
        self._expected: set[str] = set()

    def news(self, site: str) -> AnchorNews | None:
        """What a site is told with a question; None where this coordinator's own log cannot be used."""
        self._expected.discard(site)
        try:
            last = self._book.last(site)
            if last is not None:
                self._expected.add(site)
            return AnchorNews(
                log_key=self._log.verify_key.to_pem().decode("ascii"),
                anchored=last.head.tree_size if last else 0,
                receipt=self._book.receipt(site),
            )
        except (PixcellError, OSError) as error:
            self._say(f"heads are not exchanged with {site}: {error}")
            return None

    def take(self, site: str, offer: str) -> None:
        """Anchor the head a site offered with its answer; nothing where it never offered one, or offers the same.

        Raises:
            AnchorRefusedError: the site's log does not follow the anchored one, or it offers no head any more. Other
                troubles are said, not raised: they are this coordinator's own, or will be gone at the next question.
        """
        if not offer:
            if site in self._expected:
                raise AnchorRefusedError(
                    f"{site} offers no head of its log any more.",
                    hint="The site runs `pixcell log verify SITE/log`: the log is damaged, or gone.",
                    code="log-not-offered",
                )
            return
        try:
            envelope = Envelope.from_bytes(offer.encode("ascii"), name="the offered head")
            found = parse_document(HeadOffer, envelope.unsafe_unverified_payload(), name="the offered head")
            if found.party == site and self._taken.get(site) != found.head:
                self._book.anchor(envelope)
                self._taken[site] = found.head
        except AnchorRefusedError as error:
            if error.code == "log-offer-gap":
                return
            raise
        except (PixcellError, OSError, UnicodeEncodeError) as error:
            self._say(f"the head of {site} was not anchored: {error}")
