"""Imported last by the server that tests fork their processes from (tests/ranks.py): what it holds is no garbage of theirs.

Without this the first collection of each process walks everything that was imported, and copies the pages.
"""

import gc

gc.freeze()
