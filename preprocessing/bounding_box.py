"""3-D box labels -> distinct visible 2-D boxes at the training size.

    python preprocessing/bounding_box.py --data Datasets/camera_lidar_semantic_bboxes --size 1024x640 --threads 4

Writes <scene>/boxes/<cam>/*.json: {"boxes": [...]}, an empty list for a frame that is labelled as empty.
"""

from _common import Kind, build_parser, run_script

from a2d2.derive import derive_boxes


def main() -> None:
    parser = build_parser(__doc__)
    arguments = parser.parse_args()
    kind = Kind(name="boxes", raw="label3D", produces="boxes", derive=derive_boxes)
    run_script(kind, arguments)


if __name__ == "__main__":
    main()
