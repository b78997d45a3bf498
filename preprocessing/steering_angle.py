"""Bus signals -> the signed steering-wheel angle of each frame.

    python preprocessing/steering_angle.py --data Datasets/camera_lidar_semantic_bboxes --threads 4

Writes <scene>/steering/<cam>/*.json: degrees, left positive; no file for a frame without a usable sample of the angle.
"""

from _common import Kind, build_parser, run_script

from a2d2.derive import derive_steering


def main() -> None:
    parser = build_parser(__doc__)
    arguments = parser.parse_args()
    kind = Kind(name="steering", raw="camera", produces="steering", derive=derive_steering, by_scene=True)
    run_script(kind, arguments)


if __name__ == "__main__":
    main()
