"""Swapping new files into an output folder, so that the old ones are there until the new ones are complete.

New files are written in a scratch folder and synced. Its renaming is the decision: before it the old files are there
and nothing else; after it, any command in the output folder finishes the swap, if a kill cut it short. The same holds
for the files of an earlier run, which a new one sets aside: its manifest decides whether they go back.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from zotune.llm.output.manifest import CONFIG, FILE, Manifest, manifest_of, read_manifest
from zotune.messages import say
from zotune.system.atomic_write import atomic_write, sync
from zotune.system.scratch_folder import made_folders, make_folder, obey_umask, remove_left_over

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"

_SWAP, _REPLACED = ".zotune-swap-", ".zotune-replaced-"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder atomically."""
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(manifest.to_text(), encoding="utf-8")
        sync(temporary)


def swap_in(folder: Path, new: Path, after: Manifest) -> None:
    """Move all that is in the scratch folder `new` into `folder`, and delete what its manifest no longer lists.

    A file in the way that zotune did not write is renamed.
    """
    (new / FILE).write_text(after.to_text(), encoding="utf-8")
    obey_umask(new)
    for path in (*new.rglob("*"), new):
        sync(path)
    swap = new.with_name(new.name.replace(".zotune-", _SWAP, 1))
    new.rename(swap)
    sync(folder)
    _finish_swap(folder, swap)
    sync(folder)


def set_aside(folder: Path, manifest: Manifest) -> str | None:
    """Move all that zotune wrote in a folder into a hidden folder in it; return its name, or None without such files.

    The files go back at the next `recover`, unless the folder's manifest names the hidden folder by then.
    """
    names = manifest.present(folder)
    if not names:
        return None
    aside = make_folder(folder, _REPLACED)
    if (folder / FILE).is_file():
        shutil.copyfile(folder / FILE, aside / FILE)
    for name in names:
        (folder / name).rename(aside / name)
    return aside.name


def go_back(folder: Path, manifest: Manifest) -> None:
    """Delete all that zotune wrote in a folder since it last set files aside, and return these."""
    for name in sorted(manifest.present(folder), key=lambda name: name == CONFIG):
        remove(folder / name)
    _return_last(folder, manifest)
    recover(folder)


def recover(folder: Path) -> None:
    """Finish what a kill cut short in a folder that this process has locked, and remove what it left over."""
    remove_left_over(folder)
    for swap in made_folders(folder, _SWAP):
        _finish_swap(folder, swap)
    manifest = manifest_of(folder)
    if manifest.replaced and not manifest.present(folder):
        # The run that would replace them was killed before it wrote its options.
        _return_last(folder, manifest)
    replaced = manifest_of(folder).replaced
    for aside in made_folders(folder, _REPLACED):
        if aside.name not in replaced:
            _return(folder, aside)


def is_cut_short(folder: Path) -> bool:
    """Whether a folder holds what `recover` looks for."""
    return any(name.startswith(".zotune-") for name in os.listdir(folder))


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_way(path: Path, manifest: Manifest) -> None:
    """Clear the name of a file to write: rename what the user has there, and delete a folder that zotune wrote."""
    if not os.path.lexists(path):
        return
    if not manifest.owns(path):
        number = 1
        while os.path.lexists(saved := path.with_name(f"{path.name}.saved{'' if number == 1 else number}")):
            number += 1
        path.rename(saved)
        say(f"{path} is not as zotune wrote it, so it stays, as {saved.name}")
    elif path.is_dir():
        shutil.rmtree(path)


def _finish_swap(folder: Path, swap: Path) -> None:
    before, after = manifest_of(folder), read_manifest(swap)
    if after is not None:
        new = [path for path in sorted(swap.iterdir()) if path.name != FILE]
        for name in before.files.keys() - after.files.keys():
            if before.owns(folder / name):
                remove(folder / name)
        for path in new:
            make_way(folder / path.name, before)
            path.replace(folder / path.name)
        for aside in set(before.replaced) - set(after.replaced):
            remove(folder / aside)
        (swap / FILE).replace(folder / FILE)
    with suppress(OSError):
        swap.rmdir()


def _return_last(folder: Path, manifest: Manifest) -> None:
    """Give a folder the manifest from before it last set files aside; `recover` returns the files."""
    before = folder / manifest.replaced[-1] / FILE if manifest.replaced else None
    if before is not None and before.is_file():
        before.replace(folder / FILE)
    else:
        (folder / FILE).unlink(missing_ok=True)


def _return(folder: Path, aside: Path) -> None:
    """Move what was set aside back, but for names that are in use again."""
    (aside / FILE).unlink(missing_ok=True)
    for path in sorted(aside.iterdir()):
        if not os.path.lexists(folder / path.name):
            path.rename(folder / path.name)
    with suppress(OSError):
        aside.rmdir()
