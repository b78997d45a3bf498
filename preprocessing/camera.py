"""Camera PNGs -> undistorted pictures at the training size.

    python preprocessing/camera.py --data Datasets/camera_lidar_semantic_bboxes --size 1024x640 --threads 4

Writes <scene>/camera/<cam>/*.jpg (quality 95, 4:4:4; --format png: lossless), and beside them frames.json with the
timestamp of each frame.
"""

from _common import Kind, build_parser, run_script

from a2d2.derive import derive_camera, write_frame_times


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--format", choices=["jpg", "png"], default="jpg", help="file format of the pictures")
    arguments = parser.parse_args()
    kind = Kind(
        name="camera",
        raw="camera",
        produces="image" if arguments.format == "jpg" else "image_lossless",
        derive=derive_camera,
        options={"format": arguments.format},
        prepare=write_frame_times,
    )
    run_script(kind, arguments)


if __name__ == "__main__":
    main()
