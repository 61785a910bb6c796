"""``xtuner cache ls|verify|prune``: the cache of prepared datasets, listed, read and deleted."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "action",
        choices=("ls", "verify", "prune"),
        help=tr(
            "list the entries, compare all their bytes with their checksums, or delete old ones"
        ),
    )
    parser.add_argument(
        "--days",
        type=float,
        default=30.0,
        help=tr("prune: entries that were not used for so many days (default: 30; 0: all)"),
    )


def run(args: argparse.Namespace) -> int:
    """List, verify or delete entries.

    Returns:
        0; 1 when an entry is damaged, or could not be deleted because a process is preparing it.
    """
    from xtuner.dataset.prepare.cache import cache_folder, entries, remove

    found = entries()
    if args.action == "ls":
        print(cache_folder())
        for entry in found:
            print(
                tr(
                    "  {name}  {size:,.1f} MB  last used {days:.0f} day(s) ago",
                    name=entry.folder.name,
                    size=entry.size / 1e6,
                    days=entry.days,
                )
            )
        return 0
    if args.action == "verify":
        damages = [_verified(entry.folder) for entry in found]
        return 1 if any(damages) else 0
    old = [entry for entry in found if entry.days >= args.days]
    busy = [entry for entry in old if not remove(entry)]
    freed = sum(entry.size for entry in old if entry not in busy)
    count = len(old) - len(busy)
    print(tr("deleted {count} entries, {size:,.1f} MB", count=count, size=freed / 1e6))
    for entry in busy:
        print(tr("in use: {folder}", folder=entry.folder))
    return 1 if busy else 0


def _verified(folder: Path) -> str | None:
    """Read an entry whole and say what is wrong with it, if anything."""
    from xtuner.dataset.prepare.checksums import find_damage

    damage = find_damage(folder, whole=True)
    print(f"  {folder.name}  {damage or tr('ok')}", flush=True)
    return damage
