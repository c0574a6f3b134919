"""fxquant compile"""

from typing import Annotated

import typer

from fxquant.engines.table import DEFAULT
from fxquant.tools.compile_options import (
    Address,
    AsJson,
    CalibrationFile,
    CheckpointFolder,
    Device,
    ExpertRanks,
    Export,
    Force,
    GraphOnly,
    Jobs,
    Mix,
    Model,
    MtpName,
    OnnxAccuracyLevel,
    OnnxCacheName,
    OnnxInline,
    OnnxLastLogits,
    OnnxProfileName,
    OutFolder,
    PolicyName,
    Ranks,
    Restart,
    Reuse,
    SavedCalibration,
    ShardSize,
    Silent,
    TargetName,
    TraceTimeout,
    Verify,
    WorkerName,
    parse_cache,
    parse_mtp,
    parse_profile,
    parse_size,
    parse_target,
    parse_workers,
)
from fxquant.tools.console import print_json
from fxquant.tools.stages import reporter


def command(
    model: Model,
    policy: PolicyName = None,
    out: OutFolder = None,
    target: TargetName = DEFAULT.value,
    tp: Ranks = None,
    ep: ExpertRanks = None,
    graph_only: GraphOnly = False,
    mtp: MtpName = None,
    mix: Mix = None,
    onnx_profile: OnnxProfileName = None,
    onnx_accuracy_level: OnnxAccuracyLevel = None,
    onnx_cache: OnnxCacheName = None,
    onnx_last_logits: OnnxLastLogits = False,
    onnx_inline: OnnxInline = False,
    export: Export = True,
    calib: CalibrationFile = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Number of calibration documents.", min=1)] = 32,
    seq_len: Annotated[int, typer.Option(metavar="N", help="Maximum tokens per document.", min=2)] = 256,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Documents per calibration batch.", min=1)] = 1,
    device: Device = "cpu",
    calibration: SavedCalibration = None,
    checkpoint: CheckpointFolder = None,
    trace_timeout: TraceTimeout = 120.0,
    max_shard_size: ShardSize = "4GiB",
    kv_cache: Annotated[str, typer.Option(metavar="KIND", help="Only float is supported.")] = "float",
    verify: Verify = True,
    jobs: Jobs = None,
    workers: WorkerName = "local",
    address: Address = None,
    reuse: Reuse = None,
    restart: Restart = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Silent = False,
) -> None:
    """Quantize MODEL under a policy and write what an engine loads.

    Traces the model, calibrates static layers, rewrites the graph, writes weights and graph, and verifies them. An
    interrupted compile resumes when the same command is run again.
    """
    from fxquant.api import CompileOptions, compile
    from fxquant.tools.compile_report import as_document, print_report

    options = CompileOptions(
        policy=policy,
        out=out,
        target=parse_target(target),
        tp=tp,
        ep=ep,
        graph_only=graph_only,
        mtp=parse_mtp(mtp),
        mix=mix,
        onnx_profile=parse_profile(onnx_profile),
        onnx_accuracy_level=onnx_accuracy_level,
        onnx_cache=parse_cache(onnx_cache),
        onnx_last_logits=onnx_last_logits,
        onnx_inline=onnx_inline,
        export=export,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
        calibration=calibration,
        checkpoint=checkpoint,
        trace_timeout=trace_timeout,
        max_shard_size=parse_size(max_shard_size),
        kv_cache=kv_cache,
        verify=verify,
        workers=parse_workers(workers, jobs, address),
        reuse=reuse,
        restart=restart,
        force=force,
    )
    report = compile(model, options, reporter(quiet or as_json))
    if as_json:
        print_json(as_document(report))
    elif not quiet:
        print_report(report)
