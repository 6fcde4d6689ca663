"""Makes pip see what an interrupted installation left unfinished as not installed; set_up.py runs it.

pip takes a package for installed as soon as its metadata is there. One that lacks its record, or files that the
record names, is forgotten here, so that the next `pip install` writes it anew.
"""

from __future__ import annotations

import csv
import shutil
import sysconfig
from pathlib import Path, PurePosixPath


def unfinished(folder: Path) -> bool:
    """Whether the record of a ``dist-info`` folder, or a file that it names, is missing.

    The record is read here, as ``importlib.metadata`` leaves missing files out since Python 3.12.
    """
    record = folder / "RECORD"
    if not record.is_file():
        return True
    with record.open(newline="", encoding="utf-8") as file:
        names = [row[0] for row in csv.reader(file) if row]
    # Compiled files come and go; scripts may have been moved by hand.
    wanted = [name for name in names if PurePosixPath(name).suffix != ".pyc" and not name.startswith("../")]
    return not all((folder.parent / name).exists() for name in wanted)


for folder in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    if unfinished(folder):
        print(f"forgetting {folder.name}: its installation did not finish")
        shutil.rmtree(folder)
