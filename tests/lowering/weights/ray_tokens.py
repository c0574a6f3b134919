"""MODEL OUT [imported]: compiles on a cluster of its own, then starts another with Ray alone, and prints

the length of the cluster's token, its variables in the environment afterwards, and what a task of the other returns.
"""

import os
import sys
from importlib import import_module

import fxquant
from fxquant.lowering.weights import WorkerKind, Workers, ray_cluster, ray_head
from fxquant.lowering.weights.ray_head import MODE, TOKEN


def main(model: str, out: str, imported: bool) -> None:
    for name in (MODE, TOKEN):
        os.environ.pop(name, None)
    if imported:
        import_module("ray")
    tokens, start = [], ray_head.own_cluster
    ray_cluster.own_cluster = lambda cores: (tokens.append(os.environ[TOKEN]), start(cores))[1]
    options = fxquant.CompileOptions(
        policy="deepseek_w4a8_dynamic", out=out, workers=Workers(WorkerKind.RAY, 1), verify=False, export=False
    )
    fxquant.compile(model, options)
    print(len(tokens[0]), os.environ.get(MODE), os.environ.get(TOKEN))
    ray = import_module("ray")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    print(ray.get(ray.remote(lambda: 42).remote()))
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], len(sys.argv) > 3)
