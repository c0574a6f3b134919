"""How to serve an output with MindIE: an entry of its server's configuration.

Source: MindIE service documentation, configuration parameters and expert parallelism (hiascend.com, MindIE 2.1.RC1 and
2.3.0).
"""

import json

from fxquant.engines.serving import Serving

WHERE = "in conf/config.json of mindie-service, BackendConfig.ModelDeployConfig; started by bin/mindieservice_daemon"
PLACE = "/absolute/path/of/this/folder"


def serve(serving: Serving) -> str:
    """The key ModelConfig. With expert parallelism every rank has whole experts, else all ranks split every expert."""
    layout = serving.layout
    split = 1 if layout.ep > 1 else layout.tp
    model = {
        "modelName": "deepseekv2",
        "modelWeightPath": serving.folder or PLACE,
        "worldSize": layout.ranks,
        "dp": layout.replicas,
        "tp": layout.tp,
        "moe_tp": split,
        "moe_ep": layout.ep,
        "models": {"deepseekv2": {"mix_shared_routing": serving.mixed}},
    }
    return f'"ModelConfig": [{json.dumps(model, ensure_ascii=False)}]'
