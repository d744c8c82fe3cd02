"""The site's catalogue: patients, slides, tiles, and the split drawn before anything is trained (SQLite)."""

from site_client.catalogue.catalogue import Catalogue

__all__ = ["Catalogue"]
