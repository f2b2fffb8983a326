"""Write the LeRobotDatasets with video that the tests read: pyarrow and PyAV, nothing of QVLA.

    python tests/data/videos/write_videos.py        # PyAV 18.1.0, pyarrow 26, SVT-AV1 and x264

`av1_v30` and `h264_v30` are of v3.0, with several episodes a video file and two files a camera;
`mixed_v21` is of v2.1, with a file an episode and camera. `av1_v30` has a key frame every other
picture, as LeRobot encodes; `h264_v30` one a file, and pictures that are decoded out of order.
"""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
LENGTHS = (7, 10, 5, 9, 8, 6)
# Episodes of each file.
FILES = ((0, 1, 2), (3, 4, 5))
TASKS = ("pick up the cube", "open the drawer")
SIZES = {"top": (48, 64), "wrist": (40, 56)}
AV1 = ("libsvtav1", {"g": "2", "crf": "30", "preset": "8"})
H264 = ("libx264", {"g": "250", "bf": "2", "crf": "20"})


def picture(episode: int, frame: int, camera: str) -> np.ndarray:
    """Show which it is: red says the episode, a white bar's place the frame, blue the camera."""
    height, width = SIZES[camera]
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 30 * episode + 20
    image[..., 1] = np.linspace(0, 120, width).astype(np.uint8)
    image[..., 2] = 40 if camera == "top" else 200
    image[:, 4 * frame : 4 * frame + 4] = 255
    return image


def write_video(path, codec, options, fps, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def frames_of(episode, camera):
    return [picture(episode, frame, camera) for frame in range(LENGTHS[episode])]


def rows(episode, fps):
    count, start = LENGTHS[episode], sum(LENGTHS[:episode])
    random = np.random.default_rng(episode)
    vectors = pa.list_(pa.float32())
    return pa.table(
        {
            "observation.state": pa.array(random.normal(0, 1, (count, 3)).tolist(), vectors),
            "action": pa.array(random.normal(0, 1, (count, 2)).tolist(), vectors),
            "timestamp": pa.array(np.arange(count) / fps, pa.float32()),
            "frame_index": pa.array(range(count), pa.int64()),
            "episode_index": pa.array([episode] * count, pa.int64()),
            "index": pa.array(range(start, start + count), pa.int64()),
            "task_index": pa.array([episode % 2] * count, pa.int64()),
        }
    )


def info(version, fps, **paths):
    features = {
        f"observation.images.{camera}": {
            "dtype": "video",
            "shape": [*size, 3],
            "names": ["height", "width", "channels"],
            "info": {"video.fps": float(fps), "video.is_depth_map": False},
        }
        for camera, size in SIZES.items()
    }
    features["observation.state"] = {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    features["action"] = {"dtype": "float32", "shape": [2], "names": ["a", "b"]}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": version,
        "robot_type": "none",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        **paths,
        "features": features,
    }


def write_parquet(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_v30(root, codec, options, fps):
    described = []
    for file, episodes in enumerate(FILES):
        data = pa.concat_tables([rows(episode, fps) for episode in episodes])
        write_parquet(data, root / f"data/chunk-000/file-{file:03d}.parquet")
        for camera in SIZES:
            pictures = [image for episode in episodes for image in frames_of(episode, camera)]
            name = f"videos/observation.images.{camera}/chunk-000/file-{file:03d}.mp4"
            write_video(root / name, codec, options, fps, pictures)
        before = 0
        for episode in episodes:
            start = sum(LENGTHS[:episode])
            row = {
                "episode_index": episode,
                "tasks": [TASKS[episode % 2]],
                "length": LENGTHS[episode],
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": start,
                "dataset_to_index": start + LENGTHS[episode],
            }
            for camera in SIZES:
                key = f"videos/observation.images.{camera}"
                row |= {f"{key}/chunk_index": 0, f"{key}/file_index": file}
                row[f"{key}/from_timestamp"] = before / fps
                row[f"{key}/to_timestamp"] = (before + LENGTHS[episode]) / fps
            before += LENGTHS[episode]
            described.append(row)
    write_parquet(
        pa.Table.from_pylist(described), root / "meta/episodes/chunk-000/file-000.parquet"
    )
    tasks = pa.table({"task_index": pa.array(range(len(TASKS)), pa.int64()), "task": TASKS})
    write_parquet(tasks, root / "meta/tasks.parquet")
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info("v3.0", fps, **paths), indent=1))


def write_v21(root, codecs, fps):
    for episode in range(len(LENGTHS)):
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        write_parquet(rows(episode, fps), path)
        for camera, (codec, options) in codecs.items():
            name = f"videos/chunk-000/observation.images.{camera}/episode_{episode:06d}.mp4"
            write_video(root / name, codec, options, fps, frames_of(episode, camera))
    chunk, file = "chunk-{episode_chunk:03d}", "episode_{episode_index:06d}"
    paths = {
        "data_path": f"data/{chunk}/{file}.parquet",
        "video_path": f"videos/{chunk}/{{video_key}}/{file}.mp4",
    }
    lines = {
        "episodes": [
            {"episode_index": i, "tasks": [TASKS[i % 2]], "length": n}
            for i, n in enumerate(LENGTHS)
        ],
        "tasks": [{"task_index": i, "task": task} for i, task in enumerate(TASKS)],
    }
    (root / "meta").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info("v2.1", fps, **paths), indent=1))
    for name, values in lines.items():
        text = "".join(json.dumps(value) + "\n" for value in values)
        (root / f"meta/{name}.jsonl").write_text(text)


def main():
    for name in ("av1_v30", "h264_v30", "mixed_v21"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    write_v30(HERE / "av1_v30", *AV1, fps=15)
    write_v30(HERE / "h264_v30", *H264, fps=30)
    write_v21(HERE / "mixed_v21", {"top": AV1, "wrist": H264}, fps=30)


if __name__ == "__main__":
    main()
