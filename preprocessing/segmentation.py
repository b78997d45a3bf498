"""Label PNGs -> class maps at the training size.

    python preprocessing/segmentation.py --data Datasets/camera_lidar_semantic_bboxes --size 1024x640 --threads 4

Writes <scene>/segmentation/<cam>/*.npy: uint8 (H, W), the 38 classes of A2D2, 255 for ignore.
"""

from _common import Kind, build_parser, run_script

from a2d2.derive import derive_segmentation


def main() -> None:
    parser = build_parser(__doc__)
    arguments = parser.parse_args()
    kind = Kind(name="segmentation", raw="label", produces="segmentation", derive=derive_segmentation)
    run_script(kind, arguments)


if __name__ == "__main__":
    main()
