"""Lidar -> sparse depth images at the training size.

    python preprocessing/depth_preprocess.py --data Datasets/camera_lidar_semantic_bboxes --size 1024x640 --threads 4

Writes <scene>/depth/<cam>/*.png: 16-bit gray, metres along the optical axis x 256, 0 for unknown.
"""

from _common import Kind, build_parser, run_script

from a2d2.derive import derive_depth


def main() -> None:
    parser = build_parser(__doc__)
    arguments = parser.parse_args()
    kind = Kind(name="depth", raw="lidar", produces="depth", derive=derive_depth)
    run_script(kind, arguments)


if __name__ == "__main__":
    main()
