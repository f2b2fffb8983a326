"""Write the small data sets of this folder with the formats' own libraries; never with ours.

Needs tensorflow-datasets with tensorflow (RLDS) and h5py (LIBERO, ALOHA) in an environment of its
own: pip install tensorflow-cpu tensorflow-datasets h5py pillow; python write_sources.py OUTPUT

`expected.npz` holds what the same libraries read back: for each set, arrays by
"<set>/<episode>/<camera or state or action>", and instructions in `expected.json`.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

EPISODES, FRAMES, SIDE = 4, 5, 16
TASKS = ("open the drawer", "put the bowl on the plate")


def picture(number: int, frame: int, salt: int) -> np.ndarray:
    """A smooth picture that says where it came from, and has no symmetry."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    red = np.full((SIDE, SIDE), 20 * number + 3 * frame)
    return np.stack([red, 10 * y + salt, 8 * x + 2 * salt], axis=-1).astype(np.uint8)


def numbers(number: int, frame: int, dim: int, salt: int) -> np.ndarray:
    generator = np.random.default_rng((number, frame, salt))
    return generator.normal(size=dim).astype(np.float32)


def write_rlds(root: Path) -> dict[str, Any]:
    """As OpenVLA-OFT's fine-tuning sets of LIBERO are laid out."""
    image = tfds.features.Image(shape=(SIDE, SIDE, 3), dtype=np.uint8, encoding_format="jpeg")
    wrist = tfds.features.Image(shape=(SIDE, SIDE, 3), dtype=np.uint8, encoding_format="png")

    class LiberoTiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            step = {
                "observation": {
                    "image": image,
                    "wrist_image": wrist,
                    "state": tfds.features.Tensor(shape=(8,), dtype=np.float32),
                    "joint_state": tfds.features.Tensor(shape=(7,), dtype=np.float32),
                },
                "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
                "discount": tfds.features.Scalar(dtype=np.float32),
                "reward": tfds.features.Scalar(dtype=np.float32),
                "is_first": tfds.features.Scalar(dtype=np.bool_),
                "is_last": tfds.features.Scalar(dtype=np.bool_),
                "is_terminal": tfds.features.Scalar(dtype=np.bool_),
                "language_instruction": tfds.features.Text(),
            }
            features = {
                "steps": tfds.features.Dataset(step),
                "episode_metadata": {"file_path": tfds.features.Text()},
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for number in range(EPISODES):
                steps = [
                    {
                        "observation": {
                            "image": picture(number, frame, 0),
                            "wrist_image": picture(number, frame, 9),
                            "state": numbers(number, frame, 8, 0),
                            "joint_state": numbers(number, frame, 7, 1),
                        },
                        "action": numbers(number, frame, 7, 2),
                        "discount": 1.0,
                        "reward": float(frame == FRAMES - 1),
                        "is_first": frame == 0,
                        "is_last": frame == FRAMES - 1,
                        "is_terminal": frame == FRAMES - 1,
                        "language_instruction": TASKS[number % 2],
                    }
                    for frame in range(FRAMES)
                ]
                yield number, {"steps": steps, "episode_metadata": {"file_path": f"{number}.hdf5"}}

    builder = LiberoTiny(data_dir=str(root))
    builder.download_and_prepare()
    expected: dict[str, Any] = {}
    config = tfds.ReadConfig(interleave_cycle_length=1)
    dataset = builder.as_dataset("train", read_config=config)
    for number, episode in enumerate(tfds.as_numpy(dataset)):
        steps = list(episode["steps"])
        for name in ("image", "wrist_image", "state"):
            expected[f"rlds/{number}/{name}"] = np.stack([s["observation"][name] for s in steps])
        expected[f"rlds/{number}/action"] = np.stack([s["action"] for s in steps])
        expected[f"rlds/{number}/instruction"] = [s["language_instruction"].decode() for s in steps]
    return expected


def write_libero(root: Path) -> None:
    """Two tasks' files as LIBERO's `create_dataset.py` writes them."""
    root.mkdir(parents=True)
    for file, task in enumerate(TASKS):
        name = f"KITCHEN_SCENE1_{task.replace(' ', '_')}_demo.hdf5"
        with h5py.File(root / name, "w") as f:
            data = f.create_group("data")
            data.attrs["env_name"] = "Libero_Kitchen_Tabletop_Manipulation"
            data.attrs["problem_info"] = json.dumps({"language_instruction": task})
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["num_demos"] = 2
            for demo in range(2):
                number = 2 * file + demo
                group = data.create_group(f"demo_{demo}")
                frames = range(FRAMES + demo)
                group.attrs["num_samples"] = len(frames)
                obs = group.create_group("obs")
                # The simulator's pictures are upside down: turned by 180 degrees.
                for camera, salt in (("agentview_rgb", 0), ("eye_in_hand_rgb", 9)):
                    pixels = [picture(number, k, salt)[::-1, ::-1] for k in frames]
                    obs.create_dataset(camera, data=np.stack(pixels), compression="gzip")
                for array, dim, salt in (
                    ("ee_states", 6, 0),
                    ("ee_pos", 3, 3),
                    ("ee_ori", 3, 4),
                    ("gripper_states", 2, 1),
                    ("joint_states", 7, 5),
                ):
                    values = [numbers(number, k, dim, salt).astype(np.float64) for k in frames]
                    obs.create_dataset(array, data=np.stack(values))
                actions = [numbers(number, k, 7, 2).astype(np.float64) for k in frames]
                group.create_dataset("actions", data=np.stack(actions))


def read_libero(root: Path) -> dict[str, Any]:
    """As OpenVLA-OFT's conversion does: turned by 180 degrees, end effector before gripper."""
    expected: dict[str, Any] = {}
    number = 0
    for path in sorted(root.glob("*.hdf5")):
        with h5py.File(path) as f:
            task = json.loads(f["data"].attrs["problem_info"])["language_instruction"]
            for demo in range(len(f["data"])):
                group = f[f"data/demo_{demo}"]
                obs, key = group["obs"], f"libero/{number}"
                for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                    expected[f"{key}/{camera}"] = np.rot90(obs[camera][()], 2, axes=(1, 2))
                state = np.concatenate([obs["ee_states"][()], obs["gripper_states"][()]], axis=1)
                expected[f"{key}/state"] = state.astype(np.float32)
                expected[f"{key}/action"] = group["actions"][()].astype(np.float32)
                expected[f"{key}/instruction"] = [task] * len(state)
                number += 1
    return expected


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_aloha(root: Path) -> None:
    """Three episodes: pixels, JPEG files padded with zeros, and byte strings of any length."""
    root.mkdir(parents=True)
    for number, way in enumerate(("pixels", "padded", "bytes")):
        with h5py.File(root / f"episode_{number}.hdf5", "w") as f:
            f.attrs["sim"] = False
            f.attrs["compress"] = way != "pixels"
            images = f.create_group("observations/images")
            for camera, salt in (("cam_high", 0), ("cam_left_wrist", 3), ("cam_right_wrist", 6)):
                pixels = [picture(number, frame, salt) for frame in range(FRAMES)]
                files = [jpeg(one) for one in pixels]
                longest = max(map(len, files))
                if way == "pixels":
                    images.create_dataset(camera, data=np.stack(pixels))
                elif way == "padded":
                    padded = [np.frombuffer(one.ljust(longest, b"\0"), np.uint8) for one in files]
                    images.create_dataset(camera, data=np.stack(padded))
                else:
                    kind = h5py.vlen_dtype(np.uint8)
                    array = images.create_dataset(camera, (FRAMES,), dtype=kind)
                    for frame, one in enumerate(files):
                        array[frame] = np.frombuffer(one, np.uint8)
            for name, salt in (("observations/qpos", 0), ("observations/qvel", 1), ("action", 2)):
                values = [numbers(number, frame, 14, salt) for frame in range(FRAMES)]
                f.create_dataset(name, data=np.stack(values))


def read_aloha(root: Path) -> dict[str, Any]:
    expected: dict[str, Any] = {}
    for number, path in enumerate(sorted(root.glob("*.hdf5"))):
        with h5py.File(path) as f:
            for camera in f["observations/images"]:
                array, pictures = f["observations/images"][camera], []
                for frame in range(len(array)):
                    value = array[frame]
                    if value.ndim == 1:
                        value = np.asarray(Image.open(io.BytesIO(value.tobytes())).convert("RGB"))
                    pictures.append(value)
                expected[f"aloha/{number}/{camera}"] = np.stack(pictures)
            expected[f"aloha/{number}/state"] = f["observations/qpos"][()]
            expected[f"aloha/{number}/action"] = f["action"][()]
    return expected


def main(output: Path) -> None:
    """Write everything below a new folder."""
    output.mkdir(parents=True)
    expected = write_rlds(output / "rlds")
    write_libero(output / "libero")
    expected |= read_libero(output / "libero")
    write_aloha(output / "aloha")
    expected |= read_aloha(output / "aloha")
    texts = {name: value for name, value in expected.items() if isinstance(value, list)}
    (output / "expected.json").write_text(json.dumps(texts, indent=1) + "\n")
    arrays = {name: value for name, value in expected.items() if name not in texts}
    np.savez_compressed(output / "expected.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
