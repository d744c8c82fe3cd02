"""Commands of the consortium: `pixcell init` and `pixcell kit …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.confirm import confirm
from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from server.enrolment.authority import Authority
    from server.enrolment.kit_state import KitShown
    from server.enrolment.kits import KitBook

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
CaDirOption = Annotated[
    Path | None, typer.Option("--ca-dir", help="Folder of the CA's key, where it is not DIR/pki.")
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="File (mode 600) with the passphrase of the CA's key."),
]
HostOption = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address under which sites reach the hub; repeatable."),
]
DaysOption = Annotated[int, typer.Option("--days", min=1, max=825, help="How long the kit is valid.")]
HubOption = Annotated[
    str | None, typer.Option("--hub", help="host:port of the hub, to be written into the kit.")
]
PartyArgument = Annotated[str, typer.Argument(help="The party's name.")]
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1"]


class KitList(BaseModel):
    """The latest kit of every party."""

    kits: list[Any]

    def __str__(self) -> str:
        return "\n".join(str(kit) for kit in self.kits) or "no party has a kit"


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    _register_init(root)
    kit = group(root, "kit")
    _register_signing(kit)
    _register_showing(kit)


def _register_init(root: typer.Typer) -> None:
    @root.command("init")
    @command
    def init(
        folder: DirOption,
        host: HostOption = None,
        ca_dir: CaDirOption = None,
        passphrase_file: PassphraseOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Any:
        """Make a consortium: certificate authority, server certificate, secrets."""
        from server.enrolment.pki import initialise
        from server.enrolment.sealed_key import read_passphrase
        from server.layout import ServerLayout

        return initialise(
            ServerLayout(folder.absolute()),
            [*(host or []), *LOOPBACK_NAMES],
            read_passphrase(passphrase_file, new=True),
            ca_dir=ca_dir.absolute() if ca_dir else None,
        )


def _register_signing(kit: typer.Typer) -> None:
    @kit.command("approve")
    @command
    def approve(
        request: Annotated[Path, typer.Argument(help="The request a party made with `pixcell site enroll`.")],
        folder: DirOption,
        fingerprint: Annotated[
            str | None, typer.Option("--fingerprint", help="The digits the party read over the phone.")
        ] = None,
        role: Annotated[str, typer.Option("--role", help="site, auditor or coordinator.")] = "site",
        days: DaysOption = 365,
        hub: HubOption = None,
        ca_dir: CaDirOption = None,
        passphrase_file: PassphraseOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Any:
        """Sign a party's kit after its fingerprint was read over the phone."""
        book = _book(folder)
        checked = _role(role)
        spoken = fingerprint if fingerprint is not None else _ask_fingerprint(request)
        authority = _open(folder, ca_dir, passphrase_file)
        return book.approve(request, spoken, checked, authority, days=days, hub=_hub(hub))

    @kit.command("renew")
    @command
    def renew(
        party: PartyArgument,
        folder: DirOption,
        days: DaysOption = 365,
        hub: HubOption = None,
        ca_dir: CaDirOption = None,
        passphrase_file: PassphraseOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Any:
        """Sign the next version of a party's kit, for the same keys."""
        book = _book(folder)
        book.kits(party)
        return book.renew(party, _open(folder, ca_dir, passphrase_file), days=days, hub=_hub(hub))

    @kit.command("revoke")
    @command
    def revoke(
        party: PartyArgument,
        folder: DirOption,
        reason: Annotated[str, typer.Option("--reason", help="Kept in the signed list.")] = "",
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
        ca_dir: CaDirOption = None,
        passphrase_file: PassphraseOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Any:
        """Take a party's certificates back. The hub refuses them within seconds; others are not touched."""
        book = _book(folder)
        book.kits(party)
        if not yes:
            confirm(f"Revoke every kit of {party}? It cannot be undone.", otherwise="nothing was signed")
        return book.revoke(party, _open(folder, ca_dir, passphrase_file), reason=reason)

    @kit.command("renew-hub")
    @command
    def renew_hub(
        folder: DirOption,
        host: HostOption = None,
        ca_dir: CaDirOption = None,
        passphrase_file: PassphraseOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Any:
        """Make a new server certificate for the hub from the same CA."""
        from server.enrolment.pki import renew_hub
        from server.layout import ServerLayout

        layout = ServerLayout(folder.absolute()).check()
        names = [*host, *LOOPBACK_NAMES] if host else None
        return renew_hub(layout, _open(folder, ca_dir, passphrase_file), names)


def _register_showing(kit: typer.Typer) -> None:
    @kit.command("list")
    @command
    def show_all(folder: DirOption, format: FormatOption = OutputFormat.TEXT) -> KitList:
        """List the parties: role, version, days left, revoked or not."""
        return KitList(kits=_book(folder).states())

    @kit.command("show")
    @command
    def show(party: PartyArgument, folder: DirOption, format: FormatOption = OutputFormat.TEXT) -> KitShown:
        """Show a party's latest kit and where it lies."""
        from server.enrolment.kit_state import KitShown

        return KitShown(**_book(folder).state(party).model_dump())


def _book(folder: Path) -> KitBook:
    from server.enrolment.kits import KitBook
    from server.layout import ServerLayout

    return KitBook(ServerLayout(folder.absolute()).check())


def _open(folder: Path, ca_dir: Path | None, passphrase_file: Path | None) -> Authority:
    from server.enrolment.authority import Authority
    from server.enrolment.sealed_key import read_passphrase
    from server.layout import ServerLayout

    layout = ServerLayout(folder.absolute()).check()
    return Authority.open(layout.pki / "ca.crt", ca_dir or layout.pki, read_passphrase(passphrase_file))


def _role(text: str) -> Any:
    from typing import get_args

    from pixcell_core.contracts.enrolment import Role

    if text not in get_args(Role):
        raise BadInputError(
            f"'{text}' is no role.", hint=f"Give one of: {', '.join(get_args(Role))}.", code="unknown-role"
        )
    return text


def _hub(text: str | None) -> str | None:
    from pydantic import TypeAdapter, ValidationError

    from pixcell_core.contracts.enrolment import HubAddress

    if text is not None:
        try:
            TypeAdapter(HubAddress).validate_python(text)
        except ValidationError as error:
            raise BadInputError(
                f"'{text}' is no address of a hub.", hint="Give host:port.", code="bad-hub-address"
            ) from error
    return text


def _ask_fingerprint(request_file: Path) -> str:
    if not sys.stdin.isatty():
        raise BadInputError(
            "The fingerprint that the party read over the phone is missing.",
            hint="Call the party, let it read the digits, and give them: --fingerprint 'abcd …'",
            code="needs-fingerprint",
        )
    emit_note(f"Call the party that sent {request_file.name} and let it read its fingerprint.")
    return str(typer.prompt("Fingerprint you heard", err=True))
