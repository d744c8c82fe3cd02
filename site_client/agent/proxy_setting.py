"""Reads and writes the proxy among a site's settings (site.json)."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from pixcell_core.contracts.atomic import write_atomically
from site_client.agent.proxy import DIRECT, choose_way_out, parse_proxy
from site_client.approvals.site_folder import SiteFolder, SiteIdentity


class ProxyShown(BaseModel):
    """The way to the hub that is in force, and who said so."""

    proxy: str | None
    source: str
    credentials_file: Path | None

    def __str__(self) -> str:
        way = "straight to the hub" if self.proxy is None else f"through {self.proxy}"
        secret = f", credentials in {self.credentials_file}" if self.credentials_file else ""
        return f"{way} (from: {self.source}){secret}"


def show_proxy(folder: SiteFolder) -> ProxyShown:
    """What the agent would use if it started now."""
    out = choose_way_out(folder.identity())
    return ProxyShown(
        proxy=out.proxy.url if out.proxy else None,
        source=out.source,
        credentials_file=out.proxy.credentials_file if out.proxy else None,
    )


def set_proxy(folder: SiteFolder, address: str, credentials_file: Path | None = None) -> ProxyShown:
    """Write the proxy (`direct`, `unset` or `http://host:port`) into the site's settings, once it is found usable."""
    identity = folder.identity()
    chosen: str | None = None
    if address == DIRECT:
        chosen = DIRECT
    elif address != "unset":
        proxy = parse_proxy(address, credentials_file.absolute() if credentials_file else None)
        proxy.credentials()
        chosen = proxy.url
    changed = SiteIdentity.model_validate(
        identity.model_dump()
        | {
            "proxy": chosen,
            "proxy_credentials": str(credentials_file.absolute()) if credentials_file and chosen else None,
        }
    )
    write_atomically(folder.identity_file, changed.to_bytes())
    return show_proxy(folder)
