"""Lets the scripts of this folder run from any folder, uninstalled, as those of preprocessing/ do."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
