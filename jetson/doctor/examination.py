"""The verb `examine`: every check, on what was read of this machine and of what it is to run."""

from dataclasses import dataclass, replace
from pathlib import Path

from jetson.doctor import libero, memory, observations, runtime, server_facts, statistics
from jetson.doctor.bundle_facts import BundleFacts, read_bundle
from jetson.doctor.finding import BoardFinding
from jetson.doctor.machine import Machine, read_machine
from jetson.doctor.observations import DatasetFacts, needs_of
from jetson.doctor.server_facts import ServerFacts, read_serving
from jetson.doctor.speed import examine_speed
from jetson.doctor.statistics import CheckpointFacts, read_checkpoint


@dataclass(frozen=True)
class DoctorRequest:
    """What the machine is to run; None for what is not asked about."""

    bundle: Path | None = None
    # Folder of its engines; None for the one beside it.
    engines: Path | None = None
    checkpoint: Path | None = None
    unnorm_key: str | None = None
    preset: str | None = None
    # Look at LIBERO's versions even where it is not installed.
    libero: bool = False
    # Where the server is to listen, and its token's file.
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None


@dataclass(frozen=True)
class Subject:
    """Everything the checks look at, as read."""

    machine: Machine
    bundle: BundleFacts | None
    checkpoint: CheckpointFacts | None
    dataset: DatasetFacts | None
    serving: ServerFacts


def read_subject(
    question: DoctorRequest,
    machine: Machine | None = None,
    dataset: DatasetFacts | None = None,
    load_problem: str | None = None,
) -> Subject:
    """Read what the checks look at; never an error.

    Args:
        question: what the machine is to run.
        machine: this machine; None to read it.
        dataset: a data set, which the host alone can read.
        load_problem: why the host cannot load the checkpoint; empty where it can, None where
            nobody tried.
    """
    checkpoint = question.checkpoint
    return Subject(
        machine=machine or read_machine(),
        bundle=None if question.bundle is None else read_bundle(question.bundle, question.engines),
        checkpoint=None
        if checkpoint is None
        else replace(
            read_checkpoint(checkpoint, question.unnorm_key, question.preset),
            load_problem=load_problem,
        ),
        dataset=dataset,
        serving=read_serving(question.host, question.port, question.token_file),
    )


def examine(question: DoctorRequest, subject: Subject) -> tuple[BoardFinding, ...]:
    """Return one finding a check, in the order of the machine's parts."""
    machine, bundle, board = subject.machine, subject.bundle, subject.machine.board
    needs = needs_of(bundle, subject.checkpoint)
    return (
        *examine_speed(machine, bundle),
        memory.check_swap(board),
        memory.check_contiguous(machine),
        memory.check_cma(machine),
        memory.check_release(board),
        memory.check_available(board, bundle),
        memory.check_disk(board, bundle),
        runtime.check_python(machine, bundle),
        runtime.check_onnx_runtime(machine, bundle),
        runtime.check_tensorrt(machine, bundle),
        runtime.check_bindings(machine, bundle),
        runtime.check_gpu(machine, bundle),
        runtime.check_engines(machine, bundle),
        runtime.check_engine_version(machine, bundle),
        runtime.check_engine_gpu(machine, bundle),
        statistics.check_bundle(bundle),
        statistics.check_bundle_key(bundle, question.unnorm_key),
        statistics.check_config(subject.checkpoint),
        statistics.check_key(subject.checkpoint),
        statistics.check_stored(subject.checkpoint),
        observations.check_cameras(machine, needs),
        observations.check_dataset(subject.dataset),
        observations.check_columns(subject.dataset, needs),
        libero.check_libero(machine, "robosuite", question.libero),
        libero.check_libero(machine, "mujoco", question.libero),
        server_facts.check_port(subject.serving),
        server_facts.check_token(subject.serving),
        server_facts.check_clock(machine),
    )
