"""The coordinator remembers every site's ledger: one that was put back costs its site the round."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Message
from sqlalchemy import update

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.contracts.round import KnownHead, TrainReply, TrainRequest
from pixcell_core.errors import BadInputError
from pixcell_core.flower.messages import document_of, pack
from server.registry.opening import open_registry
from server.registry.tables import HeadRow
from server.rounds import exchange as exchange_module
from server.rounds.heads import HeadBook
from server.rounds.screening import screen
from tests.server.consortium import Consortium


def head(sequence: int, name: bytes = b"") -> KnownHead:
    return KnownHead(sequence=sequence, hash=digest(name + str(sequence).encode()))


def showing(
    consortium: Consortium, heads: dict[int, KnownHead | None], asked: list[KnownHead | None]
) -> None:
    """Let `east` show these heads, by round; note what it is asked with."""
    east = consortium.nodes["east"]

    def tamper(question: Message, reply: Message) -> list[Message]:
        if question.metadata.message_type == "train" and question.metadata.dst_node_id == east:
            request = parse_document(TrainRequest, document_of(question))
            asked.append(request.ledger_head)
            document = parse_document(TrainReply, document_of(reply))
            reply.content["control"] = pack(
                document.model_copy(update={"ledger_head": heads[request.round]})
            )["control"]
        return [reply]

    consortium.grid.tamper = tamper


def test_heads_are_kept_and_sent_back_with_the_next_round(consortium: Consortium) -> None:
    asked: list[KnownHead | None] = []
    showing(consortium, {1: head(3), 2: head(7), 3: head(11)}, asked)
    done = consortium.loop().run(consortium.start())
    assert done.record.included == ("east", "north", "west")
    assert asked == [None, head(3), head(7)]
    assert HeadBook(consortium.registry).last("east") == head(11)
    assert HeadBook(consortium.registry).last("north") is None


@pytest.mark.parametrize("shown", [head(2), head(3, b"another"), None])
def test_a_ledger_that_went_back_costs_its_site_the_round(
    consortium: Consortium, shown: KnownHead | None
) -> None:
    showing(consortium, {1: head(3), 2: shown, 3: head(9)}, [])
    consortium.loop().run(consortium.start())
    history = consortium.board().read().history  # type: ignore[union-attr]
    assert "east" in history[1].included
    assert [(e.site, e.code) for e in history[2].excluded] == [("east", "ledger-rewound")]
    assert {"north", "west"} <= set(history[2].included)


def test_without_the_comparison_the_same_ledger_would_count(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "screen", lambda message, expected, known: screen(message, expected))
    showing(consortium, {1: head(3), 2: head(2), 3: head(9)}, [])
    consortium.loop().run(consortium.start())
    history = consortium.board().read().history  # type: ignore[union-attr]
    assert "east" in history[2].included


def test_a_damaged_book_of_heads_stops_the_round(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    book = HeadBook(registry)
    book.note("east", head(5))
    with registry.write() as connection:
        connection.execute(update(HeadRow).values(document=b"{"))
    with pytest.raises(BadInputError) as caught:
        book.last("east")
    assert caught.value.code == "heads-broken"
