"""`python -m zotune` is `zotune`."""

from zotune.cli import main

main()
