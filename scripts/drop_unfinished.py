"""Makes pip see what an interrupted installation left unfinished as not installed; set_up.py runs it.

pip takes a package for installed as soon as its metadata is there. One that lacks its record, or files that the
record names, is forgotten here, so that the next `pip install` writes it anew.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sysconfig
from pathlib import Path


def unfinished(distribution: importlib.metadata.Distribution) -> bool:
    """Whether the record or a file that it names is missing."""
    if distribution.read_text("RECORD") is None:
        return True
    files = distribution.files or []
    # Compiled files come and go; scripts may have been moved by hand.
    wanted = [file for file in files if file.suffix != ".pyc" and not file.as_posix().startswith("../")]
    return not all(Path(str(distribution.locate_file(file))).exists() for file in wanted)


for folder in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    if unfinished(importlib.metadata.Distribution.at(folder)):
        print(f"forgetting {folder.name}: its installation did not finish")
        shutil.rmtree(folder)
