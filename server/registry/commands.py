"""Commands of the registry: `pixcell registry show`, `use`, `backup`, `upgrade`, `check`, `acts`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.confirm import confirm
from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError, RefusedError

if TYPE_CHECKING:
    from server.layout import ServerLayout
    from server.registry.registry import Registry

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]


class RegistryShown(BaseModel):
    """Where the registry is, which version its tables have, and how many rows."""

    url: str
    version: str | None
    wanted: str
    rows: dict[str, int]

    def __str__(self) -> str:
        state = "current" if self.version == self.wanted else f"this program needs {self.wanted}"
        counts = "\n".join(f"  {name}: {count}" for name, count in self.rows.items())
        return (
            f"Registry {self.url}\nversion {self.version or 'none, it is empty'} ({state})\n{counts}".rstrip()
        )


class RegistryCopied(BaseModel):
    """A whole copy of the registry."""

    file: Path
    rows: dict[str, int]

    def __str__(self) -> str:
        return f"Copied {sum(self.rows.values())} rows to {self.file}. Copy the folder runs/ after it, not before."


class RegistryUpgraded(BaseModel):
    """What an upgrade did. `backup` is the copy made before it, where this program could make one."""

    before: str | None
    after: str
    backup: Path | None

    def __str__(self) -> str:
        if self.before == self.after:
            return f"The registry has version {self.after} already."
        kept = f"\nThe copy from before: {self.backup}" if self.backup else ""
        return f"The registry went from version {self.before or 'none'} to {self.after}.{kept}"


class RegistryChecked(BaseModel):
    """What a full check found; exit 1 where it found something."""

    rows: dict[str, int]
    problems: list[dict[str, str]]

    @property
    def exit_code(self) -> int:
        """1 where something is not as it was written."""
        return 1 if self.problems else 0

    def __str__(self) -> str:
        if not self.problems:
            return f"The registry is whole: {sum(self.rows.values())} rows, every digest, chain and file checked."
        found = "\n".join(f"  {p['subject']} [{p['code']}]: {p['message']}" for p in self.problems)
        return f"{len(self.problems)} entries are not as they were written:\n{found}"


class ActList(BaseModel):
    """Acts of the coordinator, oldest first."""

    acts: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(f"{a['at']} {a['kind']} {a['subject']}" for a in self.acts) or "no act was noted"


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    registry = group(root, "registry")

    @registry.command("show")
    @command
    def show(folder: DirOption, format: FormatOption = OutputFormat.TEXT) -> RegistryShown:
        """Show where the registry is, its version, and how many rows it has."""
        return _shown(_plain(_layout(folder)))

    @registry.command("use")
    @command
    def use(
        url: Annotated[
            str, typer.Argument(help="sqlite:///FILE or postgresql://USER@HOST:5432/DATABASE, no password.")
        ],
        folder: DirOption,
        password_file: Annotated[
            Path | None, typer.Option(help="File of mode 0600 that holds the password alone.")
        ] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> RegistryShown:
        """Keep the registry in another database, before the first site is enrolled."""
        return _use(_layout(folder), url, password_file)

    @registry.command("backup")
    @command
    def backup(
        folder: DirOption,
        out: Annotated[Path, typer.Option("--out", help="The copy; it must not exist yet.")],
        format: FormatOption = OutputFormat.TEXT,
    ) -> RegistryCopied:
        """Write a whole copy of an SQLite registry, also while the hub runs."""
        return _backup(_layout(folder), out.absolute())

    @registry.command("upgrade")
    @command
    def upgrade(
        folder: DirOption,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> RegistryUpgraded:
        """Bring the tables of an older registry to this version. Stop the hub first."""
        return _upgrade(_layout(folder), yes)

    @registry.command("check")
    @command
    def check(folder: DirOption, format: FormatOption = OutputFormat.TEXT) -> RegistryChecked:
        """Read everything again: digests, chains of rounds, the tensors they name, the database's own rules."""
        from dataclasses import asdict

        from server.registry.inspection import Inspection, rows_of

        layout = _layout(folder)
        opened = layout.registry()
        problems = Inspection(layout, opened).run()
        with opened.read() as connection:
            rows = rows_of(connection)
        return RegistryChecked(rows=rows, problems=[asdict(problem) for problem in problems])

    @registry.command("acts")
    @command
    def acts(
        folder: DirOption,
        since: Annotated[int, typer.Option(help="Number of the last act already known.", min=0)] = 0,
        limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=100_000)] = 1000,
        format: FormatOption = OutputFormat.TEXT,
    ) -> ActList:
        """List the coordinator's acts: when, what, and about whom."""
        from dataclasses import asdict

        from server.registry.events import ActLog

        found = ActLog(_layout(folder).registry()).since(since, limit)
        return ActList(acts=[asdict(act) | {"at": act.at.isoformat()} for act in found])


def _layout(folder: Path) -> ServerLayout:
    from server.layout import ServerLayout

    return ServerLayout(folder.absolute()).check()


def _plain(layout: ServerLayout) -> Registry:
    """The registry as it is, whatever its version; nothing is made or changed."""
    from server.registry.address import RegistryAddress
    from server.registry.registry import Registry

    return Registry(RegistryAddress.of_folder(layout.root))


def _shown(registry: Registry) -> RegistryShown:
    from server.registry.inspection import rows_of
    from server.registry.schema import HEAD, revision_of

    with registry.read() as connection:
        return RegistryShown(
            url=registry.address.shown,
            version=revision_of(connection),
            wanted=HEAD,
            rows=rows_of(connection),
        )


def _use(layout: ServerLayout, url: str, password_file: Path | None) -> RegistryShown:
    import yaml

    from pixcell_core.contracts.atomic import write_atomically
    from server.registry.address import FILE_NAME, RegistryAddress
    from server.registry.registry import Registry
    from server.registry.schema import require_current

    before = _shown(_plain(layout))
    if any(before.rows.values()):
        raise RefusedError(
            f"The registry {before.url} is in use: {sum(before.rows.values())} rows would be left behind.",
            hint="Choose the database before the first site is enrolled.",
            code="registry-in-use",
        )
    given = password_file.absolute() if password_file else None
    address = RegistryAddress.parse(url, given, layout.root)
    fresh = Registry(address)
    require_current(fresh)
    shown = _shown(fresh)
    settings = {"url": url} | ({"password_file": str(given)} if given else {})
    write_atomically(layout.root / FILE_NAME, yaml.safe_dump(settings, sort_keys=False).encode())
    return shown


def _backup(layout: ServerLayout, out: Path) -> RegistryCopied:
    from server.registry.schema import backup

    registry = _plain(layout)
    rows = _shown(registry).rows
    if registry.address.file is None:
        raise BadInputError(
            f"{registry.address.shown} is copied by its own tools.",
            hint=f"Run: pg_dump -Fc {registry.address.url.database}; then copy the folder runs/.",
            code="not-a-file",
        )
    if out.exists():
        raise RefusedError(
            f"{out} exists.", hint="Name a new file: copies are not written over.", code="exists"
        )
    backup(registry, out)
    return RegistryCopied(file=out, rows=rows)


def _upgrade(layout: ServerLayout, yes: bool) -> RegistryUpgraded:
    from server.registry.schema import backup, migrate

    registry = _plain(layout)
    shown = _shown(registry)
    if shown.version == shown.wanted:
        return RegistryUpgraded(before=shown.version, after=shown.wanted, backup=None)
    if shown.version is not None and not yes:
        _confirm(registry, shown)
    copy = None
    if registry.address.file is not None and shown.version is not None:
        copy = registry.address.file.with_name(f"registry-before-{shown.wanted}.db")
        if copy.exists():
            raise RefusedError(
                f"A copy from an earlier try stands in the way: {copy}",
                hint="Look at it, move it away, and run the upgrade again.",
                code="backup-exists",
            )
        backup(registry, copy)
    before, after = migrate(registry)
    return RegistryUpgraded(before=before, after=after, backup=copy)


def _confirm(registry: Registry, shown: RegistryShown) -> None:
    note = (
        "A copy is made beside it first."
        if registry.address.file is not None
        else f"Make a copy first: pg_dump -Fc {registry.address.url.database}"
    )
    question = f"Upgrade {shown.url} from {shown.version} to {shown.wanted}? {note} Is the hub stopped?"
    confirm(
        question,
        otherwise="nothing was changed",
        hint="Stop the hub, copy the database, then add --yes.",
    )
