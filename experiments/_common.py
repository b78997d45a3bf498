"""Lets the scripts of this folder run from any folder, uninstalled, as those of preprocessing/ do."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# in place of this folder, whose files have the names of other people's packages
sys.path[0] = str(ROOT)
