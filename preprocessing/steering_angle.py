"""Bus signals -> the signed steering-wheel angle of each frame.

    python preprocessing/steering_angle.py --data Datasets/camera_lidar_semantic_bboxes --threads 4

Writes <scene>/steering/<cam>/*.json: degrees, left positive; no file for a frame without a usable sample of the
angle near its time.
"""

from _common import Kind, build_parser, run_script

from a2d2.bus import LIMIT_MS
from a2d2.derive import derive_steering


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--limit-ms",
        type=float,
        default=LIMIT_MS,
        help="samples of angle, sign and speed farther from their moment are not used",
    )
    arguments = parser.parse_args()
    if not arguments.limit_ms > 0:
        parser.error(f"argument --limit-ms: {arguments.limit_ms:g}: must be more than 0")
    kind = Kind(
        name="steering",
        raw="camera",
        produces="steering",
        derive=derive_steering,
        options={"limit_ms": arguments.limit_ms},
        by_scene=True,
    )
    run_script(kind, arguments)


if __name__ == "__main__":
    main()
