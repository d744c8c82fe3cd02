"""The agent's side of the exchange of heads: checks the coordinator's receipt for the last one, and offers the newest.

The key of the coordinator's log is kept at the first receipt, which came over the consortium's own TLS; from then on
another key, or a log that does not go on from the one this site was shown, stops the site from taking part.
"""

from __future__ import annotations

from pathlib import Path

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.log_heads import (
    COORDINATOR_KEY_FILE,
    MAX_PROOF_BYTES,
    RECEIPT_FILE,
    AnchorNews,
    AnchorReceipt,
)
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import KEY_FILE, verify_log
from pixcell_core.trust.log_proof import check_receipt, make_offer, open_head
from site_client.approvals.act_log import log_folder
from site_client.approvals.site_folder import SiteFolder


class LogExchange:
    """Heads of one site's log, and what it keeps of the coordinator's."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder, self._log = folder, log_folder(folder)

    def offer(self, news: AnchorNews | None) -> str:
        """The newest head, signed, in canonical text; empty where the coordinator anchors none or there is no log.

        Raises:
            RefusedError: `coordinator-log-forked`: the coordinator's log is not the one this site was shown.
        """
        if news is None or not (self._log / KEY_FILE).is_file():
            return ""
        if news.receipt is not None:
            self._take(news, news.receipt)
        try:
            envelope = make_offer(
                self._log,
                self._folder.identity().site,
                SigningKey.load(self._folder.approval_key),
                last=self._kept(),
                since=news.anchored,
            )
        except PixcellError:
            # A log that is empty or damaged: nothing can be offered truly, and the coordinator says that it misses it.
            return ""
        return envelope.to_bytes().decode("ascii")

    def _take(self, news: AnchorNews, receipt: AnchorReceipt) -> None:
        before = self._kept()
        if before == receipt:
            return
        key_file = self._log / COORDINATOR_KEY_FILE
        try:
            key = VerifyKey.from_pem(news.log_key.encode("ascii"), name="the coordinator's log key")
            if key_file.is_file() and key != VerifyKey.load(key_file):
                raise _forked("its log has another key than before")
            if before is not None and _is_older(receipt, before, key):
                return
            check_receipt(receipt, [key], before=before)
        except PixcellError as error:
            raise _forked(error.message) from error
        if receipt.party != self._folder.identity().site:
            raise _forked("the receipt is another party's")
        own = VerifyKey.load(self._log / KEY_FILE)
        try:
            verify_log(self._log, earlier_heads=[receipt.head])
        except PixcellError:
            # This site's own log lacks a head that it offered. The coordinator sees that too, at the next offer.
            return
        if own.key_id in receipt.head.key_ids:
            key.save(key_file)
            write_whole(self._log / RECEIPT_FILE, receipt.to_bytes())

    def _kept(self) -> AnchorReceipt | None:
        path: Path = self._log / RECEIPT_FILE
        return load_document(AnchorReceipt, path, MAX_PROOF_BYTES) if path.is_file() else None


def _is_older(receipt: AnchorReceipt, before: AnchorReceipt, key: VerifyKey) -> bool:
    """Whether a receipt tells of growth from before the one that is kept: the answer to an offer that was overtaken."""
    if receipt.grown is None:
        return False
    start, kept = open_head(receipt.grown.older, [key]), open_head(before.anchored.head, [key])
    return start.tree_size < kept.tree_size


def _forked(why: str) -> RefusedError:
    return RefusedError(
        f"The coordinator's log does not go on from the one this site was shown: {why}",
        hint="Take no part until the coordinator explains. Keep SITE/log/anchor.json: it is the evidence.",
        code="coordinator-log-forked",
    )
