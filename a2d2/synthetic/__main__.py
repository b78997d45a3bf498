"""Write synthetic scenes in the raw A2D2 format, for the demo and the tests.

    python -m a2d2.synthetic --out Datasets/synthetic --scenes 64 --frames 8 --size 960x604

Finished scenes are not written again. The files depend on the options only, not on the number of workers.
"""

import argparse
import sys
from pathlib import Path

from a2d2.console import allow_any_text
from a2d2.synthetic.world import ROADS
from a2d2.synthetic.writer import write_dataset


def _parse_size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, such as 960x604") from None
    return width, height


def main() -> int:
    allow_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("Datasets/synthetic"), help="folder of the dataset")
    parser.add_argument("--scenes", type=int, default=64, help="number of scenes")
    parser.add_argument("--frames", type=int, default=8, help="frames of each scene")
    parser.add_argument("--size", type=_parse_size, default="960x604", help="size of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws")
    parser.add_argument(
        "--roads", choices=ROADS, default="winding", help="real: steering angles distributed as A2D2's, with rare turns"
    )
    parser.add_argument("--complete", action="store_true", help="every frame has all labels, and no file is defective")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    arguments = parser.parse_args()
    try:
        write_dataset(**vars(arguments))
    except (OSError, ValueError) as error:
        print(f"synthetic: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("synthetic: stopped; the same command resumes", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
